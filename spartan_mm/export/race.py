"""Exported files run for a look at them: times side by side, and the channels that argmax picks."""
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

# Arrays that a file gives for images (N, 3, H, W) and their original sizes (N, 2).
BareRun = Callable[[np.ndarray, np.ndarray], list[np.ndarray]]


def race(runs: Sequence[Callable[[], object]], seconds: float = 4., pause: float = 0.
         ) -> list[float]:
    """Time functions in turns, after one turn that does not count.

    Args:
        runs: The functions.
        seconds: For how long, all together, with pauses; at least three turns.
        pause: Seconds before each function, in which the threads of the one before come to rest:
            ONNX Runtime's keep cores busy for a while, looking for more work.

    Returns:
        The least time of each, in milliseconds.
    """
    times, start = [], time.perf_counter()
    while len(times) < 4 or time.perf_counter() - start < seconds:
        turn = []
        for run in runs:
            time.sleep(pause)
            begin = time.perf_counter()
            run()
            turn.append(1e3 * (time.perf_counter() - begin))
        times.append(turn)
    return np.min(times[1:], 0).tolist()


def open_bare(path: str | Path, library: str, precision: str = 'fp32', argmax: bool = False
              ) -> BareRun:
    """Open a file that may have no metadata, or a copy that shows what argmax picks.

    Args:
        path: The file: .onnx, or for OpenVINO .xml, too.
        library: 'onnxruntime' or 'openvino'.
        precision: What OpenVINO computes in.
        argmax: Whether to give what each argmax picks, in the order that they run in, in place of
            the outputs.
    """
    opened = _open_onnxruntime if library == 'onnxruntime' else _open_openvino
    return opened(Path(path), precision, argmax)


def computed_in(precision: str) -> str:
    """Say what OpenVINO computes in if it is asked for a precision on this processor."""
    import openvino
    able = openvino.Core().get_property('CPU', 'OPTIMIZATION_CAPABILITIES')
    return precision if precision.upper() in able or precision == 'int8' else 'fp32'


def _open_onnxruntime(path: Path, precision: str, argmax: bool) -> BareRun:
    import onnx
    import onnxruntime
    model, names = onnx.load(path), None
    if argmax:
        names = [node.output[0] for node in model.graph.node if node.op_type == 'ArgMax']
        model.graph.output.extend(map(onnx.helper.make_empty_tensor_value_info, names))
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=['CPUExecutionProvider'])
    inputs = [each.name for each in session.get_inputs()]

    def run(*given: np.ndarray) -> list[np.ndarray]:
        # No names stand for all outputs.
        return [] if names == [] else session.run(names, dict(zip(inputs, given, strict=False)))
    return run


def _open_openvino(path: Path, precision: str, argmax: bool) -> BareRun:
    import openvino
    core = openvino.Core()
    model, first = core.read_model(path), 0
    if argmax:
        first = len(model.outputs)
        # An ArgMax becomes a TopK of one.
        for node in model.get_ordered_ops():
            if node.get_type_name() == 'TopK' and (
                    node.output(1).get_partial_shape()[node.get_axis()] == 1):
                model.add_outputs(node.output(1))
    hints = dict(bf16='bf16', fp16='f16')
    compiled = core.compile_model(
        model, 'CPU', {'INFERENCE_PRECISION_HINT': hints.get(precision, 'f32')})
    inputs = len(model.inputs)
    return lambda *given: [*compiled(given[:inputs]).values()][first:]
