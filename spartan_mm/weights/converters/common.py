"""What the converters share: safe reading, and strict accounting for keys and shapes."""
import re
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...errors import CheckpointError
from ..safe_load import list_unknown_names, read_checkpoint

StateDict = dict[str, Tensor]
Names = dict[str, list[str]]
"""For each name of ours the foreign one, or several whose tensors are ours when concatenated."""

# Of Python's own modules, those whose classes hold values, as settings in checkpoints do.
_VALUE_MODULES = frozenset(['argparse', 'collections', 'copyreg', 'datetime', 'decimal', 'enum',
                            'fractions', 'pathlib', 'types', 'typing', 'uuid'])
_VALUE_TYPES = (bool, dict, float, frozenset, int, list, range, slice, str, tuple)


class _Placeholder:
    """Takes the place of an object whose class is not allowed to run."""

    def __new__(cls, *args, **kwargs):
        return super().__new__(cls)

    def __init__(self, *args, **kwargs):
        pass

    def _ignore(self, *args):
        pass

    __setstate__ = __setitem__ = _ignore


def load_checkpoint(path: str | Path) -> Any:
    """Read a checkpoint onto the CPU without running any code that it names.

    Training checkpoints often hold more than tensors: the authors' SpaRTAN files carry an omegaconf
    config. Objects of classes from other packages are read as empty placeholders here, so that the
    packages need not be installed either. A file that names functions of Python or of the operating
    system is refused.

    Args:
        path: File written by ``torch.save``, or in the safetensors format.

    Returns:
        What was saved, with placeholders for foreign objects; of a safetensors file its
        `state_dict`, and `meta` if the file has that.

    Raises:
        CheckpointError: If the file does not exist, is not a checkpoint, or is refused.
    """
    path = Path(path)
    if path.is_dir():
        raise CheckpointError(f'{path} is a folder, not a checkpoint')
    # What is left out here is refused when the file is read.
    refused = sys.stdlib_module_names - _VALUE_MODULES
    placeholders = {name: _make_placeholder(name) for name in list_unknown_names(path)
                    if name.partition('.')[0] not in refused}
    while True:
        try:
            with torch.serialization.safe_globals([*_VALUE_TYPES, *placeholders.values()]):
                return read_checkpoint(path)
        except OSError as error:
            raise CheckpointError(str(error)) from error
        except CheckpointError as error:
            # torch fills nothing but Python's own lists, and newer versions its own dicts alone.
            found = re.search(r"Can only (SETITEM|append|extend).* but got <class '(.+)'>",
                              str(error))
            if not found or found[2] not in placeholders:
                raise
            content = OrderedDict if found[1] == 'SETITEM' else list
            placeholders[found[2]] = _make_placeholder(found[2], content)


def _make_placeholder(name: str, content: Callable[[], Any] | None = None) -> type:
    """Make a class of a name; calling it gives a placeholder, or what `content` makes."""
    module, _, qualname = name.rpartition('.')
    members = dict(__module__=module, __qualname__=qualname)
    if content:
        members['__new__'] = lambda cls, *args, **kwargs: content()
    return type(qualname, (_Placeholder, ), members)


def pick_state_dict(checkpoint: Any, entries: Sequence[str] = ('model', )) -> StateDict:
    """Find the weights in a checkpoint and take data-parallel training's prefix off their names.

    Args:
        checkpoint: What ``load_checkpoint`` returned.
        entries: Where the weights may lie, in order of preference; 'ema.module' is the entry
            'module' of the entry 'ema'. If none is there the checkpoint itself has to be the state
            dict.

    Returns:
        Tensors by name.

    Raises:
        CheckpointError: If there are no weights, or something else among them.
    """
    state_dict = checkpoint
    for entry in entries:
        found = checkpoint
        for key in entry.split('.'):
            found = found.get(key) if isinstance(found, Mapping) else None
        if isinstance(found, Mapping):
            state_dict = found
            break

    if not isinstance(state_dict, Mapping) or not state_dict:
        raise CheckpointError('not a checkpoint: it holds no state dict, neither as a whole nor '
                              f'under {" or ".join(entries)}')
    others = [str(key) for key, value in state_dict.items()
              if not (isinstance(key, str) and isinstance(value, Tensor))]
    if others:
        raise CheckpointError('not a state dict: these entries are not tensors: '
                              + ', '.join(others[:10]) + (', ...' if len(others) > 10 else ''))

    prefix = 'module.'
    if all(name.startswith(prefix) for name in state_dict):
        return strip_prefix(state_dict, prefix)
    return dict(state_dict)


def strip_prefix(state_dict: Mapping[str, Tensor], prefix: str) -> StateDict:
    """Select the tensors of one part of a model.

    Args:
        state_dict: Tensors by name.
        prefix: What the part's names begin with, for example 'backbone.'.

    Returns:
        The tensors whose names begin with `prefix`, by the rest of the name.
    """
    return {name[len(prefix):]: value for name, value in state_dict.items()
            if name.startswith(prefix)}


def check_keys(given: Iterable[str], wanted: Iterable[str]) -> None:
    """Insist that two sets of names are the same.

    Args:
        given: Names in the checkpoint.
        wanted: Names that the conversion uses.

    Raises:
        CheckpointError: If names are missing or left over; it lists all of them.
    """
    given, wanted = dict.fromkeys(given), dict.fromkeys(wanted)
    missing = [name for name in wanted if name not in given]
    leftover = [name for name in given if name not in wanted]
    report = []
    if missing:
        report += ['missing keys:', *missing]
    if leftover:
        report += ['keys left over:', *leftover]
    if report:
        raise CheckpointError('the checkpoint does not fit:', *report)


def rename(state_dict: Mapping[str, Tensor], names: Names) -> StateDict:
    """Give foreign tensors our names, using every tensor.

    Args:
        state_dict: Tensors by foreign name.
        names: For each name of ours the foreign ones.

    Returns:
        Tensors by our name.

    Raises:
        CheckpointError: If a foreign name is missing, or left over.
    """
    check_keys(state_dict, [theirs for parts in names.values() for theirs in parts])
    tensors = {ours: [state_dict[theirs] for theirs in parts] for ours, parts in names.items()}
    return {ours: parts[0] if len(parts) == 1 else torch.cat(parts)
            for ours, parts in tensors.items()}


def rename_back(state_dict: Mapping[str, Tensor], names: Names) -> StateDict:
    """Give our tensors their foreign names, using every tensor; undoes ``rename``.

    Args:
        state_dict: Tensors by our name. What is several tensors elsewhere consists of equal parts.
        names: For each name of ours the foreign ones.

    Returns:
        Tensors by foreign name, none of which share memory.

    Raises:
        CheckpointError: If a name of ours is missing, or left over.
    """
    check_keys(state_dict, names)
    return {theirs: part if len(parts) == 1 else part.clone()
            for ours, parts in names.items()
            for theirs, part in zip(parts, _split(state_dict[ours], len(parts)), strict=True)}


def _split(tensor: Tensor, count: int) -> Sequence[Tensor]:
    return [tensor] if count == 1 else tensor.chunk(count)


def check_shapes(state_dict: Mapping[str, Tensor], expected: Mapping[str, Sequence[int]]) -> None:
    """Insist that converted tensors have the shapes that the model which is to load them has.

    Args:
        state_dict: Converted tensors by name.
        expected: Shapes by name, for some or all of the converted tensors.

    Raises:
        CheckpointError: If shapes differ; it lists all of them.
    """
    wrong = [f'{name}: {tuple(state_dict[name].shape)} instead of {tuple(shape)}'
             for name, shape in expected.items() if tuple(state_dict[name].shape) != tuple(shape)]
    if wrong:
        raise CheckpointError('the checkpoint does not fit, shapes differ:', *wrong)
