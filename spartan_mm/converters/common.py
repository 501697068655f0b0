"""What the converters share: safe reading, strict accounting for keys and shapes, safe writing."""
import json
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from pickle import PickleError
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import Tensor

from ..files import write_whole

StateDict = dict[str, Tensor]
Names = dict[str, list[str]]
"""For each name of ours the foreign one, or several whose tensors are ours when concatenated."""

# Of Python's own modules, those whose classes hold values, as settings in checkpoints do.
_VALUE_MODULES = frozenset(['argparse', 'collections', 'copyreg', 'datetime', 'decimal', 'enum',
                            'fractions', 'pathlib', 'types', 'typing', 'uuid'])


class ConversionError(ValueError):
    """A checkpoint cannot be converted; the message says why and names the keys it is about."""


class _Placeholder:
    """Takes the place of an object whose class is not allowed to run."""

    def __new__(cls, *args, **kwargs):
        return super().__new__(cls)

    def __init__(self, *args, **kwargs):
        pass

    def _ignore(self, *args):
        pass

    __setstate__ = __setitem__ = append = extend = add = update = _ignore


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
        ConversionError: If the file does not exist, is not a checkpoint, or is refused.
    """
    # It imports mmengine, and from this package.
    from ..engine.reading import CheckpointError, read_checkpoint
    path = Path(path)
    if path.is_dir():
        raise ConversionError(f'{path} is a folder, not a checkpoint')
    try:
        with _placeholders(path):
            return read_checkpoint(path)
    except (CheckpointError, OSError) as error:
        raise ConversionError(str(error)) from error


def _placeholders(path: Path) -> AbstractContextManager:
    """Context in which the unknown classes of the file at `path` stand for placeholders."""
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    # PyTorch before 2.6 cannot list them, no version can for files from before PyTorch 1.6, and
    # what is no checkpoint can raise anything.
    except Exception:
        return nullcontext()

    def stand_in(name):
        module, _, qualname = name.rpartition('.')
        return type(qualname, (_Placeholder, ), dict(__module__=module, __qualname__=qualname))

    # What is left out here is refused when the file is read.
    refused = sys.stdlib_module_names - _VALUE_MODULES
    return torch.serialization.safe_globals(
        [stand_in(name) for name in names if name.partition('.')[0] not in refused])


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
        ConversionError: If there are no weights, or something else among them.
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
        raise ConversionError('not a checkpoint: it holds no state dict, neither as a whole nor '
                              f'under {" or ".join(entries)}')
    others = [str(key) for key, value in state_dict.items()
              if not (isinstance(key, str) and isinstance(value, Tensor))]
    if others:
        raise ConversionError('not a state dict: these entries are not tensors: '
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
        ConversionError: If names are missing or left over; it lists all of them.
    """
    given, wanted = dict.fromkeys(given), dict.fromkeys(wanted)
    missing = [name for name in wanted if name not in given]
    leftover = [name for name in given if name not in wanted]
    report = []
    if missing:
        report.append('missing keys:\n  ' + '\n  '.join(missing))
    if leftover:
        report.append('keys left over:\n  ' + '\n  '.join(leftover))
    if report:
        raise ConversionError('the checkpoint does not fit:\n' + '\n'.join(report))


def rename(state_dict: Mapping[str, Tensor], names: Names) -> StateDict:
    """Give foreign tensors our names, using every tensor.

    Args:
        state_dict: Tensors by foreign name.
        names: For each name of ours the foreign ones.

    Returns:
        Tensors by our name.

    Raises:
        ConversionError: If a foreign name is missing, or left over.
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
        ConversionError: If a name of ours is missing, or left over.
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
        ConversionError: If shapes differ; it lists all of them.
    """
    wrong = [f'{name}: {tuple(state_dict[name].shape)} instead of {tuple(shape)}'
             for name, shape in expected.items() if tuple(state_dict[name].shape) != tuple(shape)]
    if wrong:
        raise ConversionError('the checkpoint does not fit, shapes differ:\n  '
                              + '\n  '.join(wrong))


def save_checkpoint(checkpoint: Mapping, path: str | Path) -> None:
    """Write a checkpoint so that `path` holds either all of it or what it held before.

    Args:
        checkpoint: Anything ``torch.save`` takes. For a name that ends in '.safetensors' either
            tensors by name, or these as `state_dict` beside `meta`, which goes into the file's
            header as JSON (entry 'meta').
        path: File to write; its folder is made if need be.

    Raises:
        ConversionError: If the file cannot be written, or cannot hold the checkpoint.
    """
    path = Path(path)
    try:
        with write_whole(path) as file:
            if path.suffix == '.safetensors':
                file.write(_to_safetensors(checkpoint))
            else:
                torch.save(checkpoint, file)
    except OSError as error:
        raise ConversionError(f'{path} cannot be written: {error.strerror or error}') from error
    # What safetensors, JSON and pickle say of content that they cannot hold.
    except (AttributeError, PickleError, RuntimeError, TypeError, ValueError) as error:
        raise ConversionError(f'{path} cannot be written, it cannot hold this checkpoint: '
                              f'{error}') from error


def _to_safetensors(checkpoint: Mapping) -> bytes:
    # transformers insists on the entry 'format'.
    metadata = dict(format='pt')
    if 'meta' in checkpoint:
        metadata['meta'] = json.dumps(checkpoint['meta'], default=_plain)
        checkpoint = checkpoint['state_dict']
    return safetensors.torch.save(
        {name: tensor.contiguous() for name, tensor in checkpoint.items()}, metadata)


def _plain(value: Any) -> Any:
    """Make of NumPy's numbers what JSON has; colours of classes often are arrays."""
    if isinstance(value, (np.ndarray, np.generic)):
        return value.tolist()
    raise TypeError(f'meta has {value!r}, of type {type(value).__name__}, which JSON cannot hold')


def run_command(work: Callable[..., str], src: str, **options: Any) -> None:
    """Be a converter's command: do the work and print what it returns.

    Ends the process with status 1 and a message, without a traceback, if it cannot be done.

    Args:
        work: Called with `src` and `options`; returns what to tell the user.
        src: What to convert.
        options: The command's other arguments.
    """
    try:
        print(work(src, **options))
    except ConversionError as error:
        sys.exit(f'error: {src} was not converted: {error}')
