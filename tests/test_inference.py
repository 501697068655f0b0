"""Images, folders and videos in; pictures and JSON out."""

import csv
import io
import json
import os
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope
from PIL import Image

from spartan_mm import cli
from spartan_mm.commands import infer as command
from spartan_mm.datasets.images import take_image
from spartan_mm.errors import CheckpointError, UsageError
from spartan_mm.files import UnwritableError
from spartan_mm.inference import (
    Classification,
    Classifier,
    Detections,
    Detector,
    InputError,
    draw_classification,
    draw_detections,
    find_source,
    infer,
    load_model,
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


@pytest.fixture(scope='module')
def classifier(user_project):
    """An untrained classifier of the user, of seven classes."""
    torch.manual_seed(0)
    config = Config.fromfile(user_project / 'user_classifier.py')
    config.model.head.num_classes = 7
    path = user_project / 'seven_classes.py'
    config.dump(path)
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        model = MODELS.build(config.model)
    torch.nn.init.normal_(model.head.fc.weight)
    names = ('one, eins', 'twö', 'three', 'four', 'five', 'six', 'seven')
    torch.save(dict(state_dict=model.state_dict(), meta=dict(dataset_meta=dict(classes=names))),
               user_project / 'untrained_classifier.pth')
    return load_model(str(path), str(user_project / 'untrained_classifier.pth'), device='cpu')


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

    def test_other_architecture(self, user_project, checkpoint, tmp_path):
        config = Config.fromfile(user_project / 'user_detector.py')
        config.model.bbox_head.num_classes = 3
        config.dump(tmp_path / 'three.py')
        with pytest.raises(CheckpointError, match=r'does not fit .* RTDETR: .* of another shape'):
            Detector(str(tmp_path / 'three.py'), checkpoint)

    @pytest.mark.parametrize('kind, config, message', [
        (Detector, 'user_classifier.py', "describes no detector .*'mmpretrain'"),
        (Classifier, 'user_detector.py', "describes no classifier .*'mmdet'")])
    def test_other_task(self, user_project, checkpoint, kind, config, message):
        with pytest.raises(InputError, match=message):
            kind(str(user_project / config), checkpoint)

    def test_load_model(self, user_project, checkpoint, tmp_path):
        assert isinstance(load_model(str(user_project / 'user_detector.py'), checkpoint, 'cpu'),
                          Detector)
        (tmp_path / 'other.py').write_text("default_scope = 'mmseg'")
        with pytest.raises(InputError, match="neither a detector nor a classifier .*'mmseg', not "
                                             "one of 'mmdet', 'mmpretrain'"):
            load_model(str(tmp_path / 'other.py'), checkpoint)

    def test_no_config(self, checkpoint):
        with pytest.raises(FileNotFoundError, match='config none.py does not exist'):
            Detector('none.py', checkpoint)


class TestClassifier:

    def test_equals_the_test_of_the_config(self, user_project, classifier):
        """As mmpretrain's own way from the file through the config's pipeline."""
        from mmpretrain.apis import ImageClassificationInferencer
        path = user_project / 'pictures' / '2.png'
        assert isinstance(classifier, Classifier)
        with DefaultScope.overwrite_default_scope('mmpretrain'):
            inferencer = ImageClassificationInferencer(
                str(user_project / 'seven_classes.py'),
                str(user_project / 'untrained_classifier.pth'), device='cpu')
            expected = inferencer(str(path))[0]
        found, = classifier.classify([classifier.read(path)])
        assert found.labels[0] == expected['pred_label']
        torch.testing.assert_close(torch.from_numpy(found.scores),
                                   torch.from_numpy(expected['pred_scores'][found.labels]))
        assert len(found.scores) == 7 and (np.diff(found.scores) <= 0).all()

    def test_fewer_classes(self, classifier, pictures, tmp_path):
        infer(classifier, find_source(pictures / '0.png', tmp_path), tmp_path, top=2)
        assert len(read_results(tmp_path)['results'][0]['predictions']) == 2
        infer(classifier, find_source(pictures / '0.png', tmp_path), tmp_path, top=50)
        predictions = read_results(tmp_path)['results'][0]['predictions']
        assert sum(entry['score'] for entry in predictions) == pytest.approx(1, abs=1e-3)

    def test_other_architecture(self, user_project, classifier):
        with pytest.raises(CheckpointError, match=r"does not fit the config's ImageClassifier: .*"
                                                  r'head\.fc\.weight: \(7, 32\) instead of'):
            Classifier(str(user_project / 'user_classifier.py'),
                       str(user_project / 'untrained_classifier.pth'))


class TestBars:

    @pytest.mark.parametrize('shape', [(8, 8), (300, 500), (20, 900), (700, 50)], ids=str)
    @pytest.mark.parametrize('count', [1, 5, 20])
    def test_image_keeps_its_pixels(self, shape, count):
        image = np.random.default_rng(0).integers(0, 255, (*shape, 3), np.uint8)
        found = Classification(np.arange(count), np.linspace(1, 0, count), ('a' * 90, ) * count)
        picture = draw_classification(image, found)
        factor = max(1, 240 // max(shape))
        shown = picture[:shape[0] * factor:factor, :shape[1] * factor:factor]
        assert (shown == image).all()
        assert picture.shape[0] >= max(240, 36 * count)
        # Nothing reaches the edge of the picture.
        assert (picture[:, -4:] == 255).all() and (picture[-2:, shape[1] * factor:] == 255).all()

    def test_bars_are_as_long_as_scores_are_high(self):
        found = Classification(np.array([3, 0]), np.array([0.75, 0.25]))
        picture = draw_classification(np.zeros((240, 240, 3), np.uint8), found)
        coloured = np.ptp(picture[:, 240:].astype(int), axis=2) > 50
        first, second = coloured[:110].sum(1).max(), coloured[110:].sum(1).max()
        assert second > 50 and first == pytest.approx(3 * second, rel=0.05)


class TestImages:

    @pytest.mark.parametrize('batch_size', [1, 3])
    @pytest.mark.parametrize('kind', ['detector', 'classifier'])
    def test_folder(self, request, pictures, tmp_path, kind, batch_size):
        model, out = request.getfixturevalue(kind), tmp_path / 'out'
        (pictures / 'broken.jpg').write_text('no picture')
        report = infer(model, find_source(pictures, out), out, 0., batch_size)

        results = read_results(out)
        assert [result['file'] for result in results['results']] == [
            '0.png', '1.png', '2.png', 'süb folder/drei 3.png']
        assert list(results['failures']) == list(report.failures) == ['broken.jpg']
        assert 'broken.jpg cannot be decoded' in results['failures']['broken.jpg']
        assert results['classes'] == list(model.classes)
        option, other = dict(score_threshold=0.), dict(top=5)
        key, count = 'detections', 20
        if kind == 'classifier':
            option, other, key, count = other, option, 'predictions', 5
        assert option.items() <= results.items() and not other.keys() & results.keys()
        for result in results['results']:
            picture = read_picture(out / result['file'])
            original = read_picture(pictures / result['file'])
            height, width = original.shape[:2]
            assert (height, width) == (result['height'], result['width'])
            if kind == 'detector':
                assert picture.shape == original.shape and (picture != original).any()
            else:
                assert picture.shape[0] >= height and picture.shape[1] > width
            scores = [entry['score'] for entry in result[key]]
            assert len(scores) == count and scores == sorted(scores, reverse=True)
            assert all(results['classes'][entry['label']] == entry['class_name']
                       for entry in result[key])

    def test_results_are_those_of_the_detector(self, detector, pictures, tmp_path):
        found, = detector.detect([detector.read(pictures / '1.png')])
        threshold = float(found.scores[4])
        infer(detector, find_source(pictures / '1.png', tmp_path), tmp_path, threshold)
        detections = read_results(tmp_path)['results'][0]['detections']
        assert len(detections) == 5
        best = detections[0]
        assert best['bbox'] == pytest.approx(found.boxes[0].tolist(), abs=0.01)
        assert best['score'] == pytest.approx(found.scores[0], abs=1e-4)
        assert best['class_name'] == ('box', 'ball')[best['label']]

    @pytest.mark.parametrize('moment', ['detecting', 'writing a picture', 'writing results.json'])
    def test_ctrl_c(self, detector, pictures, tmp_path, monkeypatch, capsys, moment):
        """One line; what is written is whole."""
        def interrupt(*args, **kwargs):
            raise KeyboardInterrupt

        monkeypatch.setattr(command, 'load_model', lambda *args: detector)
        if moment == 'detecting':
            monkeypatch.setattr(detector, 'run', interrupt)
        elif moment == 'writing a picture':
            monkeypatch.setattr(os, 'replace', interrupt)
        else:
            monkeypatch.setattr(os, 'fsync', interrupt)
        out = tmp_path / 'out'
        assert cli.main(['infer', str(pictures), 'x', '--device', 'cpu', '--out-dir',
                         str(out)]) == 130
        assert capsys.readouterr().err == 'stopped by Ctrl-C\n'
        left = [path for path in out.rglob('*') if path.is_file()]
        assert len(left) == (4 if moment == 'writing results.json' else 0)
        assert all(read_picture(path) is not None for path in left)

    def test_earlier_results_are_no_input(self, pictures):
        out = pictures / 'out'
        out.mkdir()
        shutil.copy(pictures / '0.png', out)
        assert len(find_source(pictures, out).images) == 4
        assert len(find_source(pictures, pictures.parent).images) == 5

    @pytest.mark.parametrize('kind', ['above', 'link to the input', 'link to the folder'])
    def test_results_do_not_overwrite_their_input(self, pictures, tmp_path, kind):
        out = tmp_path / 'out'
        if kind == 'above':  # pictures/0.png of pictures/pictures/0.png
            shutil.copytree(pictures, pictures / pictures.name)
            out = tmp_path
        elif kind == 'link to the input':
            out.mkdir()
            (out / '0.png').symlink_to(pictures / '1.png')
        else:
            out.symlink_to(pictures)
        with pytest.raises(InputError, match='the results would overwrite .*, which is read'):
            find_source(pictures, out)

    @pytest.mark.parametrize('path, out, message', [
        ('none.jpg', 'out', r'none\.jpg does not exist'),
        ('empty', 'out', r'folder .*empty holds no images \(\.bmp'),
        ('fifo.png', 'out', r'fifo\.png is no file'),
        ('pictures', 'pictures', 'would overwrite .*, which is read'),
        ('pictures/0.png', 'pictures', 'would overwrite .*, which is read'),
    ])
    def test_mistakes(self, pictures, tmp_path, path, out, message):
        (tmp_path / 'empty').mkdir()
        os.mkfifo(tmp_path / 'fifo.png')
        with pytest.raises(InputError, match=message):
            find_source(tmp_path / path, tmp_path / out)


def encode(image, file_format, **options):
    memory = io.BytesIO()
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    image.save(memory, file_format, **options)
    return memory.getvalue()


def exif(orientation):
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags


NOISE = np.random.default_rng(0).integers(0, 255, (60, 80, 3), np.uint8)
RGBA = np.dstack([NOISE, np.zeros((60, 80), np.uint8)])
GREY_16 = np.linspace(0, 65535, 60 * 80).reshape(60, 80).astype(np.uint16)
CMYK = Image.fromarray(NOISE).convert('CMYK')
PALETTE = Image.fromarray(NOISE).convert('P')

# Content, and the shape of the image that it is read as.
PICTURES = {
    'grey.jpg': (encode(NOISE[..., 0], 'JPEG'), (60, 80)),
    'rgba.png': (encode(RGBA, 'PNG'), (60, 80)),
    'grey and alpha.png': (encode(Image.fromarray(RGBA).convert('LA'), 'PNG'), (60, 80)),
    'sixteen bits.png': (cv2.imencode('.png', GREY_16)[1].tobytes(), (60, 80)),
    'sixteen bits.tif': (cv2.imencode('.tif', GREY_16)[1].tobytes(), (60, 80)),
    'sixteen bits colour.PNG': (cv2.imencode('.png', np.dstack([GREY_16] * 3))[1].tobytes(),
                                (60, 80)),
    'palette.png': (encode(PALETTE, 'PNG', transparency=0), (60, 80)),
    'black and white.png': (encode(GREY_16 > 30000, 'PNG'), (60, 80)),
    'cmyk.jpg': (encode(CMYK, 'JPEG'), (60, 80)),
    'turned.jpg': (encode(NOISE, 'JPEG', exif=exif(6)), (80, 60)),
    'one pixel.png': (encode(NOISE[:1, :1], 'PNG'), (1, 1)),
    'wide.png': (encode(np.tile(NOISE[:2], (1, 125, 1)), 'PNG'), (2, 10_000)),
    'päth with späces ⛰/ünd  ¿ noch einer?.png': (encode(NOISE, 'PNG'), (60, 80)),
}
NO_PICTURES = {
    'truncated.jpg': encode(NOISE, 'JPEG')[:900],
    'truncated.png': encode(NOISE, 'PNG')[:900],
    'truncated.webp': encode(NOISE, 'WEBP')[:900],
    'zero bytes.jpg': b'',
    'text.png': b'<html>not found</html>',
    'sound.jpg': bytes(range(256)) * 4,
}


@pytest.fixture(scope='module')
def strange(tmp_path_factory):
    """A folder of all kinds of pictures, and of what is none."""
    folder = tmp_path_factory.mktemp('strange')
    for name, (content, _) in PICTURES.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)
    for name, content in NO_PICTURES.items():
        (folder / name).write_bytes(content)
    (folder / 'notes.txt').write_text('no image by name')
    (folder / 'link.png').symlink_to(folder / 'nowhere.png')
    return folder


FILE = encode(NOISE, 'PNG')
BGR = NOISE[..., ::-1]
GREY = NOISE[..., 1]
COLOUR_OF_GREY = np.dstack([GREY] * 3)
TAKEN = {
    'content': (FILE, BGR), 'bytearray': (bytearray(FILE), BGR),
    'memoryview': (memoryview(FILE), BGR), 'Pillow': (Image.fromarray(NOISE), BGR),
    'a file of Pillow': (Image.open(io.BytesIO(FILE)), BGR),
    'Pillow, grey': (Image.fromarray(GREY), COLOUR_OF_GREY),
    'Pillow, alpha': (Image.fromarray(RGBA), BGR), 'Pillow, palette': (PALETTE, None),
    'Pillow, 16 bits': (Image.fromarray(GREY_16), np.dstack([GREY_16 >> 8] * 3)),
    'array': (BGR, BGR), 'grey': (GREY, COLOUR_OF_GREY),
    'grey with an axis': (GREY[..., None], COLOUR_OF_GREY),
    'alpha': (np.dstack([BGR, GREY]), BGR), '16 bits': (BGR.astype(np.uint16) * 257, BGR),
    'int64': (BGR.astype(int), BGR), 'float32': (BGR.astype(np.float32), BGR),
    'float16': (BGR.astype(np.float16) + 0.25, BGR), 'black': (np.zeros((9, 9)), None),
    'read-only': (np.broadcast_to(BGR[:1, :1], (5, 5, 3)), None)}
REFUSED = {
    'URL': ('https://nowhere/a.png', 'is a URL: download it'),
    'no file': ('nowhere.png', r'nowhere\.png cannot be read: No such file'),
    'zero byte': ('no\0where.png', r'no\\x00where\.png cannot be read'),
    'folder': ('.', r'\. is no file'),
    'empty content': (b'', 'the bytes cannot be decoded .* the file is empty'),
    'content of something else': (b'<html>', 'the bytes cannot be decoded as an image'),
    'broken Pillow': (Image.open(io.BytesIO(FILE[:900])), 'ImageFile cannot be read: '),
    '0 to 1': (NOISE / 254, 'values up to 1, which may be of 255 or of 1: give uint8'),
    'dark 16 bits': (NOISE.astype(np.uint16), 'up to 254, which may be of 255 or of 65535'),
    'normalized': (NOISE / 128 - 1, 'has values from -1 to'),
    'NaN': (NOISE * np.nan, 'from nan to'), 'infinity': (NOISE + np.inf, 'from inf to inf'),
    'large': (NOISE.astype(int) * 2, 'from 0 to 508'), 'bool': (NOISE > 99, 'bool is no image'),
    'objects': (NOISE.astype(object), 'object is no image'),
    'channels first': (NOISE.transpose(2, 0, 1), r'\(3, 60, 80\) and type uint8 is no image: give'),
    'two channels': (NOISE[..., :2], r'\(60, 80, 2\)'), 'vector': (NOISE[0, :, 0], r'\(80,\)'),
    'no pixels': (NOISE[:0], r'\(0, 80, 3\) and type uint8 has no pixels'),
    'tensor': (torch.zeros(3, 8, 8), 'the Tensor is no image: give the path or the content'),
    'number': (5, 'the int is no image'), 'nothing': (None, 'the NoneType is no image'),
    'dict': (dict(img=BGR), 'the dict is no image'), 'list in a list': ([[BGR]], 'the list is no')}


class TestInputs:

    @pytest.mark.parametrize('kind', TAKEN)
    def test_taken(self, kind):
        value, expected = TAKEN[kind]
        image = take_image(value)
        assert image.dtype == np.uint8 and image.shape[2] == 3 and image.flags.c_contiguous
        if expected is not None:
            assert (image == expected).all()

    @pytest.mark.parametrize('turn', [str, Path])
    def test_file(self, strange, turn):
        assert (take_image(turn(strange / 'rgba.png')) == BGR).all()

    def test_a_turned_picture_of_pillow(self, strange):
        with Image.open(strange / 'turned.jpg') as image:
            assert take_image(image).shape == take_image(strange / 'turned.jpg').shape

    @pytest.mark.parametrize('kind', REFUSED)
    def test_refused(self, kind, tmp_path, monkeypatch, detector):
        value, message = REFUSED[kind]
        monkeypatch.chdir(tmp_path)
        with pytest.raises(InputError, match=message) as caught:
            detector.detect(value)
        assert '\n' not in str(caught.value)

    def test_one_or_many(self, detector, classifier, strange):
        path = strange / 'rgba.png'
        many = [path, str(path), FILE, Image.fromarray(NOISE), BGR]
        expected, = detector.detect([BGR])
        for images in (many, tuple(many), iter(many), np.stack([BGR, BGR]), path, FILE, BGR):
            for found in detector.detect(images):
                np.testing.assert_allclose(found.boxes, expected.boxes, rtol=1e-4, atol=1e-3)
        assert len(classifier.classify(iter(many))) == len(classifier(many, 2)) == 5
        assert detector.detect([]) == classifier([], 2) == []


@pytest.mark.filterwarnings('ignore')
class TestDetInferencer:

    @pytest.fixture(scope='class')
    def inferencer(self, user_project, checkpoint):
        from spartan_mm.detection import DetInferencer
        return DetInferencer(str(user_project / 'user_detector.py'), checkpoint, 'cpu',
                             show_progress=False)

    def test_one_or_many(self, inferencer, detector, strange):
        expected, = detector.detect(BGR)
        path = strange / 'rgba.png'
        many = [path, str(path), FILE, Image.fromarray(NOISE), BGR]
        for images in (many, iter(many), path, FILE, Image.fromarray(NOISE), BGR):
            for found in inferencer(images, batch_size=2)['predictions']:
                np.testing.assert_allclose(found['bboxes'], expected.boxes, rtol=1e-4, atol=1e-3)
        assert inferencer([])['predictions'] == []

    @pytest.mark.parametrize('kind', ['URL', 'no file', 'tensor', '0 to 1', 'list in a list'])
    def test_refused(self, kind, inferencer):
        value, message = REFUSED[kind]
        with pytest.raises(InputError, match=message):
            inferencer(value)

    def test_a_folder_with_broken_files(self, inferencer, strange, tmp_path):
        results = inferencer(strange, out_dir=tmp_path / 'out', batch_size=3, no_save_pred=False)
        names = {Path(name).name for name in results['failures']}
        # mmdet looks into no subfolder, and at no name in capitals.
        listed = {name for name in PICTURES if '/' not in name and not name.endswith('.PNG')}
        assert {*NO_PICTURES} <= names <= {*NO_PICTURES, 'link.png'}
        assert len(results['predictions']) == len(listed)
        assert {path.name for path in (tmp_path / 'out' / 'vis').iterdir()} == listed

    @pytest.mark.parametrize('place', ['file', 'file/deeper'])
    def test_no_place_for_results(self, inferencer, tmp_path, place):
        (tmp_path / 'file').touch()
        with pytest.raises(UnwritableError, match='file is a file, not a folder'):
            inferencer(BGR, out_dir=tmp_path / place)

    def test_results_do_not_overwrite_their_input(self, inferencer, user_project, tmp_path):
        shutil.copytree(user_project / 'pictures', tmp_path / 'out' / 'vis')
        for inputs in (tmp_path / 'out' / 'vis', str(tmp_path / 'out' / 'vis' / '1.png')):
            with pytest.raises(UnwritableError, match='it is what is read'):
                inferencer(inputs, out_dir=tmp_path / 'out')

    def test_results_of_one_name(self, inferencer, user_project, tmp_path):
        (tmp_path / 'in').mkdir()
        for name in ('a.png', 'a.bmp', 'b.png'):
            shutil.copy(user_project / 'pictures' / '1.png', tmp_path / 'in' / name)
        inferencer(tmp_path / 'in', out_dir=tmp_path / 'out', no_save_pred=False)
        assert {path.name for path in (tmp_path / 'out' / 'preds').iterdir()} == {
            'a.png.json', 'a.bmp.json', 'b.json'}
        with pytest.raises(InputError, match=r'1\.png and .*1\.png would have the same results'):
            shutil.copy(user_project / 'pictures' / '1.png', tmp_path / 'in')
            inferencer([tmp_path / 'in' / '1.png', user_project / 'pictures' / '1.png'],
                       out_dir=tmp_path / 'out')

    def test_names(self, inferencer, user_project, checkpoint, tmp_path):
        from spartan_mm.detection import DetInferencer
        assert inferencer.model.dataset_meta['classes'] == ('box', 'ball')
        config = str(user_project / 'user_detector.py')
        weights = torch.load(checkpoint)['state_dict']
        for classes in (('one', ), ('one', 'two', 'three')):
            torch.save(dict(state_dict=weights, meta=dict(dataset_meta=dict(CLASSES=classes))),
                       tmp_path / 'it.pth')
            for kind in (DetInferencer, Detector):
                with pytest.raises(CheckpointError, match=r'it\.pth names . class.*tells 2 apart'):
                    kind(config, str(tmp_path / 'it.pth'), 'cpu')


class TestStrangeInputs:

    @pytest.mark.parametrize('batch_size', [1, 4])
    @pytest.mark.parametrize('kind', ['detector', 'classifier'])
    def test_each_gives_a_result_or_a_clear_error(self, request, strange, tmp_path, kind,
                                                  batch_size):
        model = request.getfixturevalue(kind)
        report = infer(model, find_source(strange, tmp_path), tmp_path, batch_size=batch_size)
        results = {result['file']: result for result in read_results(tmp_path)['results']}
        assert {name: (result['height'], result['width']) for name, result in results.items()} == {
            name: shape for name, (_, shape) in PICTURES.items()}
        assert set(report.failures) == {*NO_PICTURES, 'link.png'}
        for name, failure in report.failures.items():
            assert name in failure and '\n' not in failure
        for name in PICTURES:
            assert read_picture(tmp_path / name) is not None
        assert 'the file is empty' in report.failures['zero bytes.jpg']

    @pytest.mark.parametrize('backend', ['cv2', 'pillow'])
    def test_sixteen_bits_are_scaled(self, detector, strange, monkeypatch, backend):
        monkeypatch.setitem(detector._decoding, 'backend', backend)
        for name in ('sixteen bits.png', 'sixteen bits.tif', 'sixteen bits colour.PNG'):
            image = detector.read(strange / name).astype(int)
            assert np.abs(image - (GREY_16 >> 8).astype(int)[..., None]).max() <= 1, name

    @pytest.mark.parametrize('backend', ['cv2', 'pillow'])
    def test_colours(self, detector, strange, monkeypatch, backend):
        monkeypatch.setitem(detector._decoding, 'backend', backend)
        read = detector.read
        assert (read(strange / 'rgba.png') == NOISE[..., ::-1]).all()
        assert (read(strange / 'one pixel.png') == NOISE[:1, :1, ::-1]).all()
        palette = np.asarray(PALETTE.convert('RGB'))[..., ::-1]
        assert (read(strange / 'palette.png') == palette).all()
        upright = read(strange / 'turned.jpg').astype(int)
        expected = np.rot90(NOISE, -1)[..., ::-1].astype(int)
        assert np.abs(upright - expected).mean() < np.abs(upright - expected[::-1]).mean() - 20

    def test_a_name_of_any_bytes(self, detector, tmp_path):
        folder = tmp_path / 'pictures'
        folder.mkdir()
        name = os.fsdecode(b'caf\xe9.png')
        try:
            (folder / name).write_bytes(encode(NOISE, 'PNG'))
        except OSError:
            pytest.skip('this file system takes no such name')
        infer(detector, find_source(folder, tmp_path / 'out'), tmp_path / 'out')
        assert read_results(tmp_path / 'out')['results'][0]['file'] == name

    def test_a_format_that_is_too_small_for_the_picture(self, detector, tmp_path):
        folder = tmp_path / 'pictures'
        folder.mkdir()
        content = cv2.imencode('.png', np.zeros((2, 20_000, 3), np.uint8))[1].tobytes()
        (folder / 'wide.webp').write_bytes(content)
        (folder / 'wide.png').write_bytes(content)
        report = infer(detector, find_source(folder, tmp_path / 'out'), tmp_path / 'out')
        assert report.images == 2
        assert report.failures.keys() == {'wide.webp'}
        assert 'wide.webp cannot be written: ' in report.failures['wide.webp']


class TestVideo:

    @staticmethod
    def write(path, frames):
        writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*'MJPG'), 10, (96, 64))
        for frame in frames:
            writer.write(frame)
        writer.release()
        return path

    @pytest.mark.parametrize('kind, key', [('detector', 'detections'),
                                           ('classifier', 'predictions')])
    def test_video(self, request, tmp_path, kind, key):
        out = tmp_path / 'out'
        video = self.write(tmp_path / 'a film.avi', [np.full((64, 96, 3), grey, np.uint8)
                                                     for grey in range(0, 250, 50)])
        infer(request.getfixturevalue(kind), find_source(video, out), out, 0., batch_size=2)
        results = read_results(out)['results']
        assert [result['frame'] for result in results] == [0, 1, 2, 3, 4]
        assert all(result[key] for result in results)
        assert {(result['file'], result['width'], result['height']) for result in results} == {
            ('a film.avi', 96, 64)}
        written = cv2.VideoCapture(str(out / 'a film.mp4'))
        assert written.get(cv2.CAP_PROP_FRAME_COUNT) == 5
        assert written.get(cv2.CAP_PROP_FPS) == pytest.approx(10)

    def test_video_that_breaks_off(self, detector, tmp_path):
        path = self.write(tmp_path / 'long.avi', np.random.default_rng(0).integers(
            0, 255, (20, 64, 96, 3), np.uint8))
        content = path.read_bytes()
        path.write_bytes(content[:len(content) // 2])
        out = tmp_path / 'out'
        report = infer(detector, find_source(path, out), out)
        frames = report.images
        assert 5 < frames < 15
        assert f'long.avi breaks off after {frames} of 20 frames' in report.failures['long.avi']
        assert read_results(out)['failures'] == report.failures

    def test_broken_video(self, detector, tmp_path):
        (tmp_path / 'broken.mp4').write_text('no film')
        source = find_source(tmp_path / 'broken.mp4', tmp_path / 'out')
        with pytest.raises(InputError, match=r'broken\.mp4 cannot be opened as a video'):
            infer(detector, source, tmp_path / 'out')


class Blobs:
    """Finds what is bright in a view of 64 by 64 pixels, if it has more than four of them.

    What reaches the edge may be half an object, and has half the score.
    """

    task, classes, files, read = 'detection', ('blob', ), (), staticmethod(take_image)

    def __call__(self, images, batch_size=1):
        found = []
        for image in images:
            scale = np.array(image.shape[1::-1]) / 64
            view = cv2.resize(image[..., 0], (64, 64), interpolation=cv2.INTER_AREA)
            _, areas, stats, _ = cv2.connectedComponentsWithStats((view > 20).astype(np.uint8))
            kept = [number for number, stat in enumerate(stats) if number and stat[4] > 4]
            boxes = [[left, top, left + width, top + height]
                     for left, top, width, height, _ in stats[kept]]
            scores = [view[areas == number].max() / (510 if {0, 64} & {*box} else 255)
                      for number, box in zip(kept, boxes, strict=True)]
            found.append(Detections(
                np.array(boxes, np.float32).reshape(-1, 4) * np.tile(scale, 2),
                np.zeros(len(boxes), int), np.array(scores, np.float32), self.classes).best_first())
        return found


class TestTracks:

    def test_objects_keep_their_numbers(self, tmp_path):
        """Also one that is weak for a while, or out of sight."""
        frames = np.zeros((20, 64, 64, 3), np.uint8)
        for number, frame in enumerate(frames):
            frame[10:20, 2 * number:2 * number + 10] = 40 if number in (7, 8) else 250
            if number not in (10, 11, 12):
                frame[40:50, 50 - 2 * number:60 - 2 * number] = 180
        video = TestVideo.write(tmp_path / 'film.avi', [cv2.resize(each, (96, 64))
                                                        for each in frames])
        infer(Blobs(), find_source(video, tmp_path / 'out'), tmp_path / 'out', track=True)
        found = [result['detections'] for result in read_results(tmp_path / 'out')['results']]
        assert {each['track_id'] for each in found[0]} == {None}
        for above, frames_with in ((True, range(1, 20)), (False, {*range(1, 20)} - {10, 11, 12})):
            tracks = {number: each['track_id'] for number, detections in enumerate(found)
                      for each in detections if (each['bbox'][1] < 30) == above and number}
            assert tracks.keys() == {*frames_with} and len({*tracks.values()}) == 1
        assert found[7][-1]['score'] < 0.3

    def test_not_for_classifiers(self, classifier, pictures, tmp_path):
        for options in (dict(track=True), dict(tile=64), dict(formats=['yolo'])):
            with pytest.raises(UsageError, match='a classifier gives n'):
                infer(classifier, find_source(pictures, tmp_path), tmp_path, **options)


class TestTiles:

    def test_small_objects_of_a_large_picture(self, tmp_path):
        image = np.zeros((512, 512, 3), np.uint8)
        # The second lies where tiles meet; the last is too large for one.
        boxes = [(20, 20, 28, 28), (60, 100, 72, 108), (480, 300, 488, 308), (200, 200, 400, 400)]
        for left, top, right, bottom in boxes:
            image[top:bottom, left:right] = 255
        cv2.imwrite(str(tmp_path / 'large.png'), image)
        assert len(Blobs()([image])[0].scores) == 1
        source, out = find_source(tmp_path / 'large.png', tmp_path / 'out'), tmp_path / 'out'
        limit = Image.MAX_IMAGE_PIXELS
        report = infer(Blobs(), source, out, tile=64, batch_size=5)
        found = read_results(out)['results'][0]['detections']
        assert report.objects == 4 and Image.MAX_IMAGE_PIXELS == limit
        np.testing.assert_allclose(sorted(each['bbox'] for each in found), sorted(boxes), atol=1)

    def test_a_model_of_sahi(self, monkeypatch):
        # sahi takes it away for the whole process.
        monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', Image.MAX_IMAGE_PIXELS)
        from sahi.predict import get_prediction

        from spartan_mm.tiling import SahiModel
        image = np.zeros((64, 64, 3), np.uint8)
        image[10:20, 30:50] = 255
        found, = get_prediction(image, SahiModel(model=Blobs())).object_prediction_list
        assert found.bbox.to_xyxy() == [30, 10, 50, 20] and found.category.name == 'blob'


class TestFormats:

    @pytest.fixture
    def blobs(self, tmp_path):
        """A folder of pictures, COCO's file of what is bright in them, and its ids."""
        (tmp_path / 'in' / 'sub').mkdir(parents=True)
        annotations = []
        for number, name in enumerate(('b.png', 'sub/a.png', 'none.png')):
            image = np.zeros((64, 64, 3), np.uint8)
            if name != 'none.png':
                image[8:16, 8 * number:8 * number + 24] = 200
                annotations += [dict(id=number + 1, image_id=70 - number, category_id=9, iscrowd=0,
                                     bbox=[8 * number, 8, 24, 8], area=192)]
            cv2.imwrite(str(tmp_path / 'in' / name), image)
        (tmp_path / 'truth.json').write_text(json.dumps(dict(
            images=[dict(id=70 - number, file_name=name, width=64, height=64) for number, name in
                    enumerate(('b.png', 'sub/a.png', 'none.png'))],
            categories=[dict(id=9, name='blob')], annotations=annotations)))
        return tmp_path / 'in'

    def test_all_say_the_same(self, blobs, tmp_path, capsys):
        from pycocotools.coco import COCO
        from pycocotools.cocoeval import COCOeval
        out = tmp_path / 'out'
        report = infer(Blobs(), find_source(blobs, out), out, pictures=False,
                       formats=('json', 'jsonl', 'csv', 'yolo', 'coco'),
                       ann_file=tmp_path / 'truth.json')
        results = read_results(out)['results']
        assert report.images == 3 and report.objects == 2 and report.speed > 0
        assert [json.loads(line) for line in
                (out / 'results.jsonl').read_text().splitlines()] == results
        with open(out / 'results.csv', newline='') as file:
            rows = [*csv.DictReader(file)]
        assert [(row['file'], row['x1'], row['y2'], row['track_id']) for row in rows] == [
            ('b.png', '0.0', '16.0', ''), ('sub/a.png', '8.0', '16.0', '')]
        labels = {path.relative_to(out / 'yolo').as_posix(): path.read_text()
                  for path in (out / 'yolo').rglob('*.txt')}
        assert labels == {
            'classes.txt': 'blob\n', 'none.txt': '',
            'b.txt': '0 0.187500 0.187500 0.375000 0.125000\n',
            'sub/a.txt': '0 0.312500 0.187500 0.375000 0.125000\n'}
        truth = COCO(str(tmp_path / 'truth.json'))
        evaluation = COCOeval(truth, truth.loadRes(str(out / 'results.coco.json')), 'bbox')
        evaluation.evaluate(), evaluation.accumulate(), evaluation.summarize()
        assert evaluation.stats[0] == 1
        assert {path.name for path in out.iterdir()} == {
            'results.json', 'results.jsonl', 'results.csv', 'results.coco.json', 'yolo'}

    @pytest.mark.parametrize('change, options, message', [
        ({}, dict(formats=['coco']), 'need the annotation file'),
        ({}, dict(ann_file='truth.json'), 'and no other results do'),
        (dict(images=[]), dict(formats=['coco']), r'has no image b\.png, none\.png, sub/a\.png: C'),
        (dict(categories=[]), dict(formats=['coco']), 'has no category blob'),
        (dict(images=[{}]), dict(formats=['coco']), 'is no annotation file of COCO'),
        ('b.bmp', dict(formats=['yolo']), r'two images would share the YOLO labels b\.txt'),
        ('classes.png', dict(formats=['yolo']), r'overwrite classes\.txt, .*: rename the')])
    def test_refused(self, blobs, tmp_path, change, options, message):
        path = tmp_path / 'truth.json'
        if isinstance(change, str):
            shutil.copy(blobs / 'b.png', blobs / change)
        elif change:
            path.write_text(json.dumps(json.loads(path.read_text()) | change))
            options = dict(options, ann_file=path)
        with pytest.raises(UsageError, match=message):
            infer(Blobs(), find_source(blobs, tmp_path / 'out'), tmp_path / 'out', **options)
        assert not [*(tmp_path / 'out').glob('*')]

    def test_coco_needs_names_and_images(self, blobs, tmp_path):
        out, model = tmp_path / 'out', Blobs()
        video = TestVideo.write(tmp_path / 'film.avi', [np.zeros((64, 64, 3), np.uint8)] * 2)
        options = dict(formats=['jsonl', 'coco'], ann_file=tmp_path / 'truth.json')
        with pytest.raises(UsageError, match='the frames of a video have none: choose json'):
            infer(model, find_source(video, out), out, **options)
        model.classes = ()
        with pytest.raises(UsageError, match='names of the classes, and the model does not know'):
            infer(model, find_source(blobs, out), out, **options)
        assert not out.exists()

    def test_boxes_without_a_place_are_left_out(self, blobs, tmp_path):
        class Lost(Blobs):
            def __call__(self, images, batch_size=1):
                return [Detections(np.array([[0, 0, np.nan, 9], [0, 0, 9, 9], [0, 0, np.inf, 9]]),
                                   np.zeros(3, int), np.ones(3), self.classes) for _ in images]

        report = infer(Lost(), find_source(blobs, tmp_path / 'out'), tmp_path / 'out')
        assert report.objects == report.images == 3
        for result in read_results(tmp_path / 'out')['results']:
            assert [each['bbox'] for each in result['detections']] == [[0, 0, 9, 9]]

    def test_lines_are_there_while_it_runs(self, blobs, tmp_path, monkeypatch):
        seen, out = [], tmp_path / 'out'
        find = Blobs.__call__

        def look(self, images, batch_size=1):
            if out.exists():
                seen.append([(out / name).read_text().count('\n')
                             for name in ('results.jsonl', 'results.csv')])
            return find(self, images, batch_size)

        monkeypatch.setattr(Blobs, '__call__', look)
        infer(Blobs(), find_source(blobs, out), out, formats=['jsonl', 'csv'])
        assert seen == [[0, 1], [1, 2], [2, 2]]


class TestDrawing:

    def test_draws_on_a_copy_and_only_near_the_box(self):
        image = np.full((100, 100, 3), 128, np.uint8)
        found = Detections(np.array([[20., 40., 60., 80.]]), np.array([1]), np.array([0.9]),
                           ('a', 'b'))
        drawn = draw_detections(image, found)
        assert (image == 128).all()
        assert (drawn[40, 20:61] != 128).any(axis=1).all()
        assert (drawn[45:75, 25:55] == 128).all()
        assert (drawn[82:] == 128).all()

    @pytest.mark.parametrize('box', [
        [-50., -50., 200., 200.], [90., 0., 99., 5.], [5., 5., 5., 5.],
    ], ids=str)
    def test_any_box(self, box):
        image = np.zeros((100, 100, 3), np.uint8)
        found = Detections(np.array([box]), np.array([7]), np.array([1.]), ('a', ))
        assert draw_detections(image, found).any()

    def test_nothing_found(self):
        image = np.zeros((10, 10, 3), np.uint8)
        found = Detections(np.zeros((0, 4)), np.zeros(0, int), np.zeros(0))
        assert (draw_detections(image, found) == image).all()
