"""Exported files beside their models: matched rows, bounds, ties, sizes, lower precision."""
import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope
from torch import nn

import spartan_mm.detection  # noqa: F401 - registers what the configs name
from spartan_mm.export import check
from spartan_mm.export.check import (
    BOXES,
    LOGITS,
    CheckError,
    Reference,
    check_file,
    compare_logits,
    compare_rows,
    detections,
    print_check,
    queries,
)
from spartan_mm.export.pictures import Pictures, find_pictures
from spartan_mm.weights.forms import switch_to_deploy
from spartan_mm.zoo import quiet

DATA = Path(__file__).parents[1] / 'data'
SIZE = (64, 48)


def describe(task, raw=False, size=(64, 64), dynamic=('batch', 'size'), precision='fp32'):
    return dict(task=task, raw=raw, precision=precision,
                input=dict(size=list(size), dynamic=list(dynamic), min_size=32))


@pytest.fixture(scope='module', params=['detection', 'classification'])
def built(request):
    """Config, model and pictures of a task."""
    kind = dict(detection='detector', classification='classifier')[request.param]
    config = Config.fromfile(DATA / f'user_{kind}.py')
    torch.manual_seed(0)
    with DefaultScope.overwrite_default_scope(config.default_scope), quiet():
        model = MODELS.build(config.model)
        model.init_weights()
    for name, parameter in model.named_parameters():
        if 'layer_scale' in name or name.startswith(('head.', 'bbox_head.cls_branches')):
            nn.init.normal_(parameter, std=0.3)
        if 'reg_branches' in name:
            nn.init.normal_(parameter, std=0.1)
    return request.param, model.eval(), find_pictures(config, 6)


def write(rights, sizes, metadata):
    """What a file gives that is right."""
    outputs = {}
    for right, size in zip(rights, sizes, strict=True):
        if metadata['task'] == 'classification':
            found = dict(scores=np.exp(right.rows))
        elif metadata['raw']:
            found = dict(logits=right.rows.values, boxes=right.rows.boxes)
        else:
            found = dict(labels=right.rows.labels, scores=right.rows.scores,
                         boxes=right.rows.boxes * [*size, *size])
        for name, values in found.items():
            outputs.setdefault(name, []).append(values)
    return {name: np.stack(values) for name, values in outputs.items()}


def as_file(model, metadata, change=lambda outputs, images: outputs):
    """A model in the place of a file, its outputs changed, and the shapes that it was given."""
    reference = model if isinstance(model, Reference) else Reference(model, metadata)

    def run(images, sizes):
        shapes.append(images.shape)
        return change(write(reference(images, sizes), sizes, metadata), images)
    shapes = []
    return run, shapes


def make_rows(count=20, classes=5, raw=False, seed=0, **changes):
    """Rows of scores that are well apart."""
    rng = np.random.default_rng(seed)
    boxes = rng.uniform(0.1, 0.9, (count, 4))
    if raw:
        return queries(rng.normal(size=(count, classes)), boxes, **changes)
    return detections(rng.integers(0, classes, count), boxes * [*SIZE, *SIZE],
                      np.linspace(0.9, 0.1, count), SIZE, **changes)


def changed(rows, row, **values):
    """Rows of which one is another."""
    parts = rows._asdict() | {name: np.array(getattr(rows, name)) for name in values}
    for name, value in values.items():
        parts[name][row] = value
    return type(rows)(**parts)


class TestRows:

    @pytest.mark.parametrize('raw', [False, True])
    def test_any_order_is_right(self, raw):
        rows = make_rows(raw=raw)
        order = np.random.default_rng(1).permutation(20)
        shuffled = type(rows)(*(part[order] for part in rows))
        result = compare_rows(rows, shuffled, 0, raw)
        assert (result.fault, result.ties, result.values, result.boxes) == (None, 0, 0, 0)

    @pytest.mark.parametrize('raw', [False, True])
    @pytest.mark.parametrize('share, fault', [(0.9, False), (1.1, True)])
    def test_bounds(self, raw, share, fault):
        rows = make_rows(raw=raw)
        slope = 1 if raw else rows.scores[3] * (1 - rows.scores[3])
        for name, step in (('boxes', BOXES), ('values', LOGITS * slope)):
            moved = changed(rows, 3, **{name: getattr(rows, name)[3] + share * step})
            result = compare_rows(rows, moved, 0, raw)
            assert bool(result.fault) == fault
            if fault:
                assert f'{"query" if raw else "detection"} 3 of 20' in result.fault
                assert f'{share * step:.2g}' in result.fault
            else:
                assert getattr(result, name) == pytest.approx(share * step)

    def test_another_class_is_wrong(self):
        rows = make_rows()
        wrong = compare_rows(rows, changed(rows, 3, labels=rows.labels[3] + 1), 0, False).fault
        assert f'is of class {rows.labels[3] + 1}, not {rows.labels[3]}' in wrong

    def test_the_last_detection_may_be_another(self):
        rows = make_rows()
        other = changed(rows, 19, boxes=0.5, labels=9)
        result = compare_rows(rows, other, 0, False)
        assert (result.fault, result.ties) == (None, 1)
        # One in the middle may not, nor one whose score has gone.
        assert compare_rows(rows, changed(rows, 9, boxes=0.5), 0, False).fault
        assert compare_rows(rows, changed(rows, 18, scores=0.2, values=0.2, boxes=0.5), 0,
                            False).fault

    @pytest.mark.parametrize('raw', [False, True])
    def test_queries_at_the_edge_of_their_selection_may_be_others(self, raw):
        rows = make_rows(raw=raw, loose=np.arange(20) == 5)
        other = changed(make_rows(raw=raw), 5, boxes=0.5)
        assert compare_rows(rows, other, 1, raw).ties == 1
        assert not compare_rows(rows, other, 1, raw).fault
        assert compare_rows(rows, other, 0, raw).fault
        assert compare_rows(rows, changed(rows, 6, boxes=0.5), 1, raw).fault

    def test_numbers_that_are_not_finite(self):
        rows = make_rows()
        assert 'not finite' in compare_rows(rows, changed(rows, 3, boxes=np.nan), 9, False).fault


@pytest.mark.parametrize('change, fault', [
    (lambda logits: logits + [0, 3e-4, 0, 0, 0, 0], None),
    (lambda logits: logits + [0, 5e-4, 0, 0, 0, 0], 'class 1 differs by 0.0005 (bound 0.0004)'),
    (lambda logits: logits[[1, 0, 2, 3, 4, 5]], 'bound'),
    (lambda logits: logits + [0, 0, 0, 0, 3e-4, 0], 'another order'),
    (lambda logits: logits * np.inf, 'not finite')])
def test_logits(change, fault):
    logits = np.array([4, -2, 1, 0.5, 2, 2.0001])
    result = compare_logits(logits, change(logits), 4.)
    assert fault in result.fault if fault else result.fault is None


class TestFiles:

    def test_the_plan(self, built):
        task, model, pictures = built
        metadata = describe(task)
        run, shapes = as_file(model, metadata)
        result = check_file(Reference(model, metadata), run, pictures, metadata)
        assert [shape[:1] + shape[2:] for shape in shapes] == [
            (1, 64, 64), (2, 64, 64), (5, 64, 64), (2, 32, 64), (2, 64, 96)]
        assert 'photographs' in result['pictures']
        assert '32x64' in print_check(result)

    def test_fixed_batch_and_size(self, built):
        task, model, pictures = built
        metadata = describe(task, dynamic=())
        run, shapes = as_file(model, metadata)
        check_file(Reference(model, metadata), run, pictures, metadata)
        assert set(shapes) == {(1, 3, 64, 64)} and len(shapes) == 6

    def test_the_picture_and_the_axis_are_named(self, built):
        task, model, pictures = built
        metadata = describe(task)

        def change(outputs, images):
            if images.shape[3] == 96:
                outputs['scores'][1, :2] *= 0.7
            return outputs
        with pytest.raises(CheckError, match='picture 1, batch of 2, 64x96 pixels: .*bound'):
            check_file(Reference(model, metadata), as_file(model, metadata, change)[0], pictures,
                       metadata)

    def test_another_choice_of_queries(self, built, monkeypatch):
        """Where two tokens tie, all queries differ, for they attend to each other."""
        task, model, pictures = built
        if task == 'classification':
            pytest.skip('a classifier has no queries')
        metadata, scores, model = describe(task, raw=True), [], copy.deepcopy(model)
        model.bbox_head.cls_branches[-2].weight.data *= 10
        pictures = Pictures('', pictures.names[:1], pictures.images[:1], pictures.sizes[:1])
        branch = model.bbox_head.cls_branches[-1]
        hook = branch.register_forward_hook(lambda _, args, logits: scores.append(
            logits.amax(-1).sigmoid()[0].sort(descending=True).values))
        reference = Reference(model, metadata)
        given = np.stack(pictures.images), np.array(pictures.sizes)
        reference(*given)
        hook.remove()
        last = model.num_queries - 1

        def run(images, sizes):
            found, = reference(images, sizes, (last, last + 2))
            return dict(logits=found.rows.values[None], boxes=found.rows.boxes[None])
        metadata['input']['dynamic'] = []
        with pytest.raises(CheckError, match='query'):
            check_file(reference, run, pictures, metadata)
        monkeypatch.setattr(check, 'EDGE', float(scores[0][last] - scores[0][last + 2]) * 1.001)
        result = check_file(reference, run, pictures, metadata)
        assert [(row['logits'], row['ties']) for row in result['rows']] == [(0, 1)]

    def test_another_pick_where_two_channels_are_equal(self, built, monkeypatch):
        """A CMixer that picks another channel changes all that follows."""
        task, model, pictures = built
        metadata = describe(task, dynamic=())
        pictures = Pictures('', pictures.names[:1], pictures.images[:1], pictures.sizes[:1])
        reference = Reference(model, metadata)
        given, seen = check._batch(pictures, [0], (64, 64)), []

        def look(x):
            best = x.topk(2, 1)
            first, second = best.values.unbind(1)
            seen.append((((first - second) / x.std())[:, None], best.indices[:, 1:]))
        with reference._before_mixers(look):
            reference(*given)
        margins, seconds = seen[-1]
        margin = margins[margins > 0].min()
        picks = reference.strongest(*given)
        picks[-1] = np.where(margins == margin, seconds, picks[-1])

        monkeypatch.setattr(check, 'PICK', float(margin) * 1.01)
        outputs = write(reference(*given, picks=picks), given[1], metadata)
        monkeypatch.setattr(check, 'LOGITS', 1e-6)
        monkeypatch.setattr(check, 'CLASS_LOGITS', 1e-6)
        monkeypatch.setattr(check, 'MOST_SLACK', 1.)
        with pytest.raises(CheckError):
            check_file(reference, lambda *_: outputs, pictures, metadata)
        result = check_file(reference, lambda *_: outputs, pictures, metadata, lambda *_: picks)
        assert [row['picks'] for row in result['rows']] == [1] and 'picks' in print_check(result)
        monkeypatch.setattr(check, 'PICK', float(margin) * 0.99)
        with pytest.raises(CheckError):
            check_file(reference, lambda *_: outputs, pictures, metadata, lambda *_: picks)

    def test_a_model_that_is_as_sensitive_as_rounding(self, built, monkeypatch):
        task, model, pictures = built
        metadata = describe(task, dynamic=())
        reference = Reference(model, metadata)
        exact = reference.in_float64()
        for name, bound in dict(LOGITS=1e-7, BOXES=1e-7, CLASS_LOGITS=3e-7).items():
            monkeypatch.setattr(check, name, bound)
        result = check_file(reference, as_file(exact, metadata)[0], pictures, metadata)
        slack = max(row['slack'] for row in result['rows'])
        assert 1 < slack <= check.MOST_SLACK
        assert f'{slack:.1f} times the bounds of float64' in print_check(result)
        with pytest.raises(CheckError):
            check_file(reference, as_file(exact, metadata, lambda outputs, _: outputs | dict(
                scores=outputs['scores'] * np.float32(0.9999)))[0], pictures, metadata)

    def test_says_when_equal_scores_leave_little_to_compare(self, built):
        task, model, pictures = built
        if task == 'classification':
            pytest.skip('a classifier has no queries')
        metadata, equal = describe(task), copy.deepcopy(model)
        for branch in equal.bbox_head.cls_branches:
            nn.init.zeros_(branch.weight)
        for subject, warned in ((model, False), (equal, True)):
            run, _ = as_file(subject, metadata, lambda outputs, _, other=warned: outputs | dict(
                boxes=outputs['boxes'] + 5 * other))
            result = check_file(Reference(subject, metadata), run, pictures, metadata)
            assert ('not trained' in print_check(result)) == warned

    @pytest.mark.parametrize('branches', ['cls_branches', 'reg_branches'])
    def test_a_model_that_gives_nan(self, built, branches):
        task, model, pictures = built
        if (task, branches) == ('classification', 'reg_branches'):
            pytest.skip('a classifier has no boxes')
        metadata, broken = describe(task), copy.deepcopy(model)
        if task == 'detection':
            # The last branch rates tokens, the one before it is the last layer's.
            last = getattr(broken.bbox_head, branches)[-2]
            last = last[-1] if branches == 'reg_branches' else last
        else:
            last = broken.head.fc
        nn.init.constant_(last.bias, torch.nan)
        with pytest.raises(CheckError, match='the model itself gives numbers that are not finite'):
            check_file(Reference(broken, metadata), as_file(model, metadata)[0], pictures, metadata)

    def test_a_file_of_the_deploy_form(self, built):
        task, model, pictures = built
        metadata = describe(task)
        deployed = switch_to_deploy(copy.deepcopy(model))
        result = check_file(Reference(model, metadata), as_file(deployed, metadata)[0], pictures,
                            metadata)
        key = 'scores' if task == 'detection' else 'logits'
        assert 0 < max(row[key] for row in result['rows']) < 1e-4

    def test_lower_precision(self, built):
        task, model, pictures = built
        metadata = describe(task, precision='fp16')

        def change(outputs, images):
            outputs['scores'] = outputs['scores'] * np.float32(0.99)
            return outputs
        result = check_file(Reference(model, metadata), as_file(model, metadata, change)[0],
                            pictures, metadata)
        assert 0 < result['relative_rms'] < 0.1
        assert result['kept' if task == 'detection' else 'top1'] == 1
        assert result['precision'] in print_check(result)
        with pytest.raises(CheckError, match='not finite'):
            check_file(Reference(model, metadata), as_file(
                model, metadata, lambda outputs, _: outputs | dict(
                    scores=outputs['scores'] * np.float32(np.nan)))[0], pictures, metadata)
