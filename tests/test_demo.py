"""The demos run through, say what they did, and do not call a failure a success."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from mmengine import fileio
from PIL import Image

from spartan_mm.analysis.report.curves import read_log
from spartan_mm.demo import (
    ClassifierDemo,
    Console,
    DetectorDemo,
    Goal,
    TrainingProgress,
    judge,
    main,
    parse_progress,
    run_process,
)

TOOLS = Path(__file__).parents[1] / 'tools'
COMMANDS = ['train.py', 'test.py', 'infer.py', 'report.py']


def run_tool(name, *arguments, cwd):
    return subprocess.run(
        [sys.executable, str(TOOLS / f'{name}.py'), '--quick', *map(str, arguments)], cwd=cwd,
        text=True, capture_output=True, timeout=900, env=dict(os.environ, OMP_NUM_THREADS='1'))


# ------------------------------------------------------------------------------------- the whole


def check_output(demo, most_lines):
    """No more than the commands, the progress and the results; nothing of mmengine's log."""
    assert demo.returncode == 0, demo.stdout + demo.stderr
    # A slow machine is told every now and then that a step is not over.
    lines = [line for line in demo.stdout.splitlines() if not line.startswith('running for ')]
    assert lines[-1] == f'Everything lies in {demo.work_dir}'
    assert len(lines) < most_lines
    assert [line.split()[2].rpartition('/')[2] for line in lines
            if line.startswith('$ ')] == COMMANDS
    assert 'BELOW THE BAR' in demo.stdout and 'no error with --quick' in demo.stdout


def check_pictures(demo, least_side, *names):
    for name in names:
        with Image.open(demo.work_dir / name) as image:
            assert min(image.size) > least_side
            assert len(image.convert('RGB').getcolors(1 << 24)) > 20


def check_log(demo):
    log = read_log(demo.work_dir)
    assert [record['step'] for record in log.train] == [1, 2]
    assert len(log.evaluations) == 1
    return log


@pytest.mark.slow
class TestDetector:

    @pytest.fixture
    def demo(self, quick_demo):
        return quick_demo('demo')

    def test_output(self, demo):
        check_output(demo, 50)
        assert re.search(r'^epoch 1 of 1, loss \d+\.\d+: AP \S+, AP50 \S+$', demo.stdout, re.M)
        assert 'digits, train' in demo.stderr

    def test_what_is_said_at_the_end_is_what_was_measured(self, demo):
        table = [line for line in demo.stdout.splitlines() if line.startswith('Average ')]
        assert len(table) == 12 and 'maxDets=100' in table[0]
        ap, ap50 = map(float, re.search(r'^AP (\S+), AP50 (\S+) on 4 validation pictures$',
                                        demo.stdout, re.M).groups())
        [report] = (demo.work_dir / 'evaluation').glob('*/*.json')
        metrics = json.loads(report.read_text())
        assert [ap, ap50] == pytest.approx([metrics['coco/bbox_mAP'], metrics['coco/bbox_mAP_50']],
                                           abs=5e-4)
        assert [float(line.split('=')[-1]) for line in table[:2]] == [ap, ap50]

    def test_files(self, demo):
        assert len(list((demo.data_root / 'train').iterdir())) == 8
        check_log(demo)
        check_pictures(demo, 500, 'curves.png', 'gallery.png')
        results = json.loads((demo.work_dir / 'detections' / 'results.json').read_text())
        pictures = list((demo.work_dir / 'detections').glob('*.jpg'))
        assert len(results['results']) == len(pictures) == 4
        report = (demo.work_dir / 'report.html').read_text(encoding='utf-8')
        assert report.count('detected: ') == 4 and 'class="missing"' not in report


@pytest.mark.slow
class TestClassifier:

    @pytest.fixture
    def demo(self, quick_demo):
        return quick_demo('demo_classification')

    @pytest.fixture
    def top1(self, demo):
        return float(re.search(r'^top-1 (\S+) % on 16 digits that were held out$', demo.stdout,
                               re.M)[1])

    def test_output(self, demo):
        check_output(demo, 40)
        assert '1438 digits to learn from and 359 held out' in demo.stdout
        assert re.search(r'^epoch 1 of 1, loss \d+\.\d+: top-1 \S+$', demo.stdout, re.M)

    def test_what_is_said_at_the_end_is_what_was_measured(self, demo, top1):
        samples = fileio.load(demo.work_dir / 'evaluation' / 'predictions.pkl')
        assert len(samples) == 16 and samples[0]['pred_score'].shape == (10, )
        right = [int(sample['pred_score'].argmax()) == int(sample['gt_label'])
                 for sample in samples]
        assert top1 == pytest.approx(100 * sum(right) / 16, abs=5e-3)

    def test_files(self, demo, top1):
        assert len(check_log(demo).evaluation('accuracy/top1')[1]) == 1
        check_pictures(demo, 300, 'curves.png', 'confusion.png', 'mistakes.png')
        folder = demo.work_dir / 'classified'
        content = json.loads((folder / 'results.json').read_text())
        assert len(content['results']) == len(list(folder.glob('*.png'))) == 8
        assert content['classes'] == list('0123456789')
        assert all(len(result['predictions']) == 5 for result in content['results'])
        report = (demo.work_dir / 'report.html').read_text(encoding='utf-8')
        assert f'{top1:.2f} %' in report and 'class="missing"' not in report


@pytest.mark.slow
def test_a_failing_step_ends_the_demo(tmp_path):
    result = run_tool('demo', '--work-dir', tmp_path / 'out', '--data-root', tmp_path / 'data',
                      '--cfg-options', 'model.num_queries=[60,1', cwd=tmp_path)
    assert result.returncode == 1
    assert 'error: tools/train.py failed with exit code 1' in result.stderr
    assert 'Imbalanced brackets exist in [60,1' in result.stderr
    assert str(tmp_path / 'out' / 'logs') in result.stderr
    assert 'AP' not in result.stdout and 'Everything lies in' not in result.stdout


# -------------------------------------------------------------------------------------- the command


@pytest.fixture
def restored(monkeypatch, tmp_path):
    """What a demo changes in the process is restored afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv('OMP_NUM_THREADS', '1')
    handler = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, handler)


@pytest.mark.parametrize('kind', [DetectorDemo, ClassifierDemo])
def test_a_folder_of_something_else_is_not_replaced(kind, restored, capsys, tmp_path):
    (tmp_path / 'data').mkdir()
    (tmp_path / 'data' / 'mine.txt').write_text('mine')
    assert main(kind, ['--quick', '--work-dir', str(tmp_path / 'out'),
                       '--data-root', str(tmp_path / 'data')]) == 1
    assert (f'error: the data cannot be made: {tmp_path / "data"} is there'
            in capsys.readouterr().err)
    assert (tmp_path / 'data' / 'mine.txt').read_text() == 'mine'


@pytest.mark.parametrize('flags, message', [
    (['--data-root', 'my data'], 'my data: mmengine cannot take a path with blanks'),
    (['--cfg-options', 'model.num_queries'], 'model.num_queries must be KEY=VALUE')])
def test_flags_that_are_refused(flags, message, restored, capsys):
    with pytest.raises(SystemExit) as error:
        main(DetectorDemo, flags)
    assert error.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize('kind, values, quick, code', [
    (DetectorDemo, (0.30, 0.55), False, 0), (DetectorDemo, (0.299, 0.55), False, 3),
    (DetectorDemo, (0.30, 0.549), False, 3), (DetectorDemo, (float('nan'), 0.9), False, 3),
    (DetectorDemo, (-1., -1.), False, 3), (DetectorDemo, (0.1, 0.1), True, 0),
    (ClassifierDemo, (97., ), False, 0), (ClassifierDemo, (96.99, ), False, 3),
    (ClassifierDemo, (9., ), True, 0)])
def test_verdict(kind, values, quick, code, restored, monkeypatch, capsys):
    monkeypatch.setattr(kind, 'run', lambda self: values)
    assert main(kind, ['--quick'] if quick else []) == code
    output = capsys.readouterr().out
    bar, metric = (('The bar, AP 0.300 and AP50 0.550, is reached', 'AP')
                   if kind is DetectorDemo else ('The bar, top-1 97.00 %, is reached', 'top-1'))
    reached = all(value >= goal.least for value, goal in zip(values, kind.goals, strict=True))
    assert (bar in output) == reached
    assert (f'BELOW THE BAR: {metric}' in output) != reached
    assert output.splitlines()[-1].startswith('Everything lies in ')


def test_interrupted(restored, monkeypatch, capsys):
    def interrupt(self):
        raise KeyboardInterrupt

    monkeypatch.setattr(DetectorDemo, 'run', interrupt)
    assert main(DetectorDemo, ['--quick']) == 130
    assert capsys.readouterr().err.strip() == 'interrupted'


# ---------------------------------------------------------------------- processes and progress


def test_a_process_is_ended_with_the_demo(tmp_path):
    def interrupt(line):
        pids.append(int(line))
        raise KeyboardInterrupt

    pids = []
    command = [sys.executable, '-c', 'import os, time; print(os.getpid()); time.sleep(100)']
    with pytest.raises(KeyboardInterrupt):
        run_process(command, tmp_path / 'log', interrupt, Console())
    with pytest.raises(ProcessLookupError):
        os.kill(pids[0], 0)


PREFIX = '11/20 10:42:01 - mmengine - INFO - '


@pytest.mark.parametrize('line, expected', [
    ('Epoch(train)  [2][ 10/300]  base_lr: 1.0000e-05 lr: 1.0000e-05  eta: 1:02:03  time: 0.8291  '
     'memory: 3  loss: 25.6350  d0.loss_cls: 0.1',
     dict(mode='train', epoch=2, done=10, total=300, eta='1:02:03', loss='25.6350')),
    ('Epoch(train) [12][300/300]  lr: 1.0000e-05  eta: 2 days, 1:02:03  time: 0.8  loss: 2.6350',
     dict(mode='train', epoch=12, done=300, total=300, eta='2 days, 1:02:03', loss='2.6350')),
    ('Iter(train) [  10/4000]  lr: 1.0000e-05  eta: 0:02:03  time: 0.8291  loss: nan',
     dict(mode='train', epoch=None, done=10, total=4000, eta='0:02:03', loss='nan')),
    ('Epoch(val)  [1][13/13]    coco/bbox_mAP: 0.2570  coco/bbox_mAP_50: 0.3340  time: 0.63',
     dict(mode='val', epoch=1, done=13, total=13, eta=None, loss=None)),
    ('Epoch(test) [10/13]    eta: 0:00:02  time: 0.6747  data_time: 0.0337  ',
     dict(mode='test', epoch=None, done=10, total=13, eta='0:00:02', loss=None)),
])
def test_progress_in_a_line_of_mmengine(line, expected):
    progress = parse_progress(PREFIX + line + '\n')
    values = progress.pop('values')
    assert dict(progress, loss=values.get('loss')) == expected
    if expected['mode'] == 'val':
        assert values['coco/bbox_mAP'] == '0.2570' and values['coco/bbox_mAP_50'] == '0.3340'


@pytest.mark.parametrize('line', ['', 'Exp name: x', 'backbone.stem.weight - torch.Size([3, 3])'])
def test_other_lines(line):
    assert parse_progress(PREFIX + line) is None


def test_a_terminal_shows_progress_in_place(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(sys.stdout, 'isatty', lambda: True, raising=False)
    config = tmp_path / 'config.py'
    config.write_text("custom_imports = dict(imports=['not.there'])\n"
                      'train_cfg = dict(max_epochs=4)')
    show = TrainingProgress(Console(), config, {'coco/bbox_mAP': 'AP', 'coco/bbox_mAP_50': 'AP50'})
    for line in ('Epoch(train)  [2][ 10/300]  lr: 1e-05  eta: 0:10:03  time: 0.82  loss: 9.5',
                 'a line of no interest',
                 'Epoch(val)  [2][10/13]    eta: 0:00:02  time: 0.67',
                 'Epoch(val)  [2][13/13]    coco/bbox_mAP: 0.25  coco/bbox_mAP_50: 0.33'):
        show(PREFIX + line)
    shown = [line.strip() for line in re.split('[\r\n]+', capsys.readouterr().out)]
    assert [line for line in shown if line] == [
        'epoch 2 of 4, iteration 10 of 300, loss 9.5, 0:10:03 of training left',
        'epoch 2 of 4, validation, batch 10 of 13',
        'epoch 2 of 4, loss 9.5: AP 0.25, AP50 0.33']


GOALS = (Goal('AP', 'coco/bbox_mAP', 0.30), Goal('top-1', 'accuracy/top1', 97, '.2f', ' %'))


@pytest.mark.parametrize('values, missing', [
    ((0.3, 97.), None),
    ((0.2996, 97.), 'AP 0.300, to be at least 0.300'),
    ((0.4, 96.994), 'top-1 96.99 %, to be at least 97.00 %'),
    ((float('nan'), 0.), 'AP nan, to be at least 0.300; top-1 0.00 %, to be at least 97.00 %'),
])
def test_goals(values, missing):
    assert judge(GOALS, values) == missing
