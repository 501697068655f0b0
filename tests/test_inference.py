"""Images, folders and videos in; pictures and JSON out."""

import json
import shutil

import cv2
import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope

from spartan_mm.engine.checkpoint import CheckpointError
from spartan_mm.inference import (
    Detections,
    Detector,
    InputError,
    draw_detections,
    find_source,
    infer,
)


@pytest.fixture(scope='module')
def checkpoint(user_project):
    """An untrained detector of the user, as a checkpoint with class names."""
    torch.manual_seed(0)
    with DefaultScope.overwrite_default_scope('mmdet'):
        model = MODELS.build(Config.fromfile(user_project / 'user_detector.py').model)
    path = user_project / 'untrained.pth'
    torch.save(dict(state_dict=model.state_dict(),
                    meta=dict(dataset_meta=dict(classes=('box', 'ball')))), path)
    return str(path)


@pytest.fixture(scope='module')
def detector(user_project, checkpoint):
    return Detector(str(user_project / 'user_detector.py'), checkpoint, device='cpu')


@pytest.fixture
def pictures(user_project, tmp_path):
    """The user's pictures, one of them in a subfolder."""
    folder = tmp_path / 'pictures'
    shutil.copytree(user_project / 'pictures', folder)
    (folder / 'süb folder').mkdir()
    (folder / '3.png').rename(folder / 'süb folder' / 'drei 3.png')
    return folder


def read_results(folder):
    return json.loads((folder / 'results.json').read_text(encoding='utf-8'))


def read_picture(path):
    return cv2.imdecode(np.frombuffer(path.read_bytes(), np.uint8), cv2.IMREAD_COLOR)


class TestDetector:

    def test_equals_the_test_of_the_config(self, user_project, detector):
        """As mmdet's own way from the file through the config's pipeline."""
        from mmdet.apis import inference_detector
        path = user_project / 'pictures' / '2.png'
        detector.model.cfg = Config.fromfile(user_project / 'user_detector.py')
        with DefaultScope.overwrite_default_scope('mmdet'):
            expected = inference_detector(detector.model, str(path)).pred_instances
        found, = detector.detect([detector.read(path)])
        assert len(found.scores) == 20
        torch.testing.assert_close(torch.from_numpy(found.boxes), expected.bboxes)
        torch.testing.assert_close(torch.from_numpy(found.labels), expected.labels)
        torch.testing.assert_close(torch.from_numpy(found.scores), expected.scores)

    def test_class_names(self, detector, user_project, checkpoint, tmp_path):
        assert detector.classes == ('box', 'ball')
        content = torch.load(checkpoint)
        torch.save(content['state_dict'], tmp_path / 'bare.pth')
        bare = Detector(str(user_project / 'user_detector.py'), str(tmp_path / 'bare.pth'), 'cpu')
        assert bare.classes == ('square', 'disc')

    def test_classifier(self, user_project, checkpoint):
        with pytest.raises(InputError, match="describes no detector .*'mmpretrain'"):
            Detector(str(user_project / 'user_classifier.py'), checkpoint)

    def test_other_architecture(self, user_project, checkpoint, tmp_path):
        config = Config.fromfile(user_project / 'user_detector.py')
        config.model.bbox_head.num_classes = 3
        config.dump(tmp_path / 'three.py')
        with pytest.raises(CheckpointError, match=r'does not fit .* RTDETR: .* of another shape'):
            Detector(str(tmp_path / 'three.py'), checkpoint)

    def test_no_config(self, checkpoint):
        with pytest.raises(FileNotFoundError, match='config none.py does not exist'):
            Detector('none.py', checkpoint)


class TestImages:

    @pytest.mark.parametrize('batch_size', [1, 3])
    def test_folder(self, detector, pictures, tmp_path, batch_size):
        out = tmp_path / 'out'
        (pictures / 'broken.jpg').write_text('no picture')
        report = infer(detector, find_source(pictures, out), out, 0., batch_size)

        names = ['0.png', '1.png', '2.png', 'süb folder/drei 3.png']
        results = read_results(out)
        assert [result['file'] for result in results['results']] == names
        assert list(results['failures']) == list(report.failures) == ['broken.jpg']
        assert 'broken.jpg cannot be decoded' in results['failures']['broken.jpg']
        assert results['classes'] == ['box', 'ball']
        for result in results['results']:
            picture = read_picture(out / result['file'])
            original = read_picture(pictures / result['file'])
            assert picture.shape == original.shape == (result['height'], result['width'], 3)
            assert (picture != original).any()
            assert len(result['detections']) == 20

    def test_results_are_those_of_the_detector(self, detector, pictures, tmp_path):
        found, = detector.detect([detector.read(pictures / '1.png')])
        threshold = float(found.scores[4])
        report = infer(detector, find_source(pictures / '1.png', tmp_path), tmp_path, threshold)
        detections = report.results[0]['detections']
        assert len(detections) == 5
        best = detections[0]
        assert best['bbox'] == pytest.approx(found.boxes[0].tolist(), abs=0.01)
        assert best['score'] == pytest.approx(found.scores[0], abs=1e-4)
        assert best['class_name'] == ('box', 'ball')[best['label']]

    def test_earlier_results_are_no_input(self, pictures):
        out = pictures / 'out'
        out.mkdir()
        shutil.copy(pictures / '0.png', out)
        assert len(find_source(pictures, out).images) == 4
        assert len(find_source(pictures, pictures.parent).images) == 5

    @pytest.mark.parametrize('path, out, message', [
        ('none.jpg', 'out', r'none\.jpg does not exist'),
        ('empty', 'out', r'folder .*empty holds no images \(\.bmp'),
        ('pictures', 'pictures', 'would overwrite the input'),
        ('pictures/0.png', 'pictures', 'would overwrite the input'),
    ])
    def test_mistakes(self, pictures, tmp_path, path, out, message):
        (tmp_path / 'empty').mkdir()
        with pytest.raises(InputError, match=message):
            find_source(tmp_path / path, tmp_path / out)


class TestVideo:

    @pytest.fixture
    def video(self, tmp_path):
        path = tmp_path / 'a film.avi'
        writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*'MJPG'), 10, (96, 64))
        for grey in range(0, 250, 50):
            writer.write(np.full((64, 96, 3), grey, np.uint8))
        writer.release()
        return path

    def test_video(self, detector, video, tmp_path):
        out = tmp_path / 'out'
        infer(detector, find_source(video, out), out, 0., batch_size=2)
        results = read_results(out)['results']
        assert [result['frame'] for result in results] == [0, 1, 2, 3, 4]
        assert {(result['file'], result['width'], result['height']) for result in results} == {
            ('a film.avi', 96, 64)}
        written = cv2.VideoCapture(str(out / 'a film.mp4'))
        assert written.get(cv2.CAP_PROP_FRAME_COUNT) == 5
        assert written.get(cv2.CAP_PROP_FPS) == pytest.approx(10)

    def test_broken_video(self, detector, tmp_path):
        (tmp_path / 'broken.mp4').write_text('no film')
        source = find_source(tmp_path / 'broken.mp4', tmp_path / 'out')
        with pytest.raises(InputError, match=r'broken\.mp4 cannot be opened as a video'):
            infer(detector, source, tmp_path / 'out')


class TestDrawing:

    def test_draws_on_a_copy_and_only_near_the_box(self):
        image = np.full((100, 100, 3), 128, np.uint8)
        found = Detections(np.array([[20., 40., 60., 80.]]), np.array([1]), np.array([0.9]))
        drawn = draw_detections(image, found, ('a', 'b'))
        assert (image == 128).all()
        assert (drawn[40, 20:61] != 128).any(axis=1).all()
        assert (drawn[45:75, 25:55] == 128).all()
        assert (drawn[82:] == 128).all()

    @pytest.mark.parametrize('box', [
        [-50., -50., 200., 200.], [90., 0., 99., 5.], [5., 5., 5., 5.],
    ], ids=str)
    def test_any_box(self, box):
        image = np.zeros((100, 100, 3), np.uint8)
        found = Detections(np.array([box]), np.array([7]), np.array([1.]))
        assert draw_detections(image, found, ('a', )).any()

    def test_nothing_found(self):
        image = np.zeros((10, 10, 3), np.uint8)
        found = Detections(np.zeros((0, 4)), np.zeros(0, int), np.zeros(0))
        assert (draw_detections(image, found, ()) == image).all()
