"""Lower precision: what is rounded, and what must not be."""
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
from onnx import TensorProto

from spartan_mm.export import quantize
from spartan_mm.export.onnx import find_scopes
from spartan_mm.export.pictures import resized
from spartan_mm.export.race import open_bare
from spartan_mm.runtime import Runtime

pytestmark = pytest.mark.slow

IMAGES = [resized(np.random.default_rng(seed).integers(0, 256, (3, 5, 5), np.uint8), (64, 64))
          for seed in range(4)]
BATCHES = [*quantize.batches(IMAGES)]


@pytest.fixture(scope='module')
def int8(exported, tmp_path_factory):
    """An ONNX file in 8 bits, and the modules of its nodes."""
    path = tmp_path_factory.mktemp('int8') / 'int8.onnx'
    source = exported('detector').path
    quantize.quantize_onnx(source, path, BATCHES)
    return SimpleNamespace(path=path, nodes=onnx.load(path).graph.node, scopes=find_scopes(source))


def is_float(module):
    """Whether nothing that a module sees may be rounded."""
    return bool('backbone' in module or quantize.DECODER.search(module))


def test_decoder_and_backbone_see_no_rounded_map(int8):
    made = {name: node for node in int8.nodes for name in node.output}
    rounded = {name for name, node in made.items()
               if node.op_type == 'DequantizeLinear' and node.input[0] in made}
    seen = [(node.name, int8.scopes[node.name]) for node in int8.nodes
            if node.name in int8.scopes and rounded.intersection(node.input)]
    assert seen and not [name for name, module in seen if is_float(module)]


def test_weights_of_all_convolutions_are_of_8_bits(int8):
    made = {node.output[0]: node.op_type for node in int8.nodes}
    restored = {int8.scopes[node.name]: made.get(node.input[1]) == 'DequantizeLinear'
                for node in int8.nodes if node.op_type == 'Conv'}
    assert restored['model.neck.lateral_convs.0.conv']
    assert restored['model.decoder.input_projs.0.conv']
    assert restored['model.backbone.stages.2.blocks.0.cmixer']
    assert not restored['model.backbone.stages.0.blocks.0.smixer.proj_in']  # a few numbers


def test_int8_file_is_smaller_and_runs(exported, int8):
    assert int8.path.stat().st_size < exported('detector').path.stat().st_size
    found = Runtime(int8.path).run(*BATCHES[0])
    assert found['boxes'].shape == (1, 20, 4) and np.isfinite(found['boxes']).all()


def test_openvino_int8_leaves_decoder_and_backbone_in_float(exported):
    source = exported('detector').path
    model = quantize.quantize_openvino(source, BATCHES[:1])
    scopes = find_scopes(source)
    rounded = [node.get_friendly_name() for node in model.get_ops() if any(
        each.get_source_output().get_node().get_type_name() == 'FakeQuantize'
        for each in node.inputs())]
    assert len(rounded) > 10
    assert not [name for name in rounded if is_float(scopes.get(name, 'model.neck'))]


def test_float16_stays_float32_from_the_stream_to_the_argmax(exported, tmp_path):
    source, path = exported('detector').path, tmp_path / 'half.onnx'
    quantize.to_float16(source, path)
    model = onnx.shape_inference.infer_shapes(onnx.load(path), strict_mode=True)
    types = {value.name: value.type.tensor_type.elem_type for value in (
        *model.graph.value_info, *model.graph.input, *model.graph.output)}
    scopes, made = find_scopes(source), {name: node for node in model.graph.node
                                         for name in node.output}
    for node in model.graph.node:
        if node.op_type == 'ArgMax':
            while not scopes[node.name].endswith('blocks.0'):  # back to the sum of a block
                node = made[node.input[0]]
                assert types[node.output[0]] == TensorProto.FLOAT
    kinds = {types[node.output[0]] for node in model.graph.node if node.op_type == 'Conv'}
    assert kinds == {TensorProto.FLOAT16}
    assert path.stat().st_size < 0.8 * source.stat().st_size


def test_float16_computes_much_the_same(exported, tmp_path):
    source, path = exported('detector').path, tmp_path / 'half.onnx'
    quantize.to_float16(source, path)
    images, sizes = map(np.concatenate, zip(*BATCHES, strict=True))
    found, wanted = (Runtime(file).run(images, sizes) for file in (path, source))
    assert {name: value.dtype for name, value in found.items()} == {
        name: value.dtype for name, value in wanted.items()}
    assert np.abs(found['scores'] - wanted['scores']).max() < 0.01
    flips = [(one != other).mean() for one, other in zip(
        *(open_bare(file, 'onnxruntime', argmax=True)(images, sizes)
          for file in (path, source)), strict=True)]
    assert np.mean(flips) < 0.02
