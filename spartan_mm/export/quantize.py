"""Lower precision: float16 in an ONNX graph, and 8 bits by ONNX Runtime and by NNCF.

Some parts stay in float32. NOTE: What for 8 bits, was measured; what for float16 is what other
exports of such models have failed in.

- The decoder, the choice of queries and the head: in 8 bits their boxes are lost.
- What SpaRTAN's argmax sees: the residual stream that block norms look at, these norms, and the
  argmax itself. Rounded, two channels become equal, or change places, and another wave is added.
"""
import logging
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..requirements import require
from .onnx import find_scopes, write_proto

if TYPE_CHECKING:
    from .job import Job

#: Modules of a detector that stay float in 8 bits, those of the decoder's input apart.
DECODER = re.compile(r'(^|\.)(decoder(?!\.input_projs)|bbox_head|memory_trans_\w+)(\.|$)')

#: Modules whose own operations stay in float32 in float16, of their children only those named:
#: what places boxes and samples, and what sums over a whole map.
PLACES = re.compile(r'(^|\.)(decoder|decoder\.query_pos_head(\.\w+)?|decoder\.layers\.\d+\.cross_attn'
                    r'|bbox_head(\..+)?|normalize|model)?$')

#: Before the argmax of a SpaRTAN: a block itself, which adds to the stream, and its second norm.
STREAM = re.compile(r'(^|\.)blocks\.\d+(\.norm2)?$')

#: Operations in float32 in a float16 graph: their range or their grid is too small for it, or they
#: take nothing else.
FLOAT32 = {'ArgMax', 'Cast', 'Constant', 'ConstantOfShape', 'CumSum', 'GridSample', 'If',
           'InstanceNormalization', 'Loop', 'Range', 'Resize', 'Softmax', 'TopK'}


def write_onnx(job: 'Job') -> None:
    """Write the ONNX file of a job in float16 or 8 bits."""
    if job.precision == 'fp16':
        to_float16(job.onnx(), job.path)
    else:
        quantize_onnx(job.onnx(), job.path, batches(job.pictures().images))


def batches(images: Iterable[np.ndarray]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """What a graph is given: images (1, 3, H, W) of bytes, and their width and height."""
    for image in images:
        yield image[None], np.array([image.shape[:0:-1]])


def to_float16(source: str | Path, path: str | Path, keep: Callable[[Any, str], bool] | None = None
               ) -> None:
    """Write an ONNX file that computes in float16, except for what needs float32.

    Inputs and outputs stay what they are. NOTE: Other converters round what passes between two
    operations in float32, too; here it stays float32 from the residual stream to the argmax.

    Args:
        source: An ONNX file in float32.
        path: The file to write.
        keep: Whether a node, of a module, stays in float32; None for :func:`needs_float32`.
    """
    import onnx
    from onnx import TensorProto, helper, numpy_helper
    model = onnx.shape_inference.infer_shapes(onnx.load(source))
    graph, scopes, keep = model.graph, find_scopes(source), keep or needs_float32
    constants = {tensor.name: tensor for tensor in graph.initializer}
    floats = {name for name, tensor in constants.items() if tensor.data_type == TensorProto.FLOAT}
    floats.update(value.name for value in (*graph.input, *graph.value_info, *graph.output)
                  if value.type.tensor_type.elem_type == TensorProto.FLOAT)
    halves, casts, nodes = set(), {}, []

    def converted(name: str, to_half: bool) -> str:
        """The name of a value in the other type."""
        if name not in casts:
            casts[name] = f'{name}_as_float{16 if to_half else 32}'
            if name in constants:
                values = numpy_helper.to_array(constants[name])
                finite = np.where(np.isfinite(values), values.clip(-65504, 65504), values)
                graph.initializer.append(numpy_helper.from_array(
                    finite.astype(np.float16), casts[name]))
            else:
                nodes.append(helper.make_node(
                    'Cast', [name], [casts[name]], f'{casts[name]}_cast',
                    to=TensorProto.FLOAT16 if to_half else TensorProto.FLOAT))
        return casts[name]

    for node in graph.node:
        half = not keep(node, scopes[node.name])
        for place, name in enumerate(node.input):
            if name in floats and (name in halves) != half:
                node.input[place] = converted(name, half)
        nodes.append(node)
        if half:
            halves.update(floats.intersection(node.output))
    for value in graph.output:
        if value.name in halves:  # it keeps its name, and what is inside gets another
            inside = f'{value.name}_as_float16'
            for node in nodes:
                for names in (node.input, node.output):
                    names[:] = [inside if name == value.name else name for name in names]
            nodes.append(helper.make_node('Cast', [inside], [value.name], f'{value.name}_cast',
                                          to=TensorProto.FLOAT))
    used = {name for node in nodes for name in node.input}
    kept = [tensor for tensor in graph.initializer if tensor.name in used]
    for field, content in ((graph.node, nodes), (graph.initializer, kept), (graph.value_info, ())):
        content = [*content]
        del field[:]
        field.extend(content)
    write_proto(model, path)


def needs_float32(node: Any, module: str) -> bool:
    """Whether a node of a graph, of a module, is to stay in float32 where others are float16."""
    return node.op_type in FLOAT32 or bool(PLACES.search(module) or STREAM.search(module))


def quantize_onnx(source: str | Path, path: str | Path,
                  batches: Iterable[tuple[np.ndarray, ...]]) -> None:
    """Write an ONNX file whose convolutions compute in 8 bits, by ONNX Runtime.

    Args:
        source: An ONNX file in float32.
        path: The file to write.
        batches: Inputs of the graph, in order, to measure ranges with; of these as many as it has.
    """
    require('onnxruntime', '1.20', 'export')
    import onnx
    from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static

    scopes = find_scopes(source)
    inputs = [value.name for value in onnx.load(source, load_external_data=False).graph.input]

    class Reader(CalibrationDataReader):
        """Gives one batch after the other."""

        def __init__(self):
            self.batches = iter(batches)

        def get_next(self) -> dict[str, np.ndarray] | None:
            batch = next(self.batches, None)
            return None if batch is None else dict(zip(inputs, batch, strict=False))

    with tempfile.TemporaryDirectory() as folder, _quiet():
        quantized = Path(folder, 'quantized.onnx')
        quantize_static(
            source, quantized, Reader(), op_types_to_quantize=['Conv', 'Gemm'], per_channel=True,
            activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8,
            nodes_to_exclude=[name for name, module in scopes.items() if DECODER.search(module)])
        model = onnx.load(quantized)
    _undo_rounding(model.graph, {name for name, module in scopes.items() if STREAM.search(module)})
    write_proto(model, path)


def _undo_rounding(graph: Any, names: set[str]) -> None:
    """Let nodes see values as they were before these were rounded for others.

    NOTE: ONNX Runtime gives what it rounds for one node to all that read it.
    """
    made = {node.output[0]: node for node in graph.node}
    for node in graph.node:
        for place, name in enumerate(node.input):
            restored, rounded = made.get(name), None
            if restored is not None and restored.op_type == 'DequantizeLinear':
                rounded = made.get(restored.input[0])
            if rounded is not None and (node.op_type == 'ArgMax' or node.name in names):
                node.input[place] = rounded.input[0]


def quantize_openvino(model: Any, source: str | Path, batches: Iterable[tuple[np.ndarray, ...]]
                      ) -> Any:
    """Give an OpenVINO model 8 bits by NNCF, its decoder apart.

    Args:
        model: What OpenVINO made of `source`.
        source: An ONNX file in float32.
        batches: Inputs of the graph, in order, to measure ranges with; of these as many as it has.
    """
    require('nncf', '2.13', 'openvino')
    import nncf
    given = [batch[:len(model.inputs)] for batch in batches]
    ignored = [name for name, module in find_scopes(source).items() if DECODER.search(module)]
    with _quiet():
        return nncf.quantize(
            model, nncf.Dataset(given), preset=nncf.QuantizationPreset.MIXED,
            model_type=nncf.ModelType.TRANSFORMER, subset_size=len(given),
            ignored_scope=nncf.IgnoredScope(names=ignored, validate=False) if ignored else None)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep what these packages log about each node to themselves; progress stays."""
    loggers = [logging.getLogger(name) for name in (None, 'nncf')]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
