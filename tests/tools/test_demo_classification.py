"""The classifier's demo runs through, and says what it did; the rest is tested with the other."""

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

from spartan_mm.analysis.mistakes.predictions import read_outcomes
from spartan_mm.analysis.report.curves import read_log

DEMO = Path(__file__).parents[2] / 'tools' / 'demo_classification.py'


def run(*arguments, cwd):
    return subprocess.run(
        [sys.executable, str(DEMO), *map(str, arguments)], cwd=cwd, text=True,
        capture_output=True, timeout=300, env=dict(os.environ, OMP_NUM_THREADS='1'))


def test_quick_demo(tmp_path):
    work_dir = tmp_path / 'out'
    result = run('--quick', '--work-dir', work_dir, '--data-root', 'data/digits', cwd=tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr

    lines = result.stdout.splitlines()
    assert lines[-1] == f'Everything lies in {work_dir}'
    assert len(lines) < 40
    assert [line.split()[2].rpartition('/')[2] for line in lines if line.startswith('$ ')] == [
        'train.py', 'test.py', 'infer.py', 'report.py']
    assert '1438 digits to learn from and 359 held out' in result.stdout
    assert re.search(r'^epoch 1 of 1, loss \d+\.\d+: top-1 \S+$', result.stdout, re.M)

    # What is said at the end is what was measured.
    top1 = float(re.search(r'^top-1 (\S+) % on 16 digits that were held out$', result.stdout,
                           re.M)[1])
    outcomes = read_outcomes(work_dir / 'evaluation' / 'predictions.pkl')
    assert len(outcomes) == 16 and outcomes.scores.shape == (16, 10)
    assert top1 == pytest.approx(100 * (outcomes.predicted == outcomes.truths).mean(), abs=5e-3)
    assert 'BELOW THE BAR' in result.stdout and 'no error with --quick' in result.stdout

    log = read_log(work_dir)
    assert [record['step'] for record in log.train] == [1, 2]
    assert len(log.evaluation('accuracy/top1')[1]) == 1
    for name in ('curves.png', 'confusion.png', 'mistakes.png'):
        with Image.open(work_dir / name) as image:
            assert min(image.size) > 300 and len(image.convert('RGB').getcolors(1 << 24)) > 20
    content = json.loads((work_dir / 'classified' / 'results.json').read_text())
    assert len(content['results']) == len(list((work_dir / 'classified').glob('*.png'))) == 8
    assert content['classes'] == list('0123456789')
    assert all(len(result['predictions']) == 5 for result in content['results'])
    report = (work_dir / 'report.html').read_text(encoding='utf-8')
    assert f'{top1:.2f} %' in report and 'class="missing"' not in report


def test_a_folder_of_something_else_is_not_replaced(tmp_path):
    (tmp_path / 'data').mkdir()
    (tmp_path / 'data' / 'mine.txt').write_text('mine')
    result = run('--quick', '--work-dir', tmp_path / 'out', '--data-root', tmp_path / 'data',
                 cwd=tmp_path)
    assert result.returncode == 1
    assert f'error: the data cannot be made: {tmp_path / "data"} is there' in result.stderr


@pytest.mark.parametrize('top1, quick, code', [(97., False, 0), (96.99, False, 3), (9., True, 0)])
def test_verdict(top1, quick, code, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, 'path', sys.path[:])
    monkeypatch.setenv('OMP_NUM_THREADS', '1')
    handler = signal.getsignal(signal.SIGTERM)
    demo = runpy.run_path(str(DEMO))
    monkeypatch.setattr(demo['Demo'], 'run', lambda self: (top1, ))
    monkeypatch.setattr(sys, 'argv', ['demo.py', *(['--quick'] if quick else [])])
    try:
        assert demo['main']() == code
    finally:
        signal.signal(signal.SIGTERM, handler)
    output = capsys.readouterr().out
    assert ('The bar, top-1 97.00 %, is reached' in output) == (top1 >= 97)
    assert ('BELOW THE BAR: top-1' in output) == (top1 < 97)
