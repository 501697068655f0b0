"""The commands that look into models, on the user's models."""

import json

import pytest

pytest.importorskip('pytorch_grad_cam', reason='grad-cam is not installed')

QUICK = ['--grid', 4, '--pairs', 3, '--contexts', 2, '--orders', 0, 0.5, 1, '--device', 'cpu']


@pytest.fixture
def classifier(user_models):
    """The user's classifier with its weights."""
    return '='.join(user_models['classifier'])


class TestCam:

    def test_two_models(self, run, classifier, tmp_path):
        output = run('cam', 'pictures/1.png', classifier, classifier, '--names', 'a', 'b',
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
        found = run('cam', 'pictures/1.png', classifier, '--out-dir', tmp_path, '--device', 'cpu',
                    *flags, status=2)
        assert message in found
        assert ('--list-layers prints all there are' in found) == (flags[0] == '--layer')

    def test_unreadable_image(self, run, classifier, tmp_path):
        (tmp_path / 'broken.png').write_bytes(b'no image')
        found = run('cam', tmp_path / 'broken.png', classifier, '--out-dir', tmp_path / 'out',
                    '--device', 'cpu', status=1)
        assert 'broken.png cannot be decoded as an image' in found
        assert not (tmp_path / 'out' / 'grid.png').exists()

    def test_several_images(self, run):
        """As a shell writes out a pattern."""
        assert 'b.png is an image where a model was expected' in run(
            'cam', 'a.png', 'b.png', 'model.pth', status=2)

    def test_list_layers(self, run):
        output = run('cam', 'pictures', 'user_classifier.py', '--list-layers')
        assert any(line.split() == ['backbone.stages.2', 'Stage', '(1,', '24,', '2,', '2)']
                   for line in output.splitlines())


class TestReceptiveField:

    def test_two_models(self, run, classifier, tmp_path):
        output = run('receptive-field', 'pictures', classifier, 'user_classifier.py', '--random',
                     '--size', 64, '--images', 2, '--out-dir', tmp_path, '--device', 'cpu')
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

    @pytest.mark.parametrize('flags, message', [
        (['--names', 'a', 'b', '--layer', 'backbone.stages.1', 'backbone.stage.1'],
         "error: b: ImageClassifier has no layer 'backbone.stage.1'; it has: backbone.stages.1"),
        ([], 'error: two models are called own_classifier: give each a name with --names'),
        (['--names', 'a'], 'error: --names: 1 names for 2 models'),
        (['--layer', 'a', 'b', 'c'], 'error: --layer: 3 layers for 2 models'),
        (['--names', 'a', 'b', '--size', 1], 'error: a: the model does not run on images of 1×1: '),
    ])
    def test_mistakes_are_found_before_anything_is_measured(self, run, classifier, monkeypatch,
                                                            flags, message):
        monkeypatch.setattr('spartan_mm.analysis.look_inside.receptive_field.measure_field', None)
        assert message in run('receptive-field', 'pictures', classifier, classifier, '--device',
                              'cpu', *flags, status=2)


class TestInteractions:

    def test_curves(self, run, tmp_path, monkeypatch):
        out = tmp_path / 'out'
        output = run('interactions', 'classes', 'user_classifier.py', '--random', *QUICK,
                     '--out-dir', out, '--images', 2, '--target', 'true')
        assert 'cost: 48 masked images' in output and 'for images × models = 2 × 1' in output
        assert 's for each image' in output
        assert (out / 'interaction_order.png').stat().st_size > 5000

        monkeypatch.setattr('spartan_mm.commands.interactions.write_figure', lambda *_: None)
        # One more image and one more model are all that is measured.
        run('interactions', 'classes', 'user_classifier.py', 'user_classifier.py', '--names',
            'user_classifier', 'again', '--random', *QUICK, '--out-dir', out, '--images', 3,
            '--target', 'true')
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

        assert 'contexts 2 instead of 5' in run(
            'interactions', 'classes', 'user_classifier.py', '--random', *QUICK, '--out-dir', out,
            '--contexts', 5, '--target', 'true', status=2)

    @pytest.mark.parametrize('arguments, message', [
        (['user_detector.py'], 'no classifier'),
        (['user_classfier.py'], 'config user_classfier.py does not exist'),
        (['user_classifier.py', '--grid', 1], 'grid=1'),
        (['user_classifier.py', '--grid', 33], 'grid of 33×33'),
        (['user_classifier.py'] * 2, 'two models are called'),
    ])
    def test_errors(self, run, tmp_path, arguments, message):
        assert message in run('interactions', 'classes', *arguments, '--random', '--out-dir',
                              tmp_path / 'out', '--device', 'cpu', '--pairs', 1, '--contexts', 1,
                              status=2)


class TestSpectra:

    def test_classifier(self, run, tmp_path):
        output = run('spectra', 'pictures', 'user_classifier.py', '--random', '--out-dir', tmp_path,
                     '--images', 3, '--device', 'cpu')
        assert 'stage 1, ' in output and 'smixer low-frequency branch' in output
        assert (tmp_path / 'spectra.png').stat().st_size > 5000
        record = json.loads((tmp_path / 'spectra.json').read_text())
        assert record['random_weights'] is True and record['images'] == 3
        assert 0 < record['stages'][0]['cmixer']['modulated wave']['share_above_half_nyquist'] < 1

    def test_detector(self, run, tmp_path, monkeypatch):
        monkeypatch.setattr('spartan_mm.commands.spectra.write_figure', lambda *_: None)
        output = run('spectra', 'pictures', 'user_detector.py', '--random', '--out-dir', tmp_path,
                     '--images', 1, '--device', 'cpu')
        assert 'stage 1, 16×16: ' in output and 'cmixer refined wave' in output

    def test_no_spartan(self, run, tmp_path):
        assert 'has no SpaRTAN' in run(
            'spectra', 'pictures', 'timm:test_resnet', '--random', '--out-dir', tmp_path,
            '--device', 'cpu', status=2)


COMMANDS = ['cam', 'receptive-field', 'spectra', 'interactions']


@pytest.mark.parametrize('command', COMMANDS)
@pytest.mark.parametrize('flags, status, message', [
    (['--device', 'gpu'], 2,
     "error: device 'gpu': torch cannot use it here; take one such as 'cpu'"),
    (['--device', 'cuda:99'], 2, "error: device 'cuda:99': torch finds "),
    (['--out-dir', 'pictures/1.png'], 1, '1.png is a file, not a folder; name another place')])
def test_device_and_place(run, classifier, command, flags, status, message):
    assert message in run(command, 'pictures', classifier, '--device', 'cpu', *flags, status=status)


@pytest.mark.parametrize('command', COMMANDS)
@pytest.mark.parametrize('images, status, message', [
    ('pictures', 2, 'error: user_classifier.py is a model without weights'),
    ('nowhere', 1, 'nowhere does not exist')])
def test_no_weights_and_no_images(run, tmp_path, command, images, status, message):
    assert message in run(command, images, 'user_classifier.py', '--out-dir', tmp_path, '--device',
                          'cpu', status=status)


def test_what_is_no_picture(run, tmp_path):
    assert 'cannot be decoded' in run('spectra', 'pictures/annotations.json', 'user_classifier.py',
                                      '--random', '--out-dir', tmp_path, status=1)
