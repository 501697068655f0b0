"""The command that shows spectra, run as a user runs it."""

import json
import runpy
import sys
from pathlib import Path

import pytest

TOOL = Path(__file__).resolve().parents[2] / 'tools' / 'analysis_tools' / 'spectra.py'


@pytest.fixture
def run(user_project, monkeypatch, capfd):
    """Run the command in this process, which spares the imports; return what it printed."""
    monkeypatch.chdir(user_project)

    def run_tool(*arguments):
        monkeypatch.setattr(sys, 'argv', ['spectra.py', *map(str, arguments), '--device', 'cpu'])
        runpy.run_path(str(TOOL), run_name='__main__')
        return capfd.readouterr().out
    return run_tool


@pytest.mark.parametrize('model', ['user_classifier.py', 'user_detector.py'])
def test_spectra(run, tmp_path, model):
    output = run('pictures', model, '--random', '--out-dir', tmp_path, '--num-images', 3)
    assert 'stage 1, ' in output and 'smixer low-frequency branch' in output
    assert (tmp_path / 'spectra.png').stat().st_size > 5000
    record = json.loads((tmp_path / 'spectra.json').read_text())
    assert record['random_weights'] is True and record['images'] == 3
    assert 0 < record['stages'][0]['cmixer']['modulated wave']['share_above_half_nyquist'] < 1


@pytest.mark.parametrize(('arguments', 'message'), [
    (['pictures', 'user_classifier.py'], 'without weights'),
    (['pictures', 'rtdetr_r18vd', '--random'], 'has no SpaRTAN'),
    (['nowhere', 'user_classifier.py', '--random'], 'nowhere does not exist'),
    (['pictures/annotations.json', 'user_classifier.py', '--random'], 'cannot be decoded'),
])
def test_errors(run, tmp_path, arguments, message):
    with pytest.raises(SystemExit, match=f'error: .*{message}'):
        run(*arguments, '--out-dir', tmp_path)
