"""Lower precision: what is rounded, and what must not be."""
from types import SimpleNamespace

import numpy as np
import onnx
import openvino
import pytest
from onnx import TensorProto

from spartan_mm.export import quantize
from spartan_mm.export.onnx import find_scopes
from spartan_mm.export.pictures import resized
from spartan_mm.export.race import argmax_outputs
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


def sources(nodes):
    """Each node with the operations that its inputs come from."""
    made = {name: node.op_type for node in nodes for name in node.output}
    return [(node, {made.get(name) for name in node.input}) for node in nodes]


def is_float(name, module):
    """Whether a node of an ONNX file must see nothing that was rounded for it."""
    return 'argmax' in name or bool(quantize.DECODER.search(module)
                                    or quantize.STREAM.search(module))


def test_decoder_and_argmax_see_nothing_rounded(int8):
    seen = {node.name: rounded for node, rounded in sources(int8.nodes)}
    kept = {name for name, module in int8.scopes.items() if is_float(name, module)}
    assert sum('argmax' in name for name in kept) == 4
    assert not [name for name in kept if 'DequantizeLinear' in seen[name]]


def test_all_other_convolutions_are_of_8_bits(int8):
    convs = [(int8.scopes[node.name], rounded == {'DequantizeLinear'})
             for node, rounded in sources(int8.nodes) if node.op_type == 'Conv']
    assert {module.split('.')[1] for module, _ in convs} == {'backbone', 'neck', 'decoder'}
    assert all(rounded for _, rounded in convs)


def test_int8_file_is_smaller_and_detects_much_the_same(exported, int8):
    source = exported('detector').path
    assert int8.path.stat().st_size < source.stat().st_size
    images, sizes = map(np.concatenate, zip(*BATCHES, strict=True))
    found, wanted = (Runtime(path).run(images, sizes)['scores'] for path in (int8.path, source))
    assert np.abs(found - wanted).max() < 0.1


def test_openvino_int8_leaves_decoder_and_argmax_in_float(exported):
    source = exported('detector').path
    model = quantize.quantize_openvino(openvino.convert_model(source), source, BATCHES)
    scopes, seen = find_scopes(source), {}
    for node in model.get_ops():
        seen[node.get_friendly_name()] = {
            value.get_source_output().get_node().get_type_name() for value in node.inputs()}
    assert sum('FakeQuantize' in types for types in seen.values()) > 40
    assert not [name for name, types in seen.items()
                if 'FakeQuantize' in types and is_float(name, scopes.get(name, 'model.neck'))]


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
        *(argmax_outputs(file)(images, sizes) for file in (path, source)), strict=True)]
    assert np.mean(flips) < 0.02
