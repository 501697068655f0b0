"""The commands that show what models look at, run in this process on the user's models."""

import json
import runpy
import sys
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope

pytest.importorskip('pytorch_grad_cam', reason='grad-cam is not installed')

TOOLS = Path(__file__).resolve().parents[2] / 'tools' / 'analysis_tools'


@pytest.fixture
def run(user_project, monkeypatch, capfd):
    """Run a command in the user's folder; return what it printed."""
    monkeypatch.chdir(user_project)
    monkeypatch.setattr(sys, 'path', sys.path[:])

    def run_tool(name, *arguments):
        monkeypatch.setattr(sys, 'argv', [name, *map(str, arguments)])
        runpy.run_path(str(TOOLS / name), run_name='__main__')
        return capfd.readouterr().out

    return run_tool


@pytest.fixture(scope='module')
def classifier(user_project):
    """The user's classifier, untrained, with its weights."""
    config = user_project / 'user_classifier.py'
    torch.manual_seed(0)
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        model = MODELS.build(Config.fromfile(config).model)
    torch.save(dict(state_dict=model.state_dict()), user_project / 'mapped.pth')
    return 'user_classifier.py=mapped.pth'


def exit_message(run, *arguments):
    with pytest.raises(SystemExit) as leaving:
        run(*arguments)
    return str(leaving.value.code)


class TestGradCam:

    def test_two_models(self, run, classifier, tmp_path):
        output = run('grad_cam.py', 'pictures/1.png', classifier, classifier, '--names', 'a', 'b',
                     '--layer', 'backbone.stages.1', 'backbone.stages.0', '--out-dir', tmp_path,
                     '--device', 'cpu')
        assert f'1 images explained; see {tmp_path}' in output
        assert {file.name for file in tmp_path.iterdir()} == {
            '1-a.png', '1-b.png', 'grid.png', 'results.json'}
        results = json.loads((tmp_path / 'results.json').read_text())['results']
        assert [item['layer'] for item in results] == ['backbone.stages.1', 'backbone.stages.0']

    @pytest.mark.parametrize('flags, message', [
        (('--layer', 'backbone.stage.1'),
         "error: ImageClassifier has no layer 'backbone.stage.1'; it has: backbone.stages.1, "),
        (('--class', 'ring'), "error: there is no class 'ring'"),
        (('--layer', 'neck'), 'error: layer neck cannot be explained')])
    def test_errors(self, run, classifier, tmp_path, flags, message):
        found = exit_message(run, 'grad_cam.py', 'pictures/1.png', classifier, '--out-dir',
                             tmp_path, '--device', 'cpu', *flags)
        assert found.startswith(message)

    def test_no_checkpoint(self, run, tmp_path):
        found = exit_message(run, 'grad_cam.py', 'pictures', 'user_classifier.py', '--out-dir',
                             tmp_path)
        assert found.startswith('error: user_classifier.py is a model without weights')

    def test_unreadable_image(self, run, classifier, tmp_path):
        (tmp_path / 'broken.png').write_bytes(b'no image')
        found = exit_message(run, 'grad_cam.py', tmp_path / 'broken.png', classifier, '--out-dir',
                             tmp_path / 'out', '--device', 'cpu')
        assert 'broken.png cannot be decoded as an image' in found
        assert not (tmp_path / 'out' / 'grid.png').exists()

    def test_several_images(self, run, capfd):
        """As a shell writes out a pattern."""
        assert exit_message(run, 'grad_cam.py', 'a.png', 'b.png', 'model.pth') == '2'
        assert 'b.png is an image where a model was expected' in capfd.readouterr().err

    def test_list_layers(self, run):
        output = run('grad_cam.py', 'pictures', 'user_classifier.py', '--list-layers')
        assert any(line.split() == ['backbone.stages.2', 'Stage', '(1,', '24,', '2,', '2)']
                   for line in output.splitlines())


class TestEffectiveReceptiveField:

    def test_two_models(self, run, classifier, tmp_path):
        output = run('effective_receptive_field.py', 'pictures', classifier, 'user_classifier.py',
                     '--random', '--size', 64, '--num-images', 2, '--out-dir', tmp_path,
                     '--device', 'cpu')
        content = json.loads((tmp_path / 'effective_receptive_field.json').read_text())
        assert (content['images'], content['size']) == (2, 64)
        trained, random = content['models']
        assert [trained['random_weights'], random['random_weights']] == [False, True]
        assert trained['layer'] == 'backbone.stages.3'
        sides = list(trained['sides'].values())
        assert list(trained['sides']) == ['0.2', '0.3', '0.5', '0.99']
        assert sides == sorted(sides) and 1 <= sides[0] and sides[-1] <= 64
        assert 'user_classifier (random weights), backbone.stages.3: 20 %: ' in output
        assert (tmp_path / 'effective_receptive_field.png').is_file()

    def test_mistakes_are_found_before_anything_is_measured(self, run, classifier, monkeypatch):
        monkeypatch.setattr('spartan_mm.analysis.receptive_field.measure_field', None)
        for flags, message in (
                (('--names', 'a', 'b', '--layer', 'backbone.stages.1', 'backbone.stage.1'),
                 "error: ImageClassifier has no layer 'backbone.stage.1'"),
                ((), 'error: two models are called user_classifier'),
                (('--names', 'a', 'b', '--size', 1), 'error: a: the model does not run on images '
                                                     'of 1×1: ')):
            found = exit_message(run, 'effective_receptive_field.py', 'pictures', classifier,
                                 classifier, '--device', 'cpu', *flags)
            assert found.startswith(message)

    def test_no_checkpoint(self, run):
        found = exit_message(run, 'effective_receptive_field.py', 'pictures', 'user_classifier.py')
        assert found.startswith('error: user_classifier.py is a model without weights')

    def test_unknown_layer(self, run, classifier):
        found = exit_message(run, 'effective_receptive_field.py', 'pictures', classifier,
                             '--layer', 'stages.1', '--device', 'cpu')
        assert "error: ImageClassifier has no layer 'stages.1'; it has: backbone.stages.1" in found


@pytest.mark.parametrize('tool', ['grad_cam', 'effective_receptive_field', 'spectra',
                                  'interaction_order'])
@pytest.mark.parametrize('flags, message', [
    (('--device', 'gpu'), "error: device 'gpu': torch cannot use it here; take one such as 'cpu'"),
    (('--device', 'cuda:99'), "error: device 'cuda:99': torch finds "),
    (('--out-dir', 'pictures/1.png'), '1.png is a file, not a folder; name another place')])
def test_device_and_place(run, classifier, tool, flags, message):
    found = exit_message(run, f'{tool}.py', 'pictures', classifier, '--device', 'cpu', *flags)
    assert message in found
