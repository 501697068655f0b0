"""Exported files without torch: what comes in, what comes out, and what is said when it doesn't."""
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tracemalloc
import venv
import wave
from itertools import product
from types import SimpleNamespace

import cv2
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from spartan_mm import inference, runtime
from spartan_mm.datasets.images import take_image
from spartan_mm.runtime import Classification, Detections, InputError, Runtime, RuntimeFileError

BOXES = np.float32([[.1, .2, .5, .6], [.3, .3, .9, .9], [0, 0, 1, 1]])
CLASSES = ['cät', 'dog']
LIBRARIES = {'.onnx': 'onnxruntime', '.xml': 'openvino', '.tflite': 'ai_edge_litert'}


def metadata_of(task='detection', size=(64, 96), dynamic=('batch',), **changes):
    outputs = ['labels', 'boxes', 'scores'] if task == 'detection' else ['scores']
    return dict(dict(
        format=1, spartan_mm='0.2', task=task, classes=CLASSES, outputs=outputs, raw=False,
        precision='fp32', input=dict(size=[*size], dynamic=[*dynamic], min_size=32,
                                       multiple_of=32),
        resize=dict(rule='stretch', size=[*size], crop=None, interpolation='bilinear',
                    antialias=True, upright=True)), **changes)


def write_graph(path, metadata):
    """Write a graph, where the brighter an image, the higher are all scores.

    Boxes are always the same parts of the original. A classifier's scores are red, green and blue.
    """
    dynamic, size = metadata['input']['dynamic'], metadata['input']['size']
    batch = 'batch' if 'batch' in dynamic else 1
    rows, columns = ('rows', 'columns') if 'size' in dynamic else size
    detects = metadata['task'] == 'detection'
    constants = dict(one=np.int64([1]), zero=np.int64([0]), space=np.int64([2, 3]),
                     pixel=np.int64([1, 2, 3]), full=np.float32([255]), parts=BOXES[None],
                     shares=np.float32([[1, .5, .1]]), numbers=np.int64([[1, 0, 7]]))
    steps = [('Cast', 'images', 'floats', dict(to=TensorProto.FLOAT)),
             ('Div', 'floats full', 'light', {})]
    inputs = [('images', TensorProto.UINT8, [batch, 3, rows, columns])]
    outputs = [('scores', TensorProto.FLOAT, [batch, 3])]
    if detects:
        inputs += [('orig_target_sizes', TensorProto.INT64, [batch, 2])]
        outputs += [('labels', TensorProto.INT64, [batch, 3]),
                    ('boxes', TensorProto.FLOAT, [batch, 3, 4])]
        steps += [('ReduceMean', 'light pixel', 'mean', dict(keepdims=0)),
                  ('Unsqueeze', 'mean one', 'means', {}), ('Mul', 'means shares', 'scores', {}),
                  ('Cast', 'orig_target_sizes', 'sizes', dict(to=TensorProto.FLOAT)),
                  ('Concat', 'sizes sizes', 'corners', dict(axis=1)),
                  ('Unsqueeze', 'corners one', 'each', {}), ('Mul', 'each parts', 'boxes', {}),
                  ('Slice', 'orig_target_sizes zero one one', 'widths', {}),
                  ('Mul', 'widths zero', 'nothing', {}), ('Add', 'nothing numbers', 'labels', {})]
    else:
        steps += [('ReduceMean', 'light space', 'scores', dict(keepdims=0))]
    used = {name for _, names, _, _ in steps for name in names.split()}
    graph = helper.make_graph(
        [helper.make_node(kind, names.split(), [output], **options)
         for kind, names, output, options in steps],
        'tiny', *([helper.make_tensor_value_info(*each) for each in group]
                  for group in (inputs, outputs)),
        [numpy_helper.from_array(value, name) for name, value in constants.items() if name in used])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid('', 18)], ir_version=10)
    helper.set_model_props(model, {key: json.dumps(value) for key, value in metadata.items()})
    onnx.save(model, path)
    return path


def write_openvino(path):
    """Convert a graph; the metadata move into rt_info."""
    openvino = pytest.importorskip('openvino')
    model = openvino.Core().read_model(path)
    for entry in onnx.load(path).metadata_props:
        model.set_rt_info(entry.value, ['model_info', entry.key])
    openvino.save_model(model, path.with_suffix('.xml'), compress_to_fp16=False)
    return path.with_suffix('.xml')


def write_litert(path, metadata):
    """Write the graph of ``write_graph`` for one image, and the metadata beside it."""
    flatbuffers = pytest.importorskip('flatbuffers')
    schema = pytest.importorskip('ai_edge_litert.schema_py_generated')
    graph, model = schema.SubGraphT(), schema.ModelT()
    graph.tensors, graph.operators = [], []
    model.buffers, model.operatorCodes = [schema.BufferT()], []

    def tensor(shape, kind, content=None):
        made = schema.TensorT()
        made.shape, made.type = list(shape), getattr(schema.TensorType, kind)
        made.name = f'tensor_{len(graph.tensors)}'
        if content is not None:
            made.buffer = len(model.buffers)
            model.buffers.append(schema.BufferT())
            model.buffers[-1].data = np.frombuffer(content.tobytes(), np.uint8)
        graph.tensors.append(made)
        return len(graph.tensors) - 1

    def constant(value):
        value = np.asarray(value, np.float32 if np.asarray(value).dtype.kind == 'f' else np.int32)
        return tensor(value.shape, value.dtype.name.upper(), value)

    def operation(kind, inputs, shape, result='FLOAT32', options=None, **settings):
        code, made = schema.OperatorCodeT(), schema.OperatorT()
        code.builtinCode = code.deprecatedBuiltinCode = getattr(schema.BuiltinOperator, kind)
        made.opcodeIndex, made.inputs, made.outputs = len(model.operatorCodes), inputs, [
            tensor(shape, result)]
        model.operatorCodes.append(code)
        if options:
            made.builtinOptionsType = getattr(schema.BuiltinOptions, options)
            made.builtinOptions = getattr(schema, f'{options}T')()
            vars(made.builtinOptions).update(settings)
        graph.operators.append(made)
        return made.outputs[0]

    height, width = metadata['input']['size']
    images = tensor((1, 3, height, width), 'UINT8')
    light = operation('CAST', [images], (1, 3, height, width))
    if metadata['task'] == 'detection':
        inputs = [images, tensor((1, 2), 'INT32')]
        mean = operation('MEAN', [light, constant([1, 2, 3])], (1, 1, 1, 1),
                         options='ReducerOptions', keepDims=True)
        means = operation('RESHAPE', [mean, constant([1, 1])], (1, 1))
        scores = operation('MUL', [means, constant(np.array([[1, .5, .1]]) / 255)], (1, 3),
                           options='MulOptions')
        sides = operation('CAST', [inputs[1]], (1, 2))
        corners = operation('CONCATENATION', [sides, sides], (1, 4),
                            options='ConcatenationOptions', axis=1)
        each = operation('RESHAPE', [corners, constant([1, 1, 4])], (1, 1, 4))
        boxes = operation('MUL', [each, constant(BOXES[None])], (1, 3, 4), options='MulOptions')
        labels = operation('ADD', [constant([[1, 0, 6]]), constant([[0, 0, 1]])], (1, 3), 'INT32',
                           options='AddOptions')
        outputs = [labels, boxes, scores]
    else:
        inputs = [images]
        mean = operation('MEAN', [light, constant([2, 3])], (1, 3), options='ReducerOptions',
                         keepDims=False)
        outputs = [operation('MUL', [mean, constant(np.array([1 / 255]))], (1, 3),
                             options='MulOptions')]
    signature = schema.SignatureDefT()
    signature.signatureKey, signature.subgraphIndex = 'serving_default', 0
    for attribute, names, indices in (('inputs', 'args', inputs), ('outputs', 'output', outputs)):
        maps = []
        for place, index in enumerate(indices):
            maps.append(schema.TensorMapT())
            maps[-1].name, maps[-1].tensorIndex = f'{names}_{place}', index
        setattr(signature, attribute, maps)
    graph.inputs, graph.outputs = inputs, outputs
    model.version, model.subgraphs, model.signatureDefs = 3, [graph], [signature]
    builder = flatbuffers.Builder()
    builder.Finish(model.Pack(builder), b'TFL3')
    path = path.with_suffix('.tflite')
    path.write_bytes(builder.Output())
    path.with_name(f'{path.name}.json').write_text(json.dumps(metadata))
    return path


def write_file(suffix, folder, *task, **changes):
    """Write a file of a kind that can be run; LiteRT's batch is fixed."""
    if suffix == '.tflite':
        return write_litert(folder / 'tiny', metadata_of(*task, dynamic=(), **changes))
    path = write_graph(folder / 'tiny.onnx', metadata_of(*task, **changes))
    return path if suffix == '.onnx' else write_openvino(path)


@pytest.fixture(params=LIBRARIES)
def detector(request, tmp_path):
    """A detector's file."""
    return write_file(request.param, tmp_path)


@pytest.fixture
def model(tmp_path):
    return write_graph(tmp_path / 'tiny.onnx', metadata_of())


@pytest.fixture
def photos(tmp_path):
    """A folder of pictures, one in a subfolder."""
    folder = tmp_path / 'photos'
    (folder / 'süb').mkdir(parents=True)
    for level, name in ((255, 'white.png'), (51, 'dark.jpg'), (102, 'süb/grey.png')):
        Image.new('RGB', (100, 50 + level), (level, ) * 3).save(folder / name)
    return folder


@pytest.fixture
def video(tmp_path):
    """Twelve frames, brighter and brighter."""
    path = tmp_path / 'film.avi'
    film = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*'MJPG'), 10, (80, 60))
    for level in range(12):
        film.write(np.full((60, 80, 3), 20 * level, np.uint8))
    film.release()
    return path


def use_camera(monkeypatch, *plays):
    """Let everything but a file be a camera, which each time that it is opened plays frames."""
    plays, capture = iter(plays), cv2.VideoCapture

    class Camera:

        def __init__(self):
            self.frames = next(plays, iter(()))

        isOpened = release = lambda self: True  # noqa: E731, N815

        def get(self, _):
            return 0.

        def read(self):
            frame = next(self.frames, None)
            return frame is not None, frame

    monkeypatch.setattr(cv2, 'VideoCapture', lambda name: capture(name) if os.path.exists(
        str(name)) else Camera())


def run(*words):
    return runtime.main([*map(str, words)])


def read_results(folder):
    return json.loads((folder / 'results.json').read_text(encoding='utf-8'))


class TestResults:

    def test_detections(self, detector):
        white, black = np.full((50, 70, 3), 255, np.uint8), np.zeros((60, 90), np.uint8)
        model = Runtime(detector)
        assert (model.task, model.classes, model.size) == ('detection', CLASSES, [64, 96])
        for batch_size in (1, 2, 3):
            first, second, third = model((each for each in (white, black, white)), batch_size)
            np.testing.assert_allclose(first.boxes, BOXES * [70, 50, 70, 50], rtol=1e-5)
            np.testing.assert_allclose(second.boxes, BOXES * [90, 60, 90, 60], rtol=1e-5)
            np.testing.assert_allclose(first.scores, [1, .5, .1], rtol=1e-5)
            assert first.labels.tolist() == [1, 0, 7] and not second.scores.any()
            assert (third.scores == first.scores).all()
        assert model([]) == []

    @pytest.mark.parametrize('suffix', LIBRARIES)
    def test_classification(self, tmp_path, suffix):
        found = Runtime(write_file(suffix, tmp_path, 'classification', classes=None))(
            np.full((9, 9, 3), (255, 51, 102), np.uint8))  # BGR
        assert isinstance(found, Classification) and found.labels.tolist() == [2, 0, 1]
        np.testing.assert_allclose(found.scores, [1, .4, .2], rtol=1e-5)
        assert found.top(1).as_records() == [dict(label=2, class_name='class 2', score=1.)]

    def test_supervision(self, monkeypatch):
        monkeypatch.setitem(sys.modules, 'supervision', SimpleNamespace(Detections=dict))
        made = Detections(BOXES, np.int64([1, 0, 7]), np.float32([.9, .5, .1]),
                          CLASSES).to_supervision()
        assert made['xyxy'] is not None and made['class_id'].tolist() == [1, 0, 7]
        assert made['data']['class_name'].tolist() == ['dog', 'cät', 'class 7']

    def test_open_size(self, tmp_path):
        path = write_graph(tmp_path / 'tiny.onnx', metadata_of(dynamic=('batch', 'size')))
        for file in (path, write_openvino(path)):
            model = Runtime(file, size=(128, 160))
            assert model.preprocess(np.zeros((9, 9), np.uint8)).shape == (3, 128, 160)
            assert len(model([np.zeros((9, 9), np.uint8)] * 3, 3)) == 3
            assert model.run(np.zeros((1, 3, 64, 32), np.uint8))['boxes'][0, 2].tolist() == [
                0, 0, 32, 64]

    def test_fixed_size_may_be_any(self, tmp_path):
        path = write_graph(tmp_path / 'tiny.onnx', metadata_of(size=(8, 9)))
        assert Runtime(path)(np.full((9, 9), 255, np.uint8)).scores[0] == pytest.approx(1)

    def test_float_images(self, tmp_path):
        """A graph may want numbers of another type, from 0 to 255 all the same."""
        path = write_graph(tmp_path / 'tiny.onnx', metadata_of())
        model = onnx.load(path)
        model.graph.input[0].type.tensor_type.elem_type = TensorProto.FLOAT
        onnx.save(model, path)
        assert Runtime(path)(np.full((9, 9), 255, np.uint8)).scores[0] == pytest.approx(1)

    def test_openvino_is_kept_from_less_precision(self, tmp_path, monkeypatch, capsys):
        path = write_openvino(write_graph(tmp_path / 'tiny.onnx', metadata_of()))
        assert runtime._type_name(Runtime(path)._engine._compile_for(1)) == 'f32'
        runtime.note.cache_clear()
        monkeypatch.setattr(runtime, '_type_name',
                            lambda place, *device: 'bf16' if device else 'f32')
        for _ in range(2):
            Runtime(path)
        assert capsys.readouterr().err.count('float32 is computed') == 1
        Runtime(path, precision='fp32')
        assert not capsys.readouterr().err
        Runtime(path, precision='bf16')
        assert 'this device computes in f32, not in bf16' in capsys.readouterr().err


class TestImages:

    @pytest.mark.parametrize('kind', [np.uint8, np.uint16, np.int64, np.float32, bool])
    def test_arrays_are_taken_as_the_package_does(self, kind):
        shapes = [(9, 8), (9, 8, 1), (9, 8, 3), (9, 8, 4), (9, 8, 2), (0, 8)]
        for shape, most in product(shapes, [-1, 0, 1, 255, 256, 65535, np.nan]):
            with np.errstate(invalid='ignore'):
                image = np.full(shape, np.array(most, float).astype(kind))
            image[:4, ::2] = 0
            try:
                expected = take_image(image)[..., ::-1]
            except inference.InputError:
                with pytest.raises(InputError):
                    runtime.read_image(image)
            else:
                np.testing.assert_array_equal(np.asarray(runtime.read_image(image)), expected)

    @pytest.mark.parametrize('mode', ['1', 'L', 'P', 'RGB', 'RGBA', 'LA', 'CMYK', 'I;16', 'F'])
    def test_pictures_are_taken_as_the_package_does(self, mode):
        image = Image.linear_gradient('L').resize((20, 10))
        image = (Image.fromarray(np.asarray(image).astype(np.uint16) * 257) if mode == 'I;16'
                 else image.convert(mode))
        image.getexif()[0x0112] = 6
        np.testing.assert_array_equal(np.asarray(runtime.read_image(image)),
                                      take_image(image)[..., ::-1])

    @pytest.mark.parametrize('damage', [b'MM' + b'\xff' * 10, b'', b'II*\0\0\0'], ids=len)
    def test_damaged_orientation_is_none(self, model, damage):
        content = io.BytesIO()
        Image.new('RGB', (30, 20)).save(content, 'JPEG', exif=b'Exif\0\0' + damage)
        assert Runtime(model).read(content.getvalue()).size == (30, 20)
        Runtime(model)(runtime.read_image(content.getvalue()))

    @pytest.mark.parametrize('value, message', [
        ('none.png', r'none\.png cannot be read: No such file or directory'),
        ('.', r'\. is no file'), ('https://a.b/c.png', 'is a URL: download it'),
        (b'', 'the bytes is empty'), (b'GIF', 'no known image format, or damaged'),
        (None, 'the NoneType is no image'), ({}, 'the dict is no image'),
        ('nul\0.png', r'nul\\x00\.png cannot be read')])
    def test_no_images(self, model, value, message):
        with pytest.raises(InputError, match=message):
            Runtime(model)(value)

    @pytest.mark.parametrize('kind', ['EPS', 'GIF', 'PPM'])
    def test_no_other_formats(self, kind):
        """Of some, the decoders start programs."""
        content = io.BytesIO()
        Image.new('RGB', (9, 8)).save(content, kind)
        with pytest.raises(InputError, match='the bytes is of no known image format, or damaged'):
            runtime.read_image(content.getvalue())

    def test_threads_leave_the_limit_of_pillow(self):
        limit, content = Image.MAX_IMAGE_PIXELS, io.BytesIO()
        Image.new('RGB', (9, 8)).save(content, 'PNG')
        with runtime.any_size():
            with runtime.any_size():
                assert Image.MAX_IMAGE_PIXELS is None
            runtime.read_image(content.getvalue())
            assert Image.MAX_IMAGE_PIXELS is None
        assert Image.MAX_IMAGE_PIXELS == limit

    def test_too_many_pixels(self, photos, monkeypatch):
        monkeypatch.setenv(runtime.MAX_PIXELS_VARIABLE, '30000')
        with pytest.raises(InputError, match=r'30,500 pixels.* set SPARTAN_MM_MAX_PIXELS=30500 in'):
            runtime.read_image(photos / 'white.png')
        assert Image.MAX_IMAGE_PIXELS


FAULTS = {
    'no JSON': (dict(input='{"size": '), 'metadata of .* are damaged: input is .*export it again'),
    'newer': (dict(format='2'), r'format 2, and this runtime\.py reads 1: take the one of spart'),
    'no task': (dict(task='"segmentation"'), 'make no sense: task is "segmentation"'),
    'no classes': (dict(classes='["a", 3]'), 'make no sense: classes is'),
    'no size': (dict(input='{"size": [64, 0], "dynamic": []}'), 'make no sense: input is'),
    'no input': (dict(input='3'), 'make no sense: input is 3'),
    'no rule': (dict(resize='null'), 'make no sense: resize is null'),
    'other rule': (dict(resize='{"rule": "letterbox"}'), 'make no sense: resize is .*letterbox'),
    'big crop': (dict(resize=json.dumps(dict(metadata_of()['resize'], crop=[65, 96]))),
                 'make no sense: resize is'),
    'other rule size': (dict(resize=json.dumps(dict(metadata_of()['resize'], size=[64, 64]))),
                        'make no sense: resize is'),
    'other outputs': (dict(outputs='["logits"]'), 'make no sense: outputs is'),
}


class TestFiles:

    @pytest.mark.parametrize('fault', FAULTS)
    def test_metadata(self, fault):
        texts, message = FAULTS[fault]
        texts = {key: json.dumps(value) for key, value in metadata_of().items()} | texts
        with pytest.raises(RuntimeFileError, match=message) as error:
            runtime.parse_metadata(texts, 'a.onnx')
        assert '\n' not in str(error.value) and 'a.onnx' in str(error.value)

    @pytest.mark.parametrize('library', ['onnxruntime', 'openvino'])
    @pytest.mark.parametrize('change, message', [
        (None, 'is no file of `spartan-mm export`'),
        (dict(size=(64, 64)), 'are those of another graph'),
        (dict(outputs=['labels', 'boxes', 'scores', 'masks']), 'are those of another graph')])
    def test_metadata_of_another_graph(self, model, library, change, message):
        graph = onnx.load(model)
        del graph.metadata_props[:]
        if change is not None:
            helper.set_model_props(graph, {key: json.dumps(value) for key, value
                                           in metadata_of(**change).items()})
        onnx.save(graph, model)
        with pytest.raises(RuntimeFileError, match=message):
            Runtime(model if library == 'onnxruntime' else write_openvino(model))

    @pytest.mark.parametrize('key', metadata_of())
    def test_missing_metadata(self, key):
        texts = {name: json.dumps(value) for name, value in metadata_of().items() if name != key}
        if key in ('spartan_mm', 'precision'):
            runtime.parse_metadata(texts, 'a.onnx')
        else:
            with pytest.raises(RuntimeFileError, match=rf'metadata of a\.onnx lack {key}: export'):
                runtime.parse_metadata(texts, 'a.onnx')

    @pytest.mark.parametrize('damage', [b'', b'no model', 0.5])
    def test_damaged(self, detector, damage):
        content = detector.read_bytes()
        detector.write_bytes(content[:int(len(content) * damage)] if isinstance(damage, float)
                             else damage)
        with pytest.raises(RuntimeFileError, match=r'^\S*tiny\.\w+ cannot be loaded by \w+ \d'):
            Runtime(detector)

    @pytest.mark.parametrize('beside, message', [
        (None, r'described in tiny\.tflite\.json, which is missing: keep'),
        ('{"format"', r'tiny\.tflite\.json is damaged: export tiny\.tflite again'),
        ('[1]', r'tiny\.tflite\.json is damaged'), ('{}', 'is no file of `spartan-mm export`'),
        (json.dumps(metadata_of(outputs=['labels', 'boxes', 'scores', 'masks'], dynamic=())),
         'are those of another graph'),
        (json.dumps(metadata_of(size=(64, 64), dynamic=())), 'are those of another graph')])
    def test_metadata_apart(self, tmp_path, beside, message):
        path = write_litert(tmp_path / 'tiny', metadata_of(dynamic=()))
        place = path.with_name('tiny.tflite.json')
        place.unlink() if beside is None else place.write_text(beside)
        with pytest.raises(RuntimeFileError, match=message):
            Runtime(path)

    def test_weights_apart(self, tmp_path):
        path = write_openvino(write_graph(tmp_path / 'tiny.onnx', metadata_of()))
        path.with_suffix('.bin').unlink()
        with pytest.raises(RuntimeFileError, match=r'tiny\.bin, which is missing: keep'):
            Runtime(path)

    @pytest.mark.parametrize('name, message', [
        ('none.onnx', 'is missing'), ('.', 'is of no known kind'),
        ('model.pth', 'is of no known kind: give a .onnx, .xml or .tflite file')])
    def test_no_file(self, name, message):
        with pytest.raises(RuntimeFileError, match=message):
            Runtime(name)

    @pytest.mark.parametrize('options, message', [
        (dict(providers=['TPU']), 'there is no (provider|device) TPU here, only .*CPU'),
        (dict(threads=0), 'threads=0 must be 1 or more'),
        (dict(precision='fp8'), 'precision fp8 is none of fp32, fp16, bf16, int8'),
        (dict(size=(32, 32)), r'takes 64x96 pixels \(height x width\), not 32x32: export it with')])
    def test_arguments(self, detector, options, message):
        with pytest.raises(RuntimeFileError, match=message):
            Runtime(detector, **options)

    def test_precision_is_in_the_graph(self, detector):
        if detector.suffix == '.xml':
            pytest.skip('OpenVINO computes in what it is asked for')
        library = LIBRARIES[detector.suffix]
        with pytest.raises(RuntimeFileError, match=f'computes in fp32, not bf16: {library} keeps'):
            Runtime(detector, precision='bf16')

    def test_missing_library(self, detector, monkeypatch):
        library = LIBRARIES[detector.suffix]
        monkeypatch.setitem(sys.modules, library, None)
        with pytest.raises(RuntimeFileError, match=f'needs {library}: pip install {library}'):
            Runtime(detector)

    @pytest.mark.parametrize('images, message', [
        (np.zeros((1, 3, 64, 64), np.uint8), r'takes 64x96 pixels .*, not 64x64'),
        (np.zeros((1, 3, 64, 96), np.float32), r'uint8, not \(1, 3, 64, 96\) float32'),
        (np.zeros((3, 64, 96), np.uint8), r'are \(N, 3, H, W\)')])
    def test_images_beside_the_graph(self, detector, images, message):
        with pytest.raises(RuntimeFileError, match=message):
            Runtime(detector).run(images)

    @pytest.mark.parametrize('size', [(64, 31), (64, 80)])
    def test_open_size_has_bounds(self, tmp_path, size):
        path = write_graph(tmp_path / 'tiny.onnx', metadata_of(dynamic=('size', )))
        with pytest.raises(RuntimeFileError, match='multiples of 32 from 32 pixels on, not 64x'):
            Runtime(path, size=size)

    def test_fixed_batch(self, tmp_path):
        """Images go through it one by one."""
        model = Runtime(write_graph(tmp_path / 'tiny.onnx', metadata_of(dynamic=())))
        images = [np.full((9, 9), level, np.uint8) for level in (255, 0, 51)]
        assert [found.scores[0] for found in model(images, batch_size=2)] == pytest.approx(
            [1, 0, .2], abs=1e-4)
        with pytest.raises(RuntimeFileError, match='takes batches of 1, not of 2: export with'):
            model.run(np.zeros((2, 3, 64, 96), np.uint8))

    def test_raw(self, tmp_path):
        model = Runtime(write_graph(tmp_path / 'tiny.onnx', metadata_of(raw=True, resize=None)))
        assert set(model.run(np.zeros((1, 3, 64, 96), np.uint8))) == {'labels', 'boxes', 'scores'}
        with pytest.raises(RuntimeFileError, match=r'exported with --raw: call run\(\)'):
            model(np.zeros((9, 9), np.uint8))


class TestCommand:

    def test_folder(self, detector, photos, tmp_path, capsys):
        (photos / 'broken.png').write_bytes(b'no image')
        (photos / 'lost.png').symlink_to(photos / 'nowhere')
        (photos / 'notes.txt').write_text('no image either')
        out = tmp_path / 'out'
        assert run(detector, photos, '--out-dir', out, '--batch-size', 2, '--threads', 1) == 1
        results = read_results(out)
        assert results['source'] == str(photos) and results['classes'] == CLASSES
        assert results['score_threshold'] == .3
        assert {each['file']: [found['class_name'] for found in each['detections']]
                for each in results['results']} == {
                    'dark.jpg': [], 'süb/grey.png': ['dog'], 'white.png': ['dog', 'cät']}
        assert {each['file']: (each['width'], each['height']) for each in results['results']
                }['white.png'] == (100, 305)
        assert set(results['failures']) == {'broken.png', 'lost.png'}
        said = capsys.readouterr()
        assert '3 detections in 3 images' in said.out and ' a second' in said.out
        assert said.err.count('error: ') == 2 and 'Traceback' not in said.err
        written = {str(path.relative_to(out)) for path in out.rglob('*') if path.is_file()}
        assert written == {'results.json', 'dark.jpg', 'süb/grey.png', 'white.png'}
        with Image.open(out / 'white.png') as picture:
            assert picture.size == (100, 305) and len(picture.getcolors(1000)) > 3

    def test_patterns_and_several(self, model, photos, tmp_path):
        out = tmp_path / 'out'
        assert run(model, photos / '**' / '*.png', photos / 'dark.jpg', '--json',
                   out / 'found.json') == 0
        found = json.loads((out / 'found.json').read_text())['results']
        assert [each['file'] for each in found] == ['süb/grey.png', 'white.png', 'dark.jpg']
        assert len([*out.iterdir()]) == 1

    def test_classifier(self, photos, tmp_path):
        path = write_graph(tmp_path / 'tiny.onnx', metadata_of('classification'))
        assert run(path, photos / 'white.png', '--out-dir', tmp_path / 'out', '--top', 2) == 0
        results = read_results(tmp_path / 'out')
        assert results['top'] == 2 and len(results['results'][0]['predictions']) == 2
        assert (tmp_path / 'out' / 'white.png').is_file()

    def test_video(self, model, video, tmp_path):
        out = tmp_path / 'out'
        assert run(model, video, '--out-dir', out, '--batch-size', 5, '--score-thr', 0) == 0
        frames = read_results(out)['results']
        assert [(each['file'], each['frame']) for each in frames] == [
            ('film.avi', number) for number in range(12)]
        scores = [each['detections'][0]['score'] for each in frames]
        assert scores == sorted(scores) and scores[-1] == pytest.approx(220 / 255, abs=.02)
        film = cv2.VideoCapture(str(out / 'film.mp4'))
        assert film.get(cv2.CAP_PROP_FRAME_COUNT) == 12 and film.get(cv2.CAP_PROP_FPS) == 10
        assert {path.name for path in out.iterdir()} == {'results.json', 'film.mp4'}

    def test_broken_videos(self, model, video, tmp_path, capsys):
        (tmp_path / 'empty.mp4').write_bytes(b'')
        assert run(model, tmp_path / 'empty.mp4', '--out-dir', tmp_path / 'out') == 1
        assert 'empty.mp4 cannot be opened' in capsys.readouterr().err
        assert not [*tmp_path.glob('out/*')]
        noise = np.random.default_rng(0).integers(0, 255, (20, 64, 96, 3), np.uint8)
        film = cv2.VideoWriter(str(video), cv2.VideoWriter_fourcc(*'MJPG'), 10, (96, 64))
        for frame in noise:
            film.write(frame)
        film.release()
        content = video.read_bytes()
        video.write_bytes(content[:len(content) // 2])
        assert run(model, video, '--json', tmp_path / 'found.json') == 1
        assert 'breaks off after' in capsys.readouterr().err

    @pytest.mark.parametrize('wish', [KeyboardInterrupt, SystemExit(143)], ids=str)
    def test_camera_ends_with_a_signal(self, model, tmp_path, monkeypatch, wish):
        """What was seen until then is written."""
        def go_on():
            yield from [np.full((60, 80, 3), 255, np.uint8)] * 3
            raise wish

        use_camera(monkeypatch, go_on())
        assert run(model, 7, '--out-dir', tmp_path / 'out') == 0
        assert [each['frame'] for each in read_results(tmp_path / 'out')['results']] == [0, 1, 2]
        assert (tmp_path / 'out' / 'camera 7.mp4').stat().st_size

    @pytest.mark.parametrize('back', [True, False])
    def test_stream_that_breaks_off(self, model, tmp_path, monkeypatch, capsys, back):
        """It is opened again; a password in its name is told nobody."""
        monkeypatch.setattr(runtime, 'PAUSE', 0)
        film = [np.full((60, 80, 3), 255, np.uint8)] * 3
        again = [np.full((30, 40, 3), 255, np.uint8)] * 2  # in another size
        use_camera(monkeypatch, iter(film), *([iter(()), iter(again)] if back else []))
        assert run(model, 'rtsp://me:secret@host:554/yard?key=secret', '--out-dir', tmp_path) == 1
        said, content = capsys.readouterr().err, (tmp_path / 'results.json').read_text()
        results = json.loads(content)
        assert len(results['results']) == (5 if back else 3)
        assert results['source'] == results['results'][0]['file'] == 'rtsp://host:554/yard'
        assert said.count('is opened again, ') == (7 if back else 5) and 'did not come back' in said
        assert 'secret' not in said + content
        written = cv2.VideoCapture(str(tmp_path / 'yard.mp4'))
        assert written.get(cv2.CAP_PROP_FRAME_COUNT) == len(results['results'])

    def test_no_room_for_results(self, model, video, tmp_path, capsys):
        """Those that fit are kept, and the file is whole."""
        resource = pytest.importorskip('resource')
        place, limits = tmp_path / 'found.json', resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (900, limits[1]))
        try:
            assert run(model, video, '--json', place, '--score-thr', 0) == 1
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        said, results = capsys.readouterr().err, json.loads(place.read_text())
        assert 1 <= len(results['results']) < 5 and place.stat().st_size <= 900
        assert 'cannot be written any further: File too large' in said and said.count('\n') == 1
        assert results['failures'].keys() == {'results'}

    def test_ctrl_c_leaves_what_was(self, model, photos, tmp_path, monkeypatch, capsys):
        out = tmp_path / 'out'
        run(model, photos, '--out-dir', out)
        before, write, calls = (out / 'results.json').read_bytes(), runtime._write_picture, []

        def interrupt(*args):
            calls.append(args)
            if len(calls) == 2:
                raise KeyboardInterrupt
            return write(*args)

        monkeypatch.setattr(runtime, '_write_picture', interrupt)
        assert run(model, photos, '--out-dir', out, '--top', 1) == 130
        assert capsys.readouterr().err == 'stopped by Ctrl-C\n'
        assert (out / 'results.json').read_bytes() == before
        assert not [*out.rglob('*.unfinished*')]

    def test_memory_is_flat(self, model, tmp_path):
        path, side = tmp_path / 'long.avi', 400
        film = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*'MJPG'), 10, (side, side))
        for _ in range(60):
            film.write(np.zeros((side, side, 3), np.uint8))
        film.release()
        run(model, path, '--json', tmp_path / 'a.json')
        tracemalloc.start()
        assert run(model, path, '--json', tmp_path / 'a.json', '--batch-size', 2) == 0
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 10 * 3 * side**2

    def test_hostile_names(self, model, tmp_path, capsys):
        folder = tmp_path / 'photos'
        folder.mkdir()
        for name in (b'a\n\x1b[2J.png', b'\xff.png', '‮gnp.png'.encode()):
            Image.new('RGB', (20, 20)).save(io.BytesIO(), 'PNG')
            (folder / os.fsdecode(name)).write_bytes(b'broken')
            with open(os.path.join(os.fsencode(folder), b'good' + name), 'wb') as file:
                Image.new('RGB', (20, 20)).save(file, 'PNG')
        assert run(model, folder, '--out-dir', tmp_path / 'out') == 1
        said = capsys.readouterr().err
        assert len(said.splitlines()) == 3 and not set('\x1b‮') & set(said)
        results = read_results(tmp_path / 'out')
        assert len(results['results']) == len(results['failures']) == 3
        assert len([*(tmp_path / 'out').glob('good*')]) == 3


class TestPlaces:

    @pytest.mark.parametrize('place', ['same folder', 'link', 'hard link', 'model'])
    def test_what_is_read_is_not_overwritten(self, model, photos, tmp_path, place, capsys):
        out, before = tmp_path / 'out', (photos / 'white.png').read_bytes()
        words = [model, photos / 'white.png']
        if place == 'same folder':
            out = photos
        elif place == 'model':
            words += ['--json', model]
        else:
            out.mkdir()
            (os.symlink if place == 'link' else os.link)(photos / 'white.png', out / 'white.png')
        content = model.read_bytes()
        assert run(*words, '--out-dir', out) == 1
        assert ', which is read: choose another' in capsys.readouterr().err
        assert (photos / 'white.png').read_bytes() == before and model.read_bytes() == content

    @pytest.mark.parametrize('kind, message', [
        ('folder', 'no regular file'), ('FIFO', 'no regular file'),
        ('lost link', 'a link that leads nowhere'), ('file in the way', 'cannot be written')])
    def test_no_place(self, model, photos, tmp_path, kind, message, capsys):
        out = tmp_path / 'out'
        if kind == 'file in the way':
            out.write_text('')
        else:
            out.mkdir()
            place = out / 'results.json'
            dict(folder=place.mkdir, FIFO=lambda: os.mkfifo(place)).get(
                kind, lambda: place.symlink_to('nowhere'))()
        assert run(model, photos, '--out-dir', out) == 1
        said = capsys.readouterr().err
        assert message in said and said.startswith('error: ') and said.count('\n') == 1

    def test_results_in_the_folder_are_no_input(self, model, photos):
        for _ in range(2):
            assert run(model, photos, '--out-dir', photos / 'out') == 0
            assert len(read_results(photos / 'out')['results']) == 3

    def test_links_and_permissions(self, model, photos, tmp_path):
        (tmp_path / 'far').mkdir()
        (tmp_path / 'far' / 'real.json').write_text('old')
        (tmp_path / 'far' / 'real.json').chmod(0o640)
        (tmp_path / 'found.json').symlink_to(tmp_path / 'far' / 'real.json')
        assert run(model, photos, '--json', tmp_path / 'found.json') == 0
        assert (tmp_path / 'found.json').is_symlink()
        assert json.loads((tmp_path / 'far' / 'real.json').read_text())['results']
        assert (tmp_path / 'far' / 'real.json').stat().st_mode & 0o777 == 0o640

    def test_picture_that_its_format_cannot_hold(self, model, photos, tmp_path, capsys):
        Image.new('RGB', (16400, 2)).save(photos / 'wide.png')
        (photos / 'wide.png').rename(photos / 'wide.webp')
        assert run(model, photos / 'wide.webp', '--out-dir', tmp_path / 'out') == 1
        assert 'its results are in their file' in capsys.readouterr().err
        assert read_results(tmp_path / 'out')['results'][0]['width'] == 16400

    @pytest.mark.parametrize('words, status, message', [
        (['none'], 1, 'input none does not'), (['*.none'], 1, r'input \*\.none does not exist'),
        (['empty'], 1, 'folder empty holds no images'), (['pipe.png'], 1, 'is no file'),
        (['empty/*.png'], 1, 'no image or video has a name of this pattern'),
        (['ftp://a/b.avi'], 1, 'is no file, and no stream of http, https'),
        (['http://['], 1, 'is no URL'), (['http://a/b.jpg'], 1, 'is a URL: download it'),
        (['rtsp://a/b', 'a.png'], 1, 'is a stream: give it alone'),
        (['sound.mp4'], 1, 'sound.mp4 cannot be opened as a video: it is damaged, or holds no'),
        (['99'], 1, 'camera 99 cannot be opened: there is none of this number'),
        (['film.avi', 'a.png'], 1, 'is a video: give it alone'),
        (['a.png', '--batch-size', '0'], 2, 'must be a whole number, at least 1')])
    def test_inputs(self, model, tmp_path, monkeypatch, capsys, words, status, message):
        monkeypatch.chdir(tmp_path)
        (tmp_path / 'empty').mkdir()
        for name in ('film.avi', 'a.png'):
            (tmp_path / name).write_bytes(b'')
        with wave.open(str(tmp_path / 'sound.mp4'), 'wb') as sound:
            sound.setparams((1, 2, 8000, 0, 'NONE', ''))
            sound.writeframes(bytes(8000))
        os.mkfifo(tmp_path / 'pipe.png')
        try:
            found = run(model, *words)
        except SystemExit as error:
            found = error.code
        said = capsys.readouterr().err
        assert found == status and re.search(message, said)
        assert 'Traceback' not in said


@pytest.mark.slow
@pytest.mark.parametrize('suffix', LIBRARIES)
def test_three_packages_are_enough(suffix, photos, video, tmp_path):
    """The file alone, in an environment with numpy, Pillow and what runs the model."""
    place = tmp_path / 'bare'
    venv.create(place, with_pip=True)
    python = place / ('Scripts' if os.name == 'nt' else 'bin') / 'python'
    install = subprocess.run([python, '-m', 'pip', 'install', '-q', 'numpy', 'pillow',
                              LIBRARIES[suffix]], capture_output=True, text=True)
    if install.returncode:
        pytest.skip(f'pip cannot install here: {install.stderr[-200:]}')
    path = write_file(suffix, tmp_path)
    another = '.xml' if suffix == '.onnx' else '.onnx'
    other, needs = write_file(another, tmp_path), LIBRARIES[another]
    shutil.copy(runtime.__file__, place / 'runtime.py')

    def call(*words):
        return subprocess.run([python, place / 'runtime.py', *words], cwd=place, text=True,
                              capture_output=True, env={'PATH': os.environ['PATH']})

    done = call(path, photos)
    assert done.returncode == 0, done.stderr
    for each in read_results(place / 'outputs')['results']:
        expected = Runtime(path)(photos / each['file']).above(.3).as_records()
        assert each['detections'] == expected
    # A hint, where something else is needed.
    for words, message in (((other, photos), f'needs {needs}: pip install {needs}'),
                           ((path, video), 'needs OpenCV: pip install opencv-python-headless')):
        done = call(*words)
        assert done.returncode == 1 and message in done.stderr and done.stderr.count('\n') == 1
