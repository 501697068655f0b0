"""The demos run through, say what they did, and do not call a failure a success."""

import json
import os
import re
import signal
import sys

import pytest
from mmengine import fileio
from PIL import Image

from spartan_mm import demo as demos
from spartan_mm.analysis.report.curves import read_log
from spartan_mm.demo import ClassifierDemo, DetectorDemo, Progress, main, run_process
from spartan_mm.text import Console

COMMANDS = ['train.py', 'test.py', 'infer.py', 'report.py']


# ------------------------------------------------------------------------------------- the whole


def check_output(demo, most_lines):
    """No more than the commands, the progress and the results; nothing of mmengine's log."""
    assert demo.status == 0, demo.stdout + demo.stderr
    lines = demo.stdout.splitlines()
    assert lines[-1] == f'Everything lies in {demo.work_dir}'
    assert len(lines) < most_lines
    assert [line.split()[2].rpartition('/')[2] for line in lines
            if line.startswith('$ ')] == COMMANDS
    assert 'BELOW THE BAR' in demo.stdout and 'no error with --quick' in demo.stdout


def check_files(demo, suffix, count):
    """The log, a picture for each that was inferred, and a report of everything."""
    log = read_log(demo.work_dir)
    assert [record['step'] for record in log.train] == [1, 2]
    assert len(log.evaluations) == 1
    content = json.loads((demo.work_dir / 'inferred' / 'results.json').read_text())
    pictures = list((demo.work_dir / 'inferred').glob(f'*{suffix}'))
    assert len(content['results']) == len(pictures) == count
    for path in pictures:
        with Image.open(path) as image:
            assert len(image.convert('RGB').getcolors(1 << 24)) > 20
    report = (demo.work_dir / 'report.html').read_text(encoding='utf-8')
    assert 'class="missing"' not in report
    return content, report


@pytest.mark.slow
class TestDetector:

    @pytest.fixture
    def demo(self, quick_demo):
        return quick_demo(DetectorDemo)

    def test_output(self, demo):
        check_output(demo, 50)
        assert re.search(r'^epoch 1, loss \d+\.\d+: AP \S+, AP50 \S+$', demo.stdout, re.M)
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
        _, report = check_files(demo, '.jpg', 4)
        assert report.count('detected: ') == 4


@pytest.mark.slow
class TestClassifier:

    @pytest.fixture
    def demo(self, quick_demo):
        return quick_demo(ClassifierDemo)

    @pytest.fixture
    def top1(self, demo):
        return float(re.search(r'^top-1 (\S+) % on 16 digits that were held out$', demo.stdout,
                               re.M)[1])

    def test_output(self, demo):
        check_output(demo, 40)
        assert '1438 digits to learn from and 359 held out' in demo.stdout
        assert re.search(r'^epoch 1, loss \d+\.\d+: top-1 \S+$', demo.stdout, re.M)

    def test_what_is_said_at_the_end_is_what_was_measured(self, demo, top1):
        samples = fileio.load(demo.work_dir / 'evaluation' / 'predictions.pkl')
        assert len(samples) == 16 and samples[0]['pred_score'].shape == (10, )
        right = [int(sample['pred_score'].argmax()) == int(sample['gt_label'])
                 for sample in samples]
        assert top1 == pytest.approx(100 * sum(right) / 16, abs=5e-3)

    def test_files(self, demo, top1):
        content, report = check_files(demo, '.png', 8)
        assert content['classes'] == list('0123456789')
        assert all(len(result['predictions']) == 5 for result in content['results'])
        assert f'{top1:.2f} %' in report


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


def test_a_failing_step_ends_the_demo(restored, monkeypatch, capsys, tmp_path):
    def fail(command, log, show):
        log.write_text('first line\n\nlast\x1b line\n')
        return 7

    monkeypatch.setattr(demos, 'run_process', fail)
    monkeypatch.setattr(DetectorDemo, 'make_data', lambda self: 'data')
    assert main(DetectorDemo, ['--quick', '--work-dir', str(tmp_path / 'out')]) == 1
    output = capsys.readouterr()
    assert output.err == (
        f'error: tools/train.py failed with exit code 7. Its last lines, all in '
        f'{tmp_path}/out/logs/train.log:\n  first line\n  last\\x1b line\n')
    assert 'AP' not in output.out and 'Everything lies in' not in output.out


# ---------------------------------------------------------------------- processes and progress


def test_a_process_is_ended_with_the_demo(tmp_path):
    def interrupt(line):
        pids.append(int(line))
        raise KeyboardInterrupt

    pids = []
    command = [sys.executable, '-c', 'import os, time; print(os.getpid()); time.sleep(100)']
    with pytest.raises(KeyboardInterrupt):
        run_process(command, tmp_path / 'log', interrupt)
    with pytest.raises(ProcessLookupError):
        os.kill(pids[0], 0)


def test_output_and_status_of_a_process(tmp_path):
    lines = []
    code = 'import sys; print("öut"); print("err", file=sys.stderr); sys.exit(3)'
    assert run_process([sys.executable, '-c', code], tmp_path / 'log', lines.append) == 3
    assert lines == ['öut\n', 'err\n']
    assert (tmp_path / 'log').read_text(encoding='utf-8') == 'öut\nerr\n'


PREFIX = '11/20 10:42:01 - mmengine - INFO - '


@pytest.mark.parametrize('lines, shown', [
    (['Epoch(train)  [2][ 10/300]  base_lr: 1.0000e-05 lr: 1.0000e-05  eta: 1:02:03  time: 0.8291  '
      'memory: 3  loss: 25.6350  d0.loss_cls: 0.1'],
     'epoch 2, iteration 10 of 300, loss 25.6350, 1:02:03 left'),
    (['Epoch(train) [12][300/300]  lr: 1.0000e-05  eta: 2 days, 1:02:03  time: 0.8  loss: 2.6350'],
     'epoch 12, iteration 300 of 300, loss 2.6350, 2 days, 1:02:03 left'),
    (['Iter(train) [  10/4000]  lr: 1.0000e-05  time: 0.8291  loss: nan'],
     'iteration 10 of 4000, loss nan'),
    (['Epoch(val)  [2][10/13]    eta: 0:00:02  time: 0.67'], 'epoch 2, val 10 of 13'),
    (['Epoch(train)  [1][1/1]  loss: 9.5',
      'Epoch(val)  [1][13/13]    coco/bbox_mAP: 0.2570  coco/bbox_mAP_50: 0.3340  time: 0.63'],
     'epoch 1, loss 9.5: AP 0.2570, AP50 0.3340'),
    (['Epoch(test) [10/13]    eta: 0:00:02  time: 0.6747  data_time: 0.0337  '],
     'test 10 of 13'),
    (['', 'Exp name: x', 'backbone.stem.weight - torch.Size([3, 3])'], '')])
def test_a_terminal_shows_progress_in_place(lines, shown, monkeypatch, capsys):
    monkeypatch.setattr(sys.stdout, 'isatty', lambda: True, raising=False)
    progress = Progress(Console(), {'coco/bbox_mAP': 'AP', 'coco/bbox_mAP_50': 'AP50'})
    for line in lines:
        progress(f'11/20 10:42:01 - mmengine - INFO - {line}\n')
    assert re.split('[\r\n]+', capsys.readouterr().out.strip())[-1].strip() == shown
