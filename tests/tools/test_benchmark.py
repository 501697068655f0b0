"""The command that measures, run as a user runs it."""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

TOOL = Path(__file__).resolve().parents[2] / 'tools' / 'analysis_tools' / 'benchmark.py'


@pytest.fixture
def run(user_project, monkeypatch, capfd):
    """Run the command in this process, which spares the imports; return what it printed."""
    monkeypatch.chdir(user_project)

    def run_tool(*arguments):
        monkeypatch.setattr(sys, 'argv', ['benchmark.py', *map(str, arguments)])
        runpy.run_path(str(TOOL), run_name='__main__')
        return capfd.readouterr().out
    return run_tool


def test_beside_the_authors_code(run, tmp_path):
    output = run('user_classifier.py', '--train', '--batch', 2, '--device', 'cpu', '--repeats', 2,
                 '--against', 'authors', '--channels-last', '--json', tmp_path / 'out.json')
    rows = [line for line in output.splitlines() if line.startswith('| user_classifier |')]
    assert ['channels last' in row for row in rows] == [True, False]
    assert ["| authors' code |" in row for row in rows] == [False, True]
    results = json.loads((tmp_path / 'out.json').read_text())['results']
    assert [len(result['times']) for result in results] == [2, 2]


def test_beside_another_model(run):
    output = run('user_detector.py', '--device', 'cpu', '--repeats', 1, '--against',
                 'user_classifier.py', '--size', 64, 64)
    assert '| user_detector | eager | inference | 1 | 64×64 |' in output
    assert '| user_classifier | eager | inference | 1 | 64×64 |' in output


def test_count(run, tmp_path):
    output = run('xt', '--train', '--batch', 2, '--size', 32, 32, '--count', '--against', 'authors',
                 '--json', tmp_path / 'out.json')
    assert "| operation | xt, eager: kernels | xt, eager: GB | xt, authors' code: ker" in output
    assert '\n| total | ' in output and '\n| convolution | ' in output
    counts = json.loads((tmp_path / 'out.json').read_text())
    assert list(counts) == ['xt, eager', "xt, authors' code"]


def test_pipeline(run, monkeypatch):
    from spartan_mm.analysis import input_speed
    monkeypatch.setattr(input_speed.measure_input, '__defaults__', (0, 0.2, 4))
    output = run('user_detector.py', '--data', '--workers', 0)
    assert '| user_detector | pictures/annotations.json |' in output
    assert '| 3 Resize |' in output


def test_standard_table(tmp_path):
    """A job is measured in a process of its own, and laid out; the others are not measured yet."""
    environment = dict(os.environ, OMP_NUM_THREADS='1', CUDA_VISIBLE_DEVICES='')
    done = subprocess.run([sys.executable, TOOL, '--standard', '--quick', '--only', 'growth',
                           '--out-dir', tmp_path], env=environment, text=True, cwd=tmp_path,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert done.returncode == 0, done.stdout
    assert '[1/1] growth' in done.stdout
    assert {'growth.json', 'growth.png', 'tables.md'} <= set(os.listdir(tmp_path))
    assert len(json.loads((tmp_path / 'growth.json').read_text())) == 4


@pytest.mark.parametrize('arguments, message', [
    (['none.py'], 'error: config none.py does not exist'),
    (['xt', '--batch', '0'], 'error: batch 0 must be at least 1'),
    (['xt', '--train', '--deploy'], 'error: the deploy form cannot be trained'),
    (['xt', '--count', '--amp', 'float16'], 'error: kernels are counted in float32'),
    (['xt', '--parts'], 'error: parts are those of a training step'),
    (['--standard', '--only', 'none'], 'error: --only none is none of backbone_xt_inference'),
    (['--docs', '--out-dir', 'nowhere'], 'error: nowhere holds no results; measure first'),
])
def test_mistakes(run, arguments, message):
    device = ['--device', 'cpu'] if arguments[0][0] != '-' else []
    with pytest.raises(SystemExit) as stopped:
        run(*arguments, *device)
    assert str(stopped.value.code).startswith(message)


@pytest.mark.parametrize('arguments, message', [
    ([], 'give either CONFIG or --standard'),
    (['xt', '--standard'], 'give either CONFIG or --standard'),
    (['xt', '--against-deploy'], 'say how --against CONFIG runs'),
    (['xt', '--threads', '0'], '--threads 0: must be at least 1'),
])
def test_flags_that_do_not_go_together(run, capfd, arguments, message):
    with pytest.raises(SystemExit) as stopped:
        run(*arguments)
    assert stopped.value.code == 2
    assert message in capfd.readouterr().err
