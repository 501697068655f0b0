"""TensorRT: an ONNX file that it takes, how to build an engine of it, and an engine where it is.

Up to version 10 it chooses types itself, and is told which layers stay in float32. From 11 on types
are those of the graph, so that a float16 engine needs a file in float16.

NOTE: TensorRT takes an InstanceNormalization of three axes, a TopK with a constant K of at most
3840, bytes as an input that is cast at once, and reads GridSample of opset 20 and later as nearest.
"""
import shlex
import shutil
from collections.abc import Mapping, Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from packaging.version import Version

from ..errors import ExplainedError, UsageError
from ..files import write_whole
from ..requirements import RequirementError
from ..runtime import Runtime
from ..text import join
from .metadata import as_properties
from .onnx import find_scopes, set_metadata
from .quantize import needs_float32, to_float16

if TYPE_CHECKING:
    from .check import Run
    from .job import Job

__all__ = ['Engine', 'build_engine', 'set_metadata', 'write']

#: The oldest version that reads these graphs.
OLDEST = '8.6'

#: From this version on types are those of the graph.
TYPED = 11

#: The largest batch that engines are built for.
MAX_BATCH = 8

#: The largest K of a TopK.
MAX_TOPK = 3840

#: Operations that it has not, or gets wrong, or only runs with waits for the host.
REFUSED = {'GridSample', 'If', 'Loop', 'NonZero', 'ScatterND', 'SequenceEmpty'}

#: Operations whose types are no matter of choice.
UNTYPED = {'Cast', 'Constant', 'Shape'}

Shapes = Mapping[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]]
"""Of each input the least, the usual and the largest shape."""


class EngineError(ExplainedError, RuntimeError):
    """A graph that TensorRT cannot read or build an engine of."""


def write(job: 'Job') -> 'Run':
    """Write the ONNX file of a job and a script that builds its engine, see :mod:`.formats`.

    Where TensorRT is installed the engine is built, too, and is what runs.
    """
    source = job.path.with_name(f'{job.path.stem.removesuffix("_fp16")}.onnx')
    shutil.copy(job.onnx(), source)
    check_graph(source)
    if job.precision == 'fp16':
        to_float16(source, job.path, keep_float32)
        set_metadata(job.path, as_properties(job.metadata))
    set_metadata(source, as_properties(job.metadata | dict(precision='fp32')))
    shapes = find_shapes(source)
    with write_whole(job.path.with_suffix('.trtexec.sh')) as file:
        file.write(write_script(source, job.path, shapes).encode())
    if find_spec('tensorrt') is None:
        print(f'tensorrt is not installed here: build the engine where it will run, by '
              f'`sh {job.path.stem}.trtexec.sh`')
        return Runtime(job.path).run
    engine = engine_of(job.path, job.precision)
    build_engine(source, job.path, engine, shapes)
    return Engine(engine).run


def engine_of(path: str | Path, precision: str) -> Path:
    """The engine's file: its name says the precision."""
    return Path(path).with_name(f'{Path(path).stem.removesuffix("_fp16")}_{precision}.engine')


def keep_float32(node: Any, module: str) -> bool:
    """Whether a node of a graph, of a module, stays in float32 where others are float16.

    NOTE: Beside what any runtime needs, that is norms and attention scores: TensorRT does not
    promise to sum in float32. A Split of the exporter's optimizer is of no module, and would take
    all tokens along.
    """
    return node.op_type != 'Split' and (
        node.op_type == 'LayerNormalization' or module.endswith('self_attn')
        or needs_float32(node, module))


def check_graph(path: str | Path) -> None:
    """Refuse what TensorRT doesn't read, or not as it is meant.

    Raises:
        UsageError: There is such an operation, a K that is not constant, or a free side.
    """
    import onnx
    from onnx import numpy_helper
    graph = onnx.load(path).graph
    name = Path(path).name
    found = {node.op_type for node in graph.node} & REFUSED
    if found:
        raise UsageError(f'{name}: TensorRT is not given a graph with {join(sorted(found))}; write '
                         'it by --to tensorrt')
    free = [value.name for value in graph.input
            if any(not axis.dim_value for axis in value.type.tensor_type.shape.dim[1:])]
    if free:
        raise UsageError(f'{name}: the size of {free[0]} is free, but the number of queries that '
                         'follows from it must be constant in TensorRT; leave size out of '
                         '--dynamic')
    constants = {tensor.name: tensor for tensor in graph.initializer}
    for node in graph.node:
        if node.op_type == 'TopK':
            k = constants.get(node.input[1])
            k = None if k is None else int(numpy_helper.to_array(k).item())
            if k is None or k > MAX_TOPK:
                found = 'a free number' if k is None else k
                raise UsageError(f'{name}: {node.name} selects {found} of its rows, where TensorRT '
                                 f'takes a constant number of at most {MAX_TOPK}')


def find_shapes(path: str | Path, batch: int = 1, max_batch: int = MAX_BATCH) -> Shapes:
    """Shapes of the inputs of an ONNX file of which only the batch is free.

    Args:
        path: The file.
        batch: The batch to make it fastest for.
        max_batch: The largest one.
    """
    import onnx
    shapes = {}
    for value in onnx.load(path, load_external_data=False).graph.input:
        first, *rest = (axis.dim_value for axis in value.type.tensor_type.shape.dim)
        shapes[value.name] = tuple((first or count, *rest) for count in (1, batch, max_batch))
    return shapes


def find_layers(path: str | Path) -> tuple[list[str], list[str]]:
    """Layers of an ONNX file in float32 that have to stay in it.

    Returns:
        Names of those that compute in float32; and of those whose one output is in it, too.
    """
    import onnx
    from onnx import TensorProto
    graph = onnx.shape_inference.infer_shapes(onnx.load(path)).graph
    scopes = find_scopes(path)
    floats = {value.name for value in (*graph.input, *graph.value_info, *graph.output)
              if value.type.tensor_type.elem_type == TensorProto.FLOAT}
    floats |= {tensor.name for tensor in graph.initializer
               if tensor.data_type == TensorProto.FLOAT}
    computing, giving = [], []
    for node in graph.node:
        if node.op_type not in UNTYPED and keep_float32(node, scopes[node.name]):
            gives = len(node.output) == 1 and node.output[0] in floats
            if gives or floats.intersection(node.input):
                computing.append(node.name)
            if gives:
                giving.append(node.name)
    return computing, giving


def write_script(source: Path, path: Path, shapes: Shapes) -> str:
    """A shell script that builds the engine with trtexec, whatever version it is of.

    Args:
        source: The ONNX file in float32.
        path: The ONNX file to make an engine of, in float32 or float16.
        shapes: See :func:`find_shapes`.
    """
    precision = 'fp32' if path == source else 'fp16'
    engine = engine_of(path, precision)
    common = [f'--saveEngine={engine.name}', '--noTF32', *(
        f'--{what}Shapes=' + ','.join(f'{name}:{"x".join(map(str, shape[place]))}'
                                      for name, shape in shapes.items())
        for place, what in enumerate(('min', 'opt', 'max')))]
    chosen = [f'--onnx={source.name}', *common]
    if precision == 'fp16':
        computing, giving = find_layers(source)
        chosen += ['--fp16', '--precisionConstraints=obey', *(
            f'--layer{what}=' + ','.join(f'{name}:fp32' for name in names)
            for what, names in (('Precisions', computing), ('OutputTypes', giving)))]

    def command(flags: Sequence[str]) -> str:
        return ' \\\n    '.join(['exec trtexec', *map(shlex.quote, flags), '"$@"'])

    return f"""#!/bin/sh
# Builds {engine.name} with trtexec,
# for GPUs like the one of this machine and for its version of TensorRT: {OLDEST} or newer.
# What follows the name of this script is handed on to trtexec.
cd "$(dirname "$0")" || exit 1
version=$(trtexec --help 2>&1 | sed -n 's/.*\\[TensorRT v\\([0-9]*\\)\\].*/\\1/p' | head -n 1)
if [ -z "$version" ]; then
    echo 'error: trtexec, a part of TensorRT, is not on the PATH or does not say its version' >&2
    exit 1
elif [ "$version" -lt 8600 ]; then
    echo "error: TensorRT $version is too old for these graphs: use {OLDEST} or newer" >&2
    exit 1
elif [ "$version" -ge {TYPED}0000 ]; then
    # Types are those of the graph.
{command([f'--onnx={path.name}', *common])}
fi
# TensorRT chooses types, within limits.
{command(chosen)}
"""


def load_tensorrt() -> Any:
    """Import TensorRT, or say that it is missing or too old."""
    try:
        trt = import_module('tensorrt')
    except ModuleNotFoundError as error:
        raise RequirementError('engines need tensorrt, which is not installed; install the one for '
                               'the CUDA of this machine, such as `pip install tensorrt-cu12`'
                               ) from error
    if Version(trt.__version__) < Version(OLDEST):
        raise RequirementError(f'TensorRT {trt.__version__} is too old for these graphs: use '
                               f'{OLDEST} or newer')
    return trt


def build_engine(source: Path, path: Path, engine: Path, shapes: Shapes) -> None:
    """Build an engine for the GPU of this machine; it takes minutes.

    Args:
        source: The ONNX file in float32.
        path: The ONNX file to make an engine of, in float32 or float16.
        engine: The file to write.
        shapes: See :func:`find_shapes`.

    Raises:
        RequirementError: TensorRT is missing or too old.
        EngineError: It cannot read the graph or build the engine.
    """
    trt = load_tensorrt()
    typed = Version(trt.__version__).major >= TYPED
    logger = trt.Logger(trt.Logger.ERROR)
    trt.init_libnvinfer_plugins(logger, '')
    builder = trt.Builder(logger)
    # Version 10 knows no other networks than those with an explicit batch.
    explicit = getattr(trt.NetworkDefinitionCreationFlag, 'EXPLICIT_BATCH', None)
    network = builder.create_network(0 if explicit is None else 1 << int(explicit))
    parser = trt.OnnxParser(network, logger)
    read = path if typed else source
    if not parser.parse_from_file(str(read)):
        raise EngineError(f'{read.name}: TensorRT {trt.__version__} cannot read it: '
                          f'{parser.get_error(0).desc()}')
    config = builder.create_builder_config()
    config.clear_flag(trt.BuilderFlag.TF32)
    profile = builder.create_optimization_profile()
    for name, shape in shapes.items():
        profile.set_shape(name, *shape)
    config.add_optimization_profile(profile)
    if path != source and not typed:
        constrain(trt, network, config, *map(set, find_layers(source)))
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise EngineError(f'{read.name}: TensorRT {trt.__version__} cannot build an engine of it; '
                          'its own messages stand above')
    with write_whole(engine) as file:
        file.write(plan)


def constrain(trt: Any, network: Any, config: Any, computing: set[str], giving: set[str]) -> None:
    """Let a network be in float16, except for the layers of :func:`find_layers`."""
    config.set_flag(trt.BuilderFlag.FP16)
    config.set_flag(trt.BuilderFlag.OBEY_PRECISION_CONSTRAINTS)
    for place in range(network.num_layers):
        layer = network.get_layer(place)
        if layer.name in computing:
            layer.precision = trt.float32
        if layer.name in giving:
            layer.set_output_type(0, trt.float32)


class Engine:
    """An engine on the current GPU.

    Args:
        path: The file.

    Raises:
        EngineError: It is no engine for this GPU and this version of TensorRT.
    """

    def __init__(self, path: str | Path):
        trt = load_tensorrt()
        logger = trt.Logger(trt.Logger.ERROR)
        trt.init_libnvinfer_plugins(logger, '')
        engine = trt.Runtime(logger).deserialize_cuda_engine(Path(path).read_bytes())
        if engine is None:
            raise EngineError(f'{path}: TensorRT {trt.__version__} cannot load it; build it on '
                              'this machine, with this version')
        names = [engine.get_tensor_name(place) for place in range(engine.num_io_tensors)]
        self.inputs = [name for name in names
                       if engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT]
        self.outputs = [name for name in names if name not in self.inputs]
        # DataType.FLOAT and so on; other words than PyTorch's for two of them.
        kinds = {name: str(engine.get_tensor_dtype(name)).rpartition('.')[2].lower()
                 for name in names}
        self.types = {name: getattr(torch, dict(float='float32', half='float16').get(kind, kind))
                      for name, kind in kinds.items()}
        self.engine, self.context = engine, engine.create_execution_context()
        self.stream = torch.cuda.Stream()
        self.tensors = {}

    def bind(self, images: np.ndarray, sizes: np.ndarray | None = None) -> None:
        """Copy the next inputs to the GPU, and make room for what they give."""
        if sizes is None:
            sizes = np.array([images.shape[:1:-1]] * len(images))
        arrays = dict(images=images, orig_target_sizes=sizes)
        with torch.cuda.stream(self.stream):
            for name in self.inputs:
                self.tensors[name] = torch.from_numpy(np.ascontiguousarray(arrays[name])).to(
                    'cuda', self.types[name])
                self.context.set_input_shape(name, tuple(self.tensors[name].shape))
            for name in self.outputs:
                self.tensors[name] = torch.empty(tuple(self.context.get_tensor_shape(name)),
                                                 dtype=self.types[name], device='cuda')
        for name, tensor in self.tensors.items():
            self.context.set_tensor_address(name, tensor.data_ptr())

    def enqueue(self) -> None:
        """Let the GPU compute, after what it has to do already."""
        if not self.context.execute_async_v3(self.stream.cuda_stream):
            raise EngineError('TensorRT cannot run the engine; its own messages stand above')

    def run(self, images: np.ndarray, sizes: np.ndarray | None = None) -> dict[str, np.ndarray]:
        """Run, as :meth:`Runtime.run <spartan_mm.runtime.Runtime.run>` does."""
        self.bind(images, sizes)
        self.enqueue()
        self.stream.synchronize()
        outputs = {name: self.tensors[name].cpu() for name in self.outputs}
        return {name: (x if x.is_floating_point() else x.long()).numpy()
                for name, x in outputs.items()}
