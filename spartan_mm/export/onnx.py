"""ONNX files: written by torch.export's exporter, for opset 18, which every runtime reads."""
import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim

from ..files import write_whole
from ..requirements import require
from .form import export_form
from .metadata import MULTIPLE

#: NOTE: The exporter cannot write an older one; TensorRT reads GridSample of 20 and later wrong.
OPSET = 18

#: What a node says of the modules that it comes from.
_SCOPES = 'pkg.torch.onnx.name_scopes'


def make_inputs(graph: nn.Module, size: tuple[int, int], batch: int = 1,
                dtype: torch.dtype = torch.uint8) -> tuple[Tensor, ...]:
    """Inputs to trace a graph with.

    Args:
        graph: What :func:`~.graph.make_graph` gave.
        size: Height and width.
        batch: Images; where their number is to be free, 2, since 1 would be taken for a law.
        dtype: Of the images.
    """
    images = torch.randint(0, 256, (batch, 3, *size), generator=torch.Generator().manual_seed(0))
    sizes = torch.tensor([[size[1], size[0]]] * batch)
    return (images.to(dtype), sizes)[:len(graph.input_names)]


def dynamic_shapes(graph: nn.Module, dynamic: Sequence[str]) -> tuple[dict[int, Any], ...]:
    """What torch.export is told of the inputs' free axes, 'batch' and 'size'."""
    batch = {0: Dim('batch')} if 'batch' in dynamic else {}
    sides = {axis: MULTIPLE * Dim(name, min=2, max=128)
             for axis, name in ((2, 'rows'), (3, 'columns')) if 'size' in dynamic}
    return (batch | sides, batch)[:len(graph.input_names)]


def write_onnx(graph: nn.Module, path: str | Path, size: tuple[int, int],
               dynamic: Sequence[str] = ('batch', )) -> None:
    """Export a graph.

    Nodes keep the names of the modules that they come from, by which quantization finds the
    decoder; where the code lies on this machine is left out.

    Args:
        graph: What :func:`~.graph.make_graph` gave.
        path: The file to write.
        size: Height and width of the images; if they are free, of those to trace with.
        dynamic: Free axes, of 'batch' and 'size'.
    """
    require('onnx', '1.17', 'export')
    require('onnxscript', '0.7', 'export')
    inputs = make_inputs(graph, size, 2 if 'batch' in dynamic else 1)
    with export_form(graph), torch.no_grad(), _quiet():
        program = torch.onnx.export(
            graph, inputs, dynamo=True, opset_version=OPSET, verbose=False, optimize=False,
            dynamic_shapes=dynamic_shapes(graph, dynamic), input_names=graph.input_names,
            output_names=graph.output_names)
        _simplify(program.model)
    for node in program.model.graph.all_nodes():
        scopes = node.metadata_props.get(_SCOPES)
        node.metadata_props.clear()
        if scopes:
            node.metadata_props[_SCOPES] = scopes
    write_proto(program.model_proto, path)


def write_proto(model: Any, path: str | Path) -> None:
    """Write an ONNX model, an ``onnx.ModelProto``, the whole file or none, if it is sound."""
    import onnx
    onnx.checker.check_model(model)
    with write_whole(path) as file:
        file.write(model.SerializeToString())


def set_metadata(path: str | Path, metadata: dict[str, str]) -> None:
    """Give an ONNX file properties; those of other names stay."""
    import onnx
    model = onnx.load(path)
    kept = {entry.key: entry.value for entry in model.metadata_props}
    onnx.helper.set_model_props(model, kept | metadata)
    write_proto(model, path)


def find_scopes(path: str | Path) -> dict[str, str]:
    """The module that each node of an ONNX file comes from, by the node's name."""
    import ast

    import onnx
    scopes = {}
    for node in onnx.load(path, load_external_data=False).graph.node:
        names = next((entry.value for entry in node.metadata_props if entry.key == _SCOPES), '[]')
        # From the outermost module to the operation itself.
        scopes[node.name] = ([name for name in ast.literal_eval(names) if name][:-1] or [''])[-1]
    return scopes


def _simplify(model: Any) -> None:
    """Compute what is constant and drop what does nothing, in an ``onnx_ir.Model``.

    This is what the exporter does of itself, except for three things. Its rule that makes a Split
    of two Slices is left out: that one walks the whole graph for each node, which takes longer than
    the rest of the export. Slices of weights are weights, of any size. And GELU is written as ONNX
    Runtime looks for it, which makes one operation of five.
    """
    from onnx_ir.passes import common
    from onnxscript import optimizer, rewriter
    from onnxscript.rewriter.rules.common import slice_split_rule
    known = [rule for rule in rewriter._DEFAULT_REWRITE_RULES if rule is not slice_split_rule]
    largest = max(each.const_value.size for each in model.graph.initializers.values())
    common.InlinePass()(model)
    for _ in range(2):
        optimizer.fold_constants(
            model, onnx_shape_inference=True, output_size_limit=largest,
            should_fold=lambda node: True if node.op_type == 'Slice' else None)
        rewriter.rewrite(model, [rewriter.RewriteRule(_exported_gelu, _known_gelu), *known])
    for simplify in (common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
                     common.LiftSubgraphInitializersToMainGraphPass(),
                     common.DeduplicateInitializersPass(),
                     common.CommonSubexpressionEliminationPass(), common.RemoveUnusedNodesPass(),
                     common.OutputFixPass(), common.NameFixPass()):
        simplify(model)


def _exported_gelu(op: Any, x: Any) -> Any:
    return op.Mul(x, op.Mul(0.5, op.Add(op.Erf(op.Div(x, 2 ** 0.5)), 1.)))


def _known_gelu(op: Any, x: Any) -> Any:
    # In float32, as `write_onnx` is given graphs.
    root, one, half = (op.Constant(value_float=value) for value in (2 ** 0.5, 1., 0.5))
    return op.Mul(op.Mul(x, op.Add(op.Erf(op.Div(x, root)), one)), half)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep to itself what the exporter says of its own steps."""
    loggers = [logging.getLogger(name) for name in ('onnxscript', 'onnx_ir', 'torch.onnx')]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
