"""The demo runs through, says what it did, and does not call a failure a success."""

import json
import os
import re
import runpy
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from spartan_mm.analysis.report.curves import read_log

DEMO = Path(__file__).parents[2] / 'tools' / 'demo.py'


@pytest.fixture
def demo(monkeypatch, tmp_path):
    """The names of the demo, and what it changes in the process restored."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, 'path', sys.path[:])
    handler = signal.getsignal(signal.SIGTERM)
    yield runpy.run_path(str(DEMO))
    signal.signal(signal.SIGTERM, handler)


def run(*arguments, cwd):
    return subprocess.run(
        [sys.executable, str(DEMO), *map(str, arguments)], cwd=cwd, text=True,
        capture_output=True, timeout=300, env=dict(os.environ, OMP_NUM_THREADS='1'))


def test_quick_demo(tmp_path):
    work_dir, data_root = tmp_path / 'out', tmp_path / 'data' / 'digits'
    result = run('--quick', '--work-dir', work_dir, '--data-root', 'data/digits', cwd=tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr

    lines = result.stdout.splitlines()
    assert lines[-1] == f'Everything lies in {work_dir}'
    # The commands, the progress and the whole table; nothing of mmengine's hundreds of lines.
    assert len(lines) < 50
    assert [line.split()[2].rpartition('/')[2] for line in lines if line.startswith('$ ')] == [
        'train.py', 'test.py', 'infer.py', 'report.py']
    assert re.search(r'^epoch 1 of 1, loss \d+\.\d+: AP \S+, AP50 \S+$', result.stdout, re.M)
    table = [line for line in lines if line.startswith('Average ')]
    assert len(table) == 12 and 'maxDets=100' in table[0]
    assert 'digits, train' in result.stderr

    # What is said at the end is what was measured.
    ap, ap50 = map(float, re.search(r'^AP (\S+), AP50 (\S+) on 4 validation pictures$',
                                    result.stdout, re.M).groups())
    [report] = (work_dir / 'evaluation').glob('*/*.json')
    metrics = json.loads(report.read_text())
    assert [ap, ap50] == pytest.approx([metrics['coco/bbox_mAP'], metrics['coco/bbox_mAP_50']],
                                       abs=5e-4)
    assert [float(line.split('=')[-1]) for line in table[:2]] == [ap, ap50]
    assert 'BELOW THE BAR' in result.stdout and 'no error with --quick' in result.stdout

    assert len(list((data_root / 'train').iterdir())) == 8
    run_log = read_log(work_dir)
    assert [record['step'] for record in run_log.train] == [1, 2]
    assert len(run_log.evaluations) == 1
    for name in ('curves.png', 'gallery.png'):
        with Image.open(work_dir / name) as image:
            assert min(image.size) > 500 and len(image.convert('RGB').getcolors(1 << 24)) > 20
    results = json.loads((work_dir / 'detections' / 'results.json').read_text())
    assert len(results['results']) == len(list((work_dir / 'detections').glob('*.jpg'))) == 4
    report = (work_dir / 'report.html').read_text(encoding='utf-8')
    assert report.count('detected: ') == 4 and 'class="missing"' not in report


def test_a_failing_step_ends_the_demo(tmp_path):
    result = run('--quick', '--work-dir', tmp_path / 'out', '--data-root', tmp_path / 'data',
                 '--cfg-options', 'model.num_queries=[60,1', cwd=tmp_path)
    assert result.returncode == 1
    assert 'error: tools/train.py failed with exit code 1' in result.stderr
    assert 'Imbalanced brackets exist in [60,1' in result.stderr
    assert str(tmp_path / 'out' / 'logs') in result.stderr
    assert 'AP' not in result.stdout and 'Everything lies in' not in result.stdout


def test_a_folder_of_something_else_is_not_replaced(tmp_path):
    (tmp_path / 'data').mkdir()
    (tmp_path / 'data' / 'mine.txt').write_text('mine')
    result = run('--quick', '--work-dir', tmp_path / 'out', '--data-root', tmp_path / 'data',
                 cwd=tmp_path)
    assert result.returncode == 1
    assert f'error: the data cannot be made: {tmp_path / "data"} is there' in result.stderr
    assert (tmp_path / 'data' / 'mine.txt').read_text() == 'mine'


def test_a_path_that_mmengine_would_change_is_refused(demo, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(sys, 'argv', ['demo.py', '--data-root', str(tmp_path / 'my data')])
    with pytest.raises(SystemExit) as error:
        demo['main']()
    assert error.value.code == 2
    assert 'my data: mmengine cannot take a path with blanks' in capsys.readouterr().err


def test_an_option_without_a_value_is_refused(demo, monkeypatch, capsys):
    monkeypatch.setattr(sys, 'argv', ['demo.py', '--cfg-options', 'model.num_queries'])
    with pytest.raises(SystemExit) as error:
        demo['main']()
    assert error.value.code == 2
    assert 'model.num_queries must be KEY=VALUE' in capsys.readouterr().err


@pytest.mark.parametrize('ap, ap50, quick, code', [
    (0.30, 0.55, False, 0),
    (0.299, 0.55, False, 3),
    (0.30, 0.549, False, 3),
    (float('nan'), 0.9, False, 3),
    (-1., -1., False, 3),
    (0.1, 0.1, True, 0),
])
def test_verdict(ap, ap50, quick, code, demo, monkeypatch, capsys):
    monkeypatch.setattr(demo['Demo'], 'run', lambda self: (ap, ap50))
    monkeypatch.setattr(sys, 'argv', ['demo.py', *(['--quick'] if quick else [])])
    assert demo['main']() == code
    lines = capsys.readouterr().out.splitlines()
    reached = ap >= 0.30 and ap50 >= 0.55
    assert any('BELOW THE BAR' in line for line in lines) != reached
    assert any('is reached' in line for line in lines) == reached
    assert lines[-1].startswith('Everything lies in ')


def test_interrupted(demo, monkeypatch, capsys):
    def interrupt(self):
        raise KeyboardInterrupt

    monkeypatch.setattr(demo['Demo'], 'run', interrupt)
    monkeypatch.setattr(sys, 'argv', ['demo.py', '--quick'])
    assert demo['main']() == 130
    assert capsys.readouterr().err.strip() == 'interrupted'
