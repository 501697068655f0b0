"""The log of a training is read as mmengine writes it, and drawn with nothing hidden."""

import json

import numpy as np
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg

from spartan_mm.analysis.report.curves import (
    COLOURS,
    RunLog,
    draw_curves,
    draw_panels,
    find_logs,
    read_log,
)
from spartan_mm.errors import UsageError


def iteration(step, epoch=None, **values):
    record = dict(lr=1e-3 / step, loss=10 / step, loss_cls=1 / step, loss_bbox=2 / step,
                  enc_loss_cls=0.5 / step, dn_loss_cls=1 / step, time=0.5)
    record.update({'d0.loss_cls': 1.5 / step, 'd0.dn_loss_cls': 3 / step, 'd1.loss_cls': 1 / step})
    return dict(record, **values, step=step, iter=step, **({'epoch': epoch} if epoch else {}))


def evaluation(step, ap):
    return {'coco/bbox_mAP': ap, 'coco/bbox_mAP_50': min(1.5 * ap, 1) if ap > 0 else -1.,
            'time': 0.1, 'step': step}


def assert_close(actual, expected):
    actual, expected = (torch.tensor(np.array(values, dtype=float))
                        for values in (actual, expected))
    torch.testing.assert_close(actual, expected)


def write(path, records):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(''.join(json.dumps(record) + '\n' for record in records))
    return path


@pytest.fixture
def records():
    return [iteration(10, 1), iteration(20, 1), evaluation(1, 0.2),
            iteration(30, 2), iteration(40, 2), evaluation(2, 0.3)]


@pytest.fixture
def run(records, tmp_path):
    return read_log(write(tmp_path / 'scalars.json', records))


def test_training_and_evaluations_are_told_apart(run):
    assert [record['step'] for record in run.train] == [10, 20, 30, 40]
    assert run.by_epoch and run.metrics == ['coco/bbox_mAP', 'coco/bbox_mAP_50']
    assert_close(run.evaluation('coco/bbox_mAP'), [[1, 2], [0.2, 0.3]])


def test_a_loop_of_iterations_counts_iterations(tmp_path):
    log = read_log(write(tmp_path / 'log.json', [iteration(10), evaluation(10, 0.2)]))
    assert not log.by_epoch
    assert_close(log.evaluation('coco/bbox_mAP')[0], [10])


def test_sums_of_loss_terms(run):
    steps, values = run.training(r'(d\d+\.)?dn_loss_\w+')
    assert_close(steps, [10, 20, 30, 40])
    assert_close(values, 4 / steps)
    assert all(len(array) == 0 for array in run.training('nothing'))


def test_an_undefined_metric_is_left_out(tmp_path):
    log = read_log(write(tmp_path / 'log.json', [iteration(1, 1), evaluation(1, -1.),
                                                 evaluation(2, 0.)]))
    assert_close(log.evaluation('coco/bbox_mAP'), [[2], [0]])


@pytest.mark.parametrize('start', ['work_dir', 'run', 'vis_data', 'log'])
def test_the_latest_run_is_found(start, records, tmp_path):
    write(tmp_path / '20200101_120000' / 'vis_data' / 'scalars.json', records[:1])
    log = write(tmp_path / '20200102_120000' / 'vis_data' / 'scalars.json', records)
    # A test in the same folder writes no scalars.
    (tmp_path / '20200103_120000' / 'vis_data').mkdir(parents=True)
    path = dict(work_dir=tmp_path, run=log.parents[1], vis_data=log.parent, log=log)[start]
    assert len(read_log(path).train) == 4


def test_a_line_cut_off_by_a_kill_is_ignored(records, tmp_path):
    path = write(tmp_path / 'log.json', records)
    whole = path.read_text()
    for cut in (1, 30, len(json.dumps(records[-1]))):
        path.write_text(whole[:-1 - cut])
        log = read_log(path)
        assert len(log.train) == 4 and len(log.evaluations) == 1


@pytest.mark.parametrize('content, message', [
    ('', 'is empty'),
    ('{"step": 1', 'is empty'),
    ('{"step": 1\n{"lr": 1.0, "step": 2}\n', 'line 1 of'),
    ('{"lr": 1.0, "step": 2}\n[1]\n', "line 2 of .*not a dict with 'step'"),
    ('{"categories": []}\n', "line 1 of .*not a dict with 'step'"),
])
def test_a_broken_log_is_named(content, message, tmp_path):
    path = tmp_path / 'log.json'
    path.write_text(content)
    with pytest.raises(ValueError, match=message) as error:
        read_log(path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize('name, message', [('', 'no log of a training'),
                                           ('nowhere', 'does not exist')])
def test_a_missing_log_is_named(name, message, tmp_path):
    with pytest.raises(FileNotFoundError, match=message) as error:
        read_log(tmp_path / name)
    assert str(tmp_path / name) in str(error.value)


def lines(axes):
    return {line.get_label(): line.get_ydata() for line in axes.lines}


def test_curves_of_one_run(run):
    loss, terms, metrics, rate = draw_curves(run).axes
    steps = np.array([10, 20, 30, 40])
    drawn = lines(loss)
    assert list(drawn) == ['total', 'last decoder layer', 'other decoder layers', 'encoder',
                           'denoising']
    assert_close(drawn['total'], 10 / steps)
    # The parts are all there is.
    assert_close(sum(drawn[name] for name in list(drawn)[1:]), drawn['total'])
    assert list(lines(terms)) == ['loss_bbox', 'loss_cls']
    assert_close(lines(metrics)['AP (0.300 at the end)'], [0.2, 0.3])
    assert_close(lines(metrics)['AP50 (0.450 at the end)'], [0.3, 0.45])
    assert metrics.get_xlabel() == 'epoch' and loss.get_xlabel() == 'iteration'
    assert_close(lines(rate)['first parameter group'], 1e-3 / steps)


def test_several_runs_have_a_colour_each(run):
    figure = draw_curves({'first': run, 'second': run})
    *losses, ap, ap50, rate = figure.axes
    assert [axes.get_title(loc='left') for axes in figure.axes] == [
        'Training loss', 'loss_bbox of the last decoder layer',
        'loss_cls of the last decoder layer', 'Validation: AP', 'Validation: AP50',
        'Learning rate']
    for axes in (*losses, rate):
        assert {line.get_label(): line.get_color() for line in axes.lines} == {
            'first': COLOURS[0], 'second': COLOURS[1]}
        # Of two that coincide, both are seen.
        assert len({line.get_linestyle() for line in axes.lines}) == 2
    assert_close(lines(losses[1])['second'], run.training('loss_bbox')[1])
    assert_close(lines(ap50)['second'], [0.3, 0.45])
    assert [line.get_color() for line in ap.lines] == [*COLOURS[:2]]
    # The last values beside the lines, the second above the first as they are the same.
    assert [text.get_text() for text in ap50.texts] == ['0.450', '0.450']
    assert ap50.texts[1].get_position()[1] > ap50.texts[0].get_position()[1] + 0.05
    [legend] = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ['first', 'second']


def test_runs_of_two_tasks(run, tmp_path):
    classifier = read_log(write(tmp_path / 'log.json', [
        dict(lr=1e-3, loss=1., step=1, epoch=1), {'accuracy/top1': 71.5, 'step': 1}]))
    loss, metrics, _ = draw_curves(classifier).axes
    assert list(lines(loss)) == ['total']
    assert list(lines(metrics)) == ['top-1 in % (71.500 at the end)']
    *_, top1, rate = draw_curves({'detector': run, 'classifier': classifier}).axes
    assert list(lines(top1)) == ['classifier']
    assert [text.get_text() for text in top1.texts] == ['71.500']
    assert list(lines(rate)) == ['detector', 'classifier']


@pytest.mark.parametrize('number', [1, 2])
def test_each_panel_alone(number, run):
    runs = run if number == 1 else {'first': run, 'second': run}
    panels, together = draw_panels(runs), draw_curves(runs)
    assert len(panels) == len(together.axes)
    for panel, axes in zip(panels, together.axes, strict=True):
        [alone] = panel.axes
        assert list(lines(alone)) == list(lines(axes))
        [legend] = panel.legends
        assert [text.get_text() for text in legend.get_texts()] == list(lines(axes))
        assert alone.get_legend() is None


def test_memory_is_drawn_where_it_is_logged(tmp_path):
    log = read_log(write(tmp_path / 'log.json', [iteration(1, memory=900), iteration(2)]))
    assert 'memory' not in draw_curves(RunLog(log.train[1:], [], False)).axes[-1].get_title('left')
    memory = draw_curves(log).axes[-1]
    assert memory.get_title(loc='left') == 'Largest GPU memory in use, MiB'
    assert_close(lines(memory)['first process'], [900])


def test_hours(tmp_path):
    # 0.5 s for each of 7200 iterations, then 1 s.
    log = read_log(write(tmp_path / 'log.json', [
        iteration(7200, 1), evaluation(1, 0.2), iteration(10800, 2, time=1.), evaluation(2, 0.3)]))
    assert_close(log.training('loss', 'hours')[0], [1, 2])
    assert_close(log.evaluation('coco/bbox_mAP', 'hours')[0], [1, 2])
    axes = draw_curves(log, axis='hours').axes
    assert {panel.get_xlabel() for panel in axes} == {'hours of training'}
    assert_close(axes[2].lines[0].get_xdata(), [1, 2])


class TestResuming:

    @pytest.fixture
    def write_run(self, tmp_path):
        def write_run(time, records, resumed):
            log = write(tmp_path / time / 'vis_data' / 'scalars.json', records)
            log.with_name('config.py').write_text(f'load_from = None\nresume = {resumed}\n')
            return log
        return write_run

    def test_runs_are_joined(self, write_run, tmp_path):
        write_run('20200101_000000', [iteration(5, 1)], False)
        # Killed after 30 iterations, resumed from the end of epoch 1.
        write_run('20200102_000000', [iteration(10, 1), iteration(20, 1), evaluation(1, 0.2),
                                      iteration(30, 2, loss=7.)], False)
        write_run('20200103_000000', [], True)
        last = write_run('20200104_000000', [evaluation(1, 0.25), iteration(30, 2),
                                             iteration(40, 2), evaluation(2, 0.3)], True)
        log = read_log(tmp_path)
        assert_close(log.training('loss'), [[10, 20, 30, 40], 10 / np.array([10, 20, 30, 40])])
        assert_close(log.evaluation('coco/bbox_mAP'), [[1, 2], [0.25, 0.3]])
        # Alone where it is asked for.
        assert len(read_log(last.parents[1]).train) == 2
        assert find_logs(tmp_path)[-1] == last

    def test_a_new_start_forgets_earlier_runs(self, write_run, tmp_path):
        write_run('20200101_000000', [iteration(10), iteration(20)], False)
        write_run('20200102_000000', [iteration(50)], False)
        assert_close(read_log(tmp_path).training('loss')[0], [50])

    def test_all_empty(self, write_run, tmp_path):
        write_run('20200101_000000', [], False)
        last = write_run('20200102_000000', [], True)
        with pytest.raises(ValueError, match='is empty') as error:
            read_log(tmp_path)
        assert str(last) in str(error.value)


def test_chosen_metrics(run):
    metrics = draw_curves(run, ['coco/bbox_mAP_50']).axes[2]
    assert list(lines(metrics)) == ['AP50 (0.450 at the end)']
    with pytest.raises(UsageError, match='no validation has mAP; there is coco/bbox_mAP, coco'):
        draw_curves(run, ['mAP'])


@pytest.mark.parametrize('train, evaluations', [
    ([], [evaluation(1, 0.2)]),
    ([iteration(1, 1)], []),
    ([iteration(1, 1), iteration(2, 1, loss=float('nan')), iteration(3, 1, loss=float('inf'))],
     [evaluation(1, -1.)]),
    ([iteration(1, 1, loss=float('nan'))], [evaluation(1, 0.)]),
    ([dict(lr=0.1, loss=-2., step=1)], []),
])
def test_whatever_is_in_the_log_can_be_drawn(train, evaluations, tmp_path):
    figure = draw_curves(RunLog(train, evaluations, by_epoch=True))
    figure.set_layout_engine('none')  # which takes most of the time
    figure.savefig(tmp_path / 'curves.png', dpi=40)
    for axes in figure.axes:
        low, high = axes.get_ylim()
        for line in axes.lines:
            values = np.asarray(line.get_ydata(), dtype=float)
            values = values[np.isfinite(values)]
            assert (low <= values).all() and (values <= high).all()


@pytest.mark.parametrize('number', [1, 2])
def test_nothing_overlaps(number, run):
    figure = draw_curves(run if number == 1 else {'first': run, 'second': run})
    figure.draw_without_rendering()
    renderer = FigureCanvasAgg(figure).get_renderer()
    legends = [legend.get_window_extent(renderer) for legend in (
        figure.legends or [axes.get_legend() for axes in figure.axes])]
    plots = [axes.get_window_extent(renderer) for axes in figure.axes]
    for i, legend in enumerate(legends):
        assert not any(legend.overlaps(plot) for plot in plots)
        assert not any(legend.overlaps(other) for other in legends[i + 1:])
        assert 0 <= legend.x0 and legend.x1 <= figure.bbox.width
    for i, axes in enumerate(figure.axes):
        around = axes.get_tightbbox(renderer)
        others = [other.get_tightbbox(renderer) for other in figure.axes[i + 1:]]
        assert not any(around.overlaps(other) for other in others)


@pytest.mark.parametrize('runs, axis, message', [
    ({}, 'step', 'runs is empty'),
    (RunLog([], [], True), 'days', "axis='days' must be one of 'step', 'hours'")])
def test_nothing_to_draw(runs, axis, message):
    with pytest.raises(ValueError, match=message):
        draw_curves(runs, axis=axis)
