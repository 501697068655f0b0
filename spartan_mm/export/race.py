"""Exported files run for a look at them: times side by side, and the channels that argmax picks."""
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np


def race(runs: Sequence[Callable[[], object]], seconds: float = 4.) -> list[float]:
    """Time functions in turns, after one turn that does not count.

    Args:
        runs: The functions.
        seconds: For how long, all together; at least three turns.

    Returns:
        The least time of each, in milliseconds.
    """
    times, start = [], time.perf_counter()
    while len(times) < 4 or time.perf_counter() - start < seconds:
        turn = []
        for run in runs:
            begin = time.perf_counter()
            run()
            turn.append(1e3 * (time.perf_counter() - begin))
        times.append(turn)
    return np.min(times[1:], 0).tolist()


def argmax_outputs(path: str | Path, precision: str = 'fp32'
                   ) -> Callable[[np.ndarray, np.ndarray], list[np.ndarray]]:
    """Make a copy of a file that gives what its argmax pick, in the order that they run in.

    Args:
        path: The file, .onnx or .xml.
        precision: What OpenVINO computes in.

    Returns:
        A function of images (N, 3, H, W) and their original sizes (N, 2).
    """
    return (_of_onnx if Path(path).suffix == '.onnx' else _of_openvino)(Path(path), precision)


def _of_onnx(path: Path, precision: str) -> Callable:
    import onnx
    import onnxruntime
    model = onnx.load(path)
    names = [node.output[0] for node in model.graph.node if node.op_type == 'ArgMax']
    model.graph.output.extend(onnx.helper.make_empty_tensor_value_info(name) for name in names)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=['CPUExecutionProvider'])
    inputs = [each.name for each in session.get_inputs()]
    return lambda *given: session.run(names, dict(zip(inputs, given, strict=False))) \
        if names else []


def _of_openvino(path: Path, precision: str) -> Callable:
    import openvino
    core = openvino.Core()
    model = core.read_model(path)
    # An ArgMax becomes a TopK of one.
    found = [node for node in model.get_ordered_ops() if node.get_type_name() == 'TopK'
             and node.output(1).get_partial_shape()[node.get_axis()] == 1]
    for node in found:
        model.add_outputs(node.output(1))
    compiled = core.compile_model(model, 'CPU', {'INFERENCE_PRECISION_HINT': {
        'bf16': 'bf16', 'fp16': 'f16'}.get(precision, 'f32')})
    inputs, first = len(model.inputs), len(model.outputs) - len(found)
    return lambda *given: [*compiled(given[:inputs]).values()][first:]
