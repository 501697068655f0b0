"""The command that measures interactions of patches, run as a user runs it."""

import json
import runpy
import sys
from pathlib import Path

import pytest

TOOL = Path(__file__).resolve().parents[2] / 'tools' / 'analysis_tools' / 'interaction_order.py'
QUICK = ['--grid', 4, '--pairs', 3, '--contexts', 2, '--orders', 0, 0.5, 1, '--device', 'cpu']


@pytest.fixture
def run(user_project, monkeypatch, capfd):
    """Run the command in this process, which spares the imports; return what it printed."""
    monkeypatch.chdir(user_project)

    def run_tool(*arguments):
        monkeypatch.setattr(sys, 'argv', ['interaction_order.py', *map(str, arguments)])
        runpy.run_path(str(TOOL), run_name='__main__')
        return capfd.readouterr().out
    return run_tool


def test_curves(run, tmp_path):
    out = tmp_path / 'out'
    output = run('classes', 'user_classifier.py', '--random', *QUICK, '--out-dir', out,
                 '--num-images', 2, '--target', 'true')
    assert 'cost: 48 masked images' in output and 'for images × models = 2 × 1' in output
    assert 's for each image' in output
    assert (out / 'interaction_order.png').stat().st_size > 5000

    # One more image and one more model are all that is measured.
    run('classes', 'user_classifier.py', 'user_classifier.py', '--names', 'user_classifier',
        'again', '--random', *QUICK, '--out-dir', out, '--num-images', 3, '--target', 'true')
    content = json.loads((out / 'interaction_order.json').read_text())
    assert content['orders'] == [0, 7, 14] and content['cost'] == 3 * 4 * (1 + 2 + 1)
    names = ['user_classifier (random weights)', 'again (random weights)']
    assert list(content['models']) == names
    first, second = (content['models'][name] for name in names)
    assert len(first['images']) == 3
    assert first['curve'] == second['curve']  # of the same seed
    assert sum(first['curve']['relative_strength']) == pytest.approx(3)
    for record in first['images'].values():
        assert record['masked_images'] == 48 and record['seconds'] > 0

    with pytest.raises(SystemExit, match='error: .*contexts 2 instead of 5'):
        run('classes', 'user_classifier.py', '--random', *QUICK, '--out-dir', out, '--contexts', 5,
            '--target', 'true')


@pytest.mark.parametrize(('arguments', 'message'), [
    (['classes', 'user_classifier.py'], 'without weights'),
    (['classes', 'user_detector.py', '--random'], 'no classifier'),
    (['classes', 'user_classfier', '--random'], 'there is no model'),
    (['nowhere', 'user_classifier.py', '--random'], 'nowhere does not exist'),
    (['classes', 'user_classifier.py', '--random', '--grid', 1], 'grid=1'),
    (['classes', 'user_classifier.py', '--random', '--grid', 33], 'grid of 33×33'),
    (['classes', *['user_classifier.py'] * 2, '--random'], 'two models are called'),
])
def test_errors(run, tmp_path, arguments, message):
    with pytest.raises(SystemExit, match=f'error: .*{message}'):
        run(*arguments, '--out-dir', tmp_path / 'out', '--device', 'cpu', '--pairs', 1,
            '--contexts', 1)
