"""What TensorRT is given, which runs on no machine without a GPU: commands, layers, refusals."""
import os
import subprocess
import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import onnx
import pytest
import tensorrt_bench
from onnx import TensorProto, helper

from spartan_mm.errors import UsageError
from spartan_mm.export import tensorrt
from spartan_mm.export.onnx import find_scopes
from spartan_mm.requirements import RequirementError
from spartan_mm.runtime import Runtime


@pytest.fixture
def run_script(exported, tmp_path):
    """Writes the script of a detector in float16, and runs it with a trtexec of some version."""
    def run(version):
        source = exported('detector').path
        shapes = tensorrt.find_shapes(source)
        script, path = tmp_path / 'build.sh', tmp_path / 'small_detector_fp16.onnx'
        script.write_text(tensorrt.write_script(source, path, shapes))
        commands = tmp_path / 'bin'
        commands.mkdir()
        if version:
            trtexec = commands / 'trtexec'
            trtexec.write_text('#!/bin/sh\necho "&&&& RUNNING TensorRT.trtexec [TensorRT '
                               f'v{version}] [b26] # trtexec"\nprintf "%s\\n" "$@"\n')
            trtexec.chmod(0o755)
        done = subprocess.run(['sh', str(script), '--verbose'], capture_output=True, text=True,
                              env=dict(os.environ, PATH=f'{commands}:/usr/bin:/bin'))
        flags = [line.partition('=')[::2] for line in done.stdout.splitlines()[1:]]
        return SimpleNamespace(status=done.returncode, error=done.stderr, flags=dict(flags))
    return run


@pytest.mark.parametrize('version', ['8601', '100600', '110100'])
def test_commands_follow_the_version(run_script, version, exported):
    done = run_script(version)
    assert done.status == 0
    flags, typed = done.flags, version == '110100'
    size = 'x'.join(map(str, Runtime(exported('detector').path).size))
    assert flags['--onnx'] == (f'small_detector{"_fp16" if typed else ""}.onnx')
    assert flags['--saveEngine'] == 'small_detector_fp16.engine'
    assert flags['--minShapes'] == f'images:1x3x{size},orig_target_sizes:1x2'
    assert flags['--maxShapes'] == f'images:8x3x{size},orig_target_sizes:8x2'
    assert '--verbose' in flags
    constraints = {'--fp16', '--precisionConstraints', '--layerPrecisions', '--layerOutputTypes'}
    assert constraints & {*flags} == (set() if typed else constraints)


@pytest.mark.parametrize('version, words', [
    ('8503', 'TensorRT 8503 is too old for these graphs: use 8.6 or newer'),
    (None, 'trtexec, a part of TensorRT, is not on the PATH')])
def test_commands_refuse(run_script, version, words):
    done = run_script(version)
    assert done.status == 1
    assert words in done.error
    assert not done.flags


def test_layers_that_stay_in_float32(exported):
    path = exported('detector').path
    scopes, nodes = find_scopes(path), {node.name: node for node in onnx.load(path).graph.node}
    computing, giving = tensorrt.find_layers(path)
    assert {*giving} < {*computing} < {*nodes}

    for kind in ('InstanceNormalization', 'LayerNormalization', 'ArgMax', 'Softmax', 'TopK'):
        assert {name for name, node in nodes.items() if node.op_type == kind} <= {*computing}
    # What an argmax looks at is not rounded to float16 between two layers, either.
    makers = {output: node.name for node in nodes.values() for output in node.output}
    assert {makers[node.input[0]] for node in nodes.values() if node.op_type == 'ArgMax'
            } <= {*giving}
    # Boxes, and where queries look.
    kept = {scopes[name] for name in computing if nodes[name].op_type in ('MatMul', 'Gemm')}
    assert {'model.decoder.query_pos_head.0', 'model.bbox_head.reg_branches.0.4',
            'model.bbox_head.cls_branches.0'} <= kept
    # What costs time is in float16.
    free = {scopes[name] for name, node in nodes.items()
            if node.op_type in ('Conv', 'MatMul', 'Gemm', 'Split') and name not in computing}
    assert {'model.decoder.layers.0.linear1', 'model.decoder.layers.0.cross_attn.output_proj',
            'model.backbone.stages.0.blocks.0.cmixer'} <= free
    assert not any(nodes[name].op_type in ('Conv', 'Split') for name in computing)


def test_a_float16_file_and_its_script(exported, tmp_path, monkeypatch):
    monkeypatch.setattr(tensorrt, 'find_spec', lambda name: None)
    source, path = exported('detector').path, tmp_path / 'small_detector_fp16.onnx'
    metadata = dict(Runtime(source).metadata, precision='fp16')
    run = tensorrt.write(SimpleNamespace(path=path, precision='fp16', onnx=lambda: source,
                                         metadata=metadata))
    assert {each.name for each in tmp_path.iterdir()} == {
        'small_detector.onnx', 'small_detector_fp16.onnx', 'small_detector_fp16.trtexec.sh'}
    right = Runtime(tmp_path / 'small_detector.onnx')
    assert right.metadata['precision'] == 'fp32'
    images = np.random.default_rng(0).integers(0, 256, (2, 3, *right.size)).astype(np.uint8)
    expected, found = right.run(images), run(images, None)
    assert tensorrt_bench.compare(expected, found)['same'] > 0.5
    assert not np.array_equal(expected['scores'], found['scores'])


def _graph(*nodes, k=None, sides=(64, 64)):
    inputs = [helper.make_tensor_value_info('images', TensorProto.FLOAT, ('batch', 3, *sides))]
    constants = [] if k is None else [helper.make_tensor('k', TensorProto.INT64, [1], [k])]
    return helper.make_model(helper.make_graph(nodes, 'graph', inputs, [], constants))


@pytest.mark.parametrize('graph, words', [
    (_graph(helper.make_node('GridSample', ['images', 'grid'], ['out'])), 'GridSample'),
    (_graph(helper.make_node('TopK', ['images', 'k'], ['out', 'rows'], 'top')), 'a free number'),
    (_graph(helper.make_node('TopK', ['images', 'k'], ['out', 'rows'], 'top'), k=3841),
     'top selects 3841 of its rows'),
    (_graph(sides=('rows', 64)), 'the size of images is free')])
def test_graphs_that_are_refused(graph, words, tmp_path):
    onnx.save(graph, tmp_path / 'model.onnx')
    with pytest.raises(UsageError, match=words):
        tensorrt.check_graph(tmp_path / 'model.onnx')


def test_an_old_tensorrt_is_refused(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'tensorrt', ModuleType('tensorrt'))
    sys.modules['tensorrt'].__version__ = '8.5.1'
    path = tmp_path / 'model.onnx'
    with pytest.raises(RequirementError, match='TensorRT 8.5.1 is too old .* use 8.6 or newer'):
        tensorrt.build_engine(path, path, tmp_path / 'model.engine', {})


def test_constraints_by_the_builder():
    def layer(name):
        types = []
        return SimpleNamespace(name=name, precision=None, types=types,
                               set_output_type=lambda *args: types.append(args))
    layers = [layer(name) for name in ('argmax', 'norm', 'conv')]
    flags = SimpleNamespace(FP16='fp16', OBEY_PRECISION_CONSTRAINTS='obey')
    chosen = []
    tensorrt.constrain(
        SimpleNamespace(BuilderFlag=flags, float32='float32'),
        SimpleNamespace(num_layers=3, get_layer=layers.__getitem__),
        SimpleNamespace(set_flag=chosen.append), {'argmax', 'norm'}, {'norm'})
    assert chosen == ['fp16', 'obey']
    assert [each.precision for each in layers] == ['float32', 'float32', None]
    assert [each.types for each in layers] == [[], [(0, 'float32')], []]


@pytest.mark.parametrize('precision', ['fp32', 'fp16'])
def test_an_engine_gives_what_the_file_gives(precision, exported, tmp_path):
    pytest.importorskip('tensorrt', reason='TensorRT is not installed')
    from spartan_mm.export import export_model
    config, checkpoint = exported('detector').config, exported('detector').checkpoint
    path = export_model(config, checkpoint, 'tensorrt', tmp_path, precision=precision, check=None)
    engine = tensorrt.Engine(tensorrt.engine_of(path, precision))
    runtime = Runtime(tmp_path / 'small_detector.onnx')
    for batch in (1, 3):
        images = np.random.default_rng(0).integers(0, 256, (batch, 3, *runtime.size))
        images = images.astype(np.uint8)
        found = tensorrt_bench.compare(runtime.run(images), engine.run(images))
        assert found['same'] > (0.99 if precision == 'fp32' else 0.8)


def test_comparison_of_engines():
    right = dict(labels=np.array([[1, 2, 3]]), scores=np.array([[0.9, 0.8, 0.1]]),
                 boxes=np.array([[[0, 0, 50, 50], [50, 50, 100, 100], [0, 0, 9, 9]]], float))
    found = {name: x[:, [1, 0, 2]] for name, x in right.items()}  # another order
    found['scores'] = found['scores'] - 0.01
    assert tensorrt_bench.compare(right, found) == dict(same=1, difference=pytest.approx(0.01))
    found['boxes'][0, 0] += 3
    assert tensorrt_bench.compare(right, found)['same'] == 0.5


def test_the_bench_wants_all_files_first(tmp_path):
    (tmp_path / 'model.onnx').touch()
    with pytest.raises(tensorrt_bench.InputError, match='model_fp16.onnx is not there'):
        tensorrt_bench.main([str(tmp_path / 'model.onnx')])


def test_a_row_of_the_bench():
    result = dict(model='xt', precision='fp16', batch=8, build_s=61.2, bytes=2**21,
                  gpu_ms=[2.0, 2.0, 4.0], total_ms=[5.0], difference=0.001, same=1.0)
    assert dict(zip(tensorrt_bench.COLUMNS, tensorrt_bench.row(result), strict=True)) == {
        'model': 'xt', 'precision': 'fp16', 'batch': '8', 'build, s': '61', 'MiB': '2.0',
        'ms on the GPU': '2.000', 'p90': '3.600', 'images/s': '4000', 'ms with copies': '5.000',
        'largest difference': '1.0e-03', 'same': '100.0 %'}
