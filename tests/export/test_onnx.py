"""ONNX files: operations that every runtime has, and nothing of the machine that wrote them."""
import json
from pathlib import Path

import onnx
import onnx_ir
import onnxruntime
import pytest
import torch
from torch.testing import assert_close

from spartan_mm.backbones.spartan import CMixer
from spartan_mm.export.form import export_form
from spartan_mm.export.graph import make_graph
from spartan_mm.export.onnx import _simplify, find_scopes, write_onnx

pytestmark = pytest.mark.slow


@pytest.mark.parametrize('task', ['detector', 'classifier'])
def test_operations_are_those_that_every_runtime_has(exported, task):
    model = onnx.load(exported(task).path)
    found = {node.op_type for node in model.graph.node}
    assert not found & {'Loop', 'If', 'Scan', 'NonZero', 'ScatterND', 'ScatterElements',
                        'GridSample', 'SequenceConstruct'}
    assert {entry.domain: entry.version for entry in model.opset_import}[''] == 18
    # Core ML and others have no more axes.
    shapes = [value.type.tensor_type.shape.dim for value in model.graph.value_info]
    assert max(map(len, shapes)) <= 5


@pytest.mark.parametrize('task', ['detector', 'classifier'])
def test_runtimes_find_what_they_know(exported, task, tmp_path):
    """No map of a CMixer is made only to be taken apart, and GELU is one operation."""
    path = exported(task).path
    scopes, nodes = find_scopes(path), onnx.load(path).graph.node
    made = {output for node in nodes if node.op_type == 'Conv' and 'cmixer' in scopes[node.name]
            for output in node.output}
    divided = {node.input[0] for node in nodes if node.op_type == 'Split'}
    assert made and not made & divided

    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / 'optimized.onnx')
    options.log_severity_level = 3  # it warns that the file is for this machine
    onnxruntime.InferenceSession(path, options)
    found = [node.op_type for node in onnx.load(tmp_path / 'optimized.onnx').graph.node]
    assert 'Erf' not in found
    assert found.count('Gelu') + found.count('BiasGelu') == sum(
        node.op_type == 'Erf' for node in nodes)


def test_weights_of_a_wide_mixer_are_weights(tmp_path):
    mixer = CMixer(384, 2)  # halves of 294,912 numbers
    images = torch.rand(1, 384, 4, 4)
    with export_form(mixer), torch.no_grad():
        torch.onnx.export(mixer, (images, ), tmp_path / 'plain.onnx', dynamo=True, optimize=False,
                          opset_version=18, verbose=False)
    model = onnx_ir.load(tmp_path / 'plain.onnx')
    _simplify(model)
    weights = {*model.graph.initializers}
    convolutions = [node for node in model.graph if node.op_type == 'Conv']
    assert len(convolutions) == 6
    assert all(node.inputs[1].name in weights for node in convolutions)


def test_nothing_tells_of_this_machine(exported):
    content = exported('detector').path.read_bytes()
    assert str(Path(__file__).parents[2]).encode() not in content
    assert b'site-packages' not in content and b'stack_trace' not in content


def test_nodes_know_their_modules(exported):
    scopes = {*find_scopes(exported('detector').path).values()}
    assert {'', 'model.decoder.query_pos_head.0', 'model.neck.input_projs.2.conv',
            'model.decoder.layers.0.cross_attn'} <= scopes


@pytest.mark.parametrize('task', ['detector', 'classifier'])
def test_metadata_say_what_running_takes(exported, task):
    given = exported(task)
    found = {entry.key: json.loads(entry.value)
             for entry in onnx.load(given.path).metadata_props}
    assert found['task'] == ('detection' if task == 'detector' else 'classification')
    assert found['model'] == f'small_{task}'
    assert found['input'] == dict(
        size=[64, 64] if task == 'detector' else [32, 32], dynamic=['batch'],
        multiple_of=32, min_size=64, color='RGB', range=[0, 255], normalized_inside=True,
        mean=None, std=[255.] * 3)
    assert found['check']['rows'] and found['precision'] == 'fp32'
    assert len(found['checkpoint_sha256']) == len(found['config_sha256']) == 64


def test_invalid_anchors_go_through_the_decoder(exported, tmp_path):
    # 64 by 64 cells on the finest map, those at the border too near to it.
    model = exported('detector').model
    with torch.no_grad():
        token = model.memory_trans_norm(model.memory_trans_fc.bias)
        branch = model.bbox_head.cls_branches[-1]
        branch.weight[0] = 3 * token  # no token is closer to this one than that of zero memory
        branch.bias[0] = 0
    graph = make_graph(model, raw=True)
    images = torch.randint(0, 256, (2, 3, 512, 512), dtype=torch.uint8)
    with torch.no_grad():
        features = model.extract_feat(images / 255)
        encoded = model.forward_encoder(**model.pre_transformer(features)[0])
        selected = model.pre_decoder(**encoded)[0]['reference']
        expected = graph(images)
    assert (selected > 100).any(-1).all()

    write_onnx(graph, tmp_path / 'graph.onnx', (512, 512))
    session = onnxruntime.InferenceSession(tmp_path / 'graph.onnx')
    found = [torch.from_numpy(each) for each in session.run(None, dict(images=images.numpy()))]
    # All queries are the same, so their order is, too.
    assert_close(found, [*expected], rtol=1e-4, atol=1e-4)


def test_a_fixed_size_has_a_fixed_number_of_tokens(exported):
    model = onnx.load(exported('detector').path)
    constants = {each.name for each in model.graph.initializer} | {
        node.output[0] for node in model.graph.node if node.op_type == 'Constant'}
    tops = [node for node in model.graph.node if node.op_type == 'TopK']
    assert len(tops) == 2 and all(node.input[1] in constants for node in tops)


def test_size_is_free_on_request(exported, tmp_path):
    graph = make_graph(exported('detector').model, raw=True)
    write_onnx(graph, tmp_path / 'graph.onnx', (64, 96), ('batch', 'size'))
    session = onnxruntime.InferenceSession(tmp_path / 'graph.onnx')
    for shape in ((1, 3, 64, 64), (5, 3, 96, 160)):
        images = torch.randint(0, 256, shape, dtype=torch.uint8)
        with torch.no_grad():
            expected, _ = graph(images)
        found = torch.from_numpy(session.run(None, dict(images=images.numpy()))[0])
        # Queries have no stable order.
        assert_close(found.sort(1).values, expected.sort(1).values, rtol=1e-4, atol=1e-4)
