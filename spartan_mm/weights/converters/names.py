"""What the converters share: strict accounting for keys and shapes."""
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ...errors import CheckpointError

StateDict = dict[str, Tensor]
Names = dict[str, list[str]]
"""For each name of ours the foreign one, or several whose tensors are ours when concatenated."""


def strip_prefix(state_dict: Mapping[str, Tensor], prefix: str) -> StateDict:
    """Select the tensors whose names begin with `prefix`, by the rest of the name."""
    return {name[len(prefix):]: value for name, value in state_dict.items()
            if name.startswith(prefix)}


def check_keys(given: Iterable[str], wanted: Iterable[str]) -> None:
    """Insist that two sets of names are the same.

    Args:
        given: Names in the checkpoint.
        wanted: Names that the conversion uses.

    Raises:
        CheckpointError: Names are missing or left over; it lists all of them.
    """
    given, wanted = dict.fromkeys(given), dict.fromkeys(wanted)
    problems = {'missing keys': [name for name in wanted if name not in given],
                'keys left over': [name for name in given if name not in wanted]}
    report = [line for problem, found in problems.items() if found
              for line in (f'{problem}:', *found)]
    if report:
        raise CheckpointError('the checkpoint does not fit:', *report)


def check_shapes(state_dict: Mapping[str, Tensor], expected: Mapping[str, Sequence[int]]) -> None:
    """Insist that converted tensors have the shapes that the model which is to load them has.

    Args:
        state_dict: Converted tensors by name.
        expected: Shapes by name, for some or all of the converted tensors.

    Raises:
        CheckpointError: Shapes differ; it lists all of them.
    """
    wrong = [f'{name}: {tuple(state_dict[name].shape)} instead of {tuple(shape)}'
             for name, shape in expected.items() if tuple(state_dict[name].shape) != tuple(shape)]
    if wrong:
        raise CheckpointError('the checkpoint does not fit, shapes differ:', *wrong)


def rename(state_dict: Mapping[str, Tensor], names: Names) -> StateDict:
    """Give foreign tensors our names, using every tensor.

    Args:
        state_dict: Tensors by foreign name.
        names: For each name of ours the foreign ones.

    Raises:
        CheckpointError: A foreign name is missing, or left over.
    """
    check_keys(state_dict, [theirs for parts in names.values() for theirs in parts])
    return {ours: state_dict[parts[0]] if len(parts) == 1
            else torch.cat([state_dict[theirs] for theirs in parts])
            for ours, parts in names.items()}


def rename_back(state_dict: Mapping[str, Tensor], names: Names) -> StateDict:
    """Give our tensors their foreign names, using every tensor; undoes :func:`rename`.

    Args:
        state_dict: Tensors by our name. What is several tensors elsewhere consists of equal parts.
        names: For each name of ours the foreign ones.

    Returns:
        Tensors by foreign name, none of which share memory.

    Raises:
        CheckpointError: A name of ours is missing, or left over.
    """
    check_keys(state_dict, names)
    renamed = {}
    for ours, parts in names.items():
        pieces = state_dict[ours].chunk(len(parts)) if len(parts) > 1 else [state_dict[ours]]
        renamed |= {theirs: piece.clone() if len(parts) > 1 else piece
                    for theirs, piece in zip(parts, pieces, strict=True)}
    return renamed


def shapes_of(build: Callable[[], nn.Module]) -> dict[str, torch.Size]:
    """The shapes of a model's tensors by name; it is built without any memory for them."""
    with torch.device('meta'), _NoRandomNumbers():
        return {name: tensor.shape for name, tensor in build().state_dict().items()}


class _NoRandomNumbers(TorchFunctionMode):
    """Leaves the drawing out; for a tensor without memory torch imports its compiler to do it."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function in (nn.init.normal_, nn.init.uniform_, nn.init.kaiming_uniform_):
            return kwargs['tensor']
        return function(*args, **kwargs)
