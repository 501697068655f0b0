"""Lower precision: float16 in an ONNX graph, and 8 bits by ONNX Runtime and by NNCF.

- A detector's decoder, choice of queries and head stay float in 8 bits, in which boxes are lost.
- A SpaRTAN's argmax picks another channel as soon as what it sees is rounded, wherever that was.
  float16 keeps the residual stream, the norms before the argmax and itself in float32; of 8 bits
  only the weights are: rounding maps, too, adds half to all of the other picks and saves no time.
"""
import logging
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from ..requirements import require
from .onnx import find_scopes, write_proto

#: Modules of a detector that stay float in 8 bits, those of the decoder's input apart; what belongs
#: to no module selects the queries.
DECODER = re.compile(r'^$|(^|\.)(decoder(?!\.input_projs)|bbox_head|memory_trans_\w+)(\.|$)')

#: Modules whose own operations stay in float32 in float16, of their children only those named:
#: what places boxes and samples, and what sums over a whole map.
PLACES = re.compile(r'(^|\.)(model|normalize|bbox_head(\..+)?|decoder|'
                    r'decoder\.query_pos_head(\..+)?|decoder\.layers\.\d+\.cross_attn)?$')

#: What only a SpaRTAN has, after its own name.
CMIXER = re.compile(r'(.*?)stages\.\d+\.blocks\.\d+\.cmixer$')

#: Weights of fewer numbers are not worth a scale.
SMALL = 1024

#: Before the argmax of a SpaRTAN: a block itself, which adds to the stream, and its second norm.
STREAM = re.compile(r'(^|\.)blocks\.\d+(\.norm2)?$')

#: Operations in float32 in a float16 graph: their range or their grid is too small for it, or they
#: take nothing else.
FLOAT32 = {'ArgMax', 'Cast', 'Constant', 'ConstantOfShape', 'CumSum', 'GridSample', 'If',
           'InstanceNormalization', 'Loop', 'Range', 'Resize', 'Softmax', 'TopK'}


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


def round_weights(source: str | Path, path: str | Path) -> set[str]:
    """Write an ONNX file in which the weights of a SpaRTAN's convolutions are stored in 8 bits.

    Each output channel has a scale of its own. They are float32 again before they are used, and all
    else is float32 anyway.

    Args:
        source: An ONNX file in float32.
        path: The file to write.

    Returns:
        The names of all nodes of a SpaRTAN.
    """
    import onnx
    from onnx import helper, numpy_helper
    model = onnx.load(source)
    scopes = find_scopes(source)
    spartans = {found[1] for module in scopes.values() if (found := CMIXER.match(module))}
    parts = tuple(f'{name}{part}.' for name in spartans for part in ('stem', 'stages'))
    names = {name for name, module in scopes.items() if module.startswith(parts)}
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    for node in [*model.graph.node]:
        if node.op_type != 'Conv' or node.name not in names:
            continue
        name = node.input[1]
        weight = numpy_helper.to_array(constants[name])
        if weight.size < SMALL:
            continue
        scale = np.abs(weight).max((1, 2, 3)).clip(1e-12) / 127
        rounded = np.rint(weight / scale[:, None, None, None]).astype(np.int8)
        parts = f'{name}_int8', f'{name}_scale', f'{name}_float32'
        for part, values in zip(parts, (rounded, scale.astype(np.float32)), strict=False):
            model.graph.initializer.append(numpy_helper.from_array(values, part))
        model.graph.node.insert(0, helper.make_node(
            'DequantizeLinear', parts[:2], parts[2:], f'{parts[2]}_restored', axis=0))
        model.graph.initializer.remove(constants[name])
        node.input[1] = parts[2]
    write_proto(model, path)
    return names


def quantize_onnx(source: str | Path, path: str | Path,
                  batches: Iterable[tuple[np.ndarray, ...]]) -> None:
    """Write an ONNX file in 8 bits: a SpaRTAN's weights, and all of other convolutions.

    Args:
        source: An ONNX file in float32.
        path: The file to write.
        batches: Inputs of the graph, in order, to measure ranges with; of these as many as it has.
    """
    require('onnxruntime', '1.20', 'export')
    import onnx
    from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static

    kept = round_weights(source, path) | find_decoder(source)
    graph = onnx.load(path).graph
    inputs = [value.name for value in graph.input]
    chosen = [node.name for node in graph.node if node.op_type == 'Conv' and node.name not in kept]
    if not chosen:
        return

    class Reader(CalibrationDataReader):
        """Gives one batch after the other."""

        given = iter(batches)

        def get_next(self) -> dict[str, np.ndarray] | None:
            batch = next(self.given, None)
            return None if batch is None else dict(zip(inputs, batch, strict=False))

    with tempfile.TemporaryDirectory() as folder, _quiet():
        quantized = Path(folder, 'quantized.onnx')
        quantize_static(path, quantized, Reader(), nodes_to_quantize=chosen, per_channel=True,
                        activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8)
        model = onnx.load(quantized)
    _undo_rounding(model.graph, kept)
    write_proto(model, path)


def _undo_rounding(graph: Any, names: set[str]) -> None:
    """Let nodes see values as they were before these were rounded for others.

    NOTE: ONNX Runtime gives what it rounds for one node to all that read it.
    """
    made = {node.output[0]: node for node in graph.node}
    for node in graph.node:
        for place, name in enumerate(node.input if node.name in names else ()):
            restored = made.get(name)
            if restored is not None and restored.op_type == 'DequantizeLinear' and (
                    restored.input[0] in made):
                node.input[place] = made[restored.input[0]].input[0]


def quantize_openvino(source: str | Path, batches: Iterable[tuple[np.ndarray, ...]]) -> Any:
    """Make an OpenVINO model in 8 bits: a SpaRTAN's weights, and by NNCF all but the decoder.

    Args:
        source: An ONNX file in float32.
        batches: Inputs of the graph, in order, to measure ranges with; of these as many as it has.
    """
    require('nncf', '2.13', 'openvino')
    import nncf
    import openvino
    with tempfile.TemporaryDirectory() as folder:
        rounded = Path(folder, 'rounded.onnx')
        spartan = round_weights(source, rounded)
        model = openvino.convert_model(rounded)
    kept = spartan | find_decoder(source)
    if not any('Convolution' in node.get_type_name() and node.get_friendly_name() not in kept
               for node in model.get_ops()):
        return model
    given = [batch[:len(model.inputs)] for batch in batches]
    with _quiet():
        return nncf.quantize(
            model, nncf.Dataset(given), preset=nncf.QuantizationPreset.MIXED,
            model_type=nncf.ModelType.TRANSFORMER, subset_size=len(given),
            ignored_scope=nncf.IgnoredScope(names=sorted(kept), validate=False))


def find_decoder(path: str | Path) -> set[str]:
    """The names of the nodes of an ONNX file that stay float in 8 bits, of whatever backbone."""
    return {name for name, module in find_scopes(path).items() if DECODER.search(module)}


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
