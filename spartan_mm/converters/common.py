"""What the converters share: safe reading, strict accounting for keys and shapes, safe writing."""
import argparse
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

StateDict = dict[str, Tensor]


class ConversionError(ValueError):
    """A checkpoint cannot be converted; the message says why and names the keys it is about."""


class _Placeholder:
    """Takes the place of an object whose class is not allowed to run."""

    def __new__(cls, *args, **kwargs):
        return super().__new__(cls)

    def __init__(self, *args, **kwargs):
        pass

    def __setstate__(self, state):
        pass


def load_checkpoint(path: str | Path) -> Any:
    """Read a checkpoint onto the CPU without running any code that it names.

    Training checkpoints often hold more than tensors: the authors' SpaRTAN files carry an omegaconf
    config, for which ``torch.load(weights_only=True)`` refuses the whole file. Objects of a class
    that it does not know are read as empty placeholders here, so that the packages they come from
    need not be installed either.

    Args:
        path: File written by ``torch.save``.

    Returns:
        What was saved, with placeholders for foreign objects.

    Raises:
        ConversionError: If the file does not exist or is not a checkpoint.
    """
    path = Path(path)
    if not path.is_file():
        raise ConversionError(f'{path} does not exist or is not a file')
    try:
        with _placeholders(path):
            return torch.load(path, map_location='cpu', weights_only=True)
    # Bytes that are not a checkpoint can make torch.load raise anything.
    except Exception as error:
        # torch hides the reason between pieces of advice on how to load the file unsafely.
        reason = re.search(r'(?<=WeightsUnpickler error: ).+|\A(?!Weights only).+', str(error))
        raise ConversionError(f'{path} is not a checkpoint that can be read safely: '
                              f'{reason[0] if reason else type(error).__name__}') from error


def _placeholders(path: Path) -> AbstractContextManager:
    """Context in which the unknown classes of the file at `path` stand for placeholders."""
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except (AttributeError, ValueError):
        # PyTorch before 2.6 cannot list them, no version can for files from before PyTorch 1.6.
        return nullcontext()

    def stand_in(name):
        module, _, qualname = name.rpartition('.')
        return type(qualname, (_Placeholder, ), dict(__module__=module, __qualname__=qualname))

    return torch.serialization.safe_globals([stand_in(name) for name in names])


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


def rename(state_dict: Mapping[str, Tensor],
           sources: Mapping[str, str | Sequence[str]]) -> StateDict:
    """Give tensors their new names, using every tensor.

    Args:
        state_dict: Tensors by old name.
        sources: For each new name the old one, or several whose tensors are concatenated along the
            first dimension.

    Returns:
        Tensors by new name.

    Raises:
        ConversionError: If an old name is missing, or left over.
    """
    sources = {name: [source] if isinstance(source, str) else list(source)
               for name, source in sources.items()}
    check_keys(state_dict, [old for olds in sources.values() for old in olds])
    tensors = {name: [state_dict[old] for old in olds] for name, olds in sources.items()}
    return {name: parts[0] if len(parts) == 1 else torch.cat(parts)
            for name, parts in tensors.items()}


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


def save_checkpoint(checkpoint: Any, path: str | Path) -> None:
    """Write a checkpoint so that `path` holds either all of it or what it held before.

    Args:
        checkpoint: Anything ``torch.save`` takes.
        path: File to write; its folder is made if need be.

    Raises:
        ConversionError: If the file cannot be written.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(
                dir=path.parent, prefix=f'.{path.name}.', delete=False) as file:
            try:
                torch.save(checkpoint, file)
                # A temporary file is private to its owner; a checkpoint gets the usual permissions.
                umask = os.umask(0)
                os.umask(umask)
                os.chmod(file.name, 0o666 & ~umask)
                os.replace(file.name, path)
            except BaseException:
                os.unlink(file.name)
                raise
    except OSError as error:
        raise ConversionError(f'{path} cannot be written: {error.strerror or error}') from error


def run_command(convert: Callable[[StateDict], tuple[StateDict, dict]], description: str,
                entries: Sequence[str] = ('model', )) -> None:
    """Be the command `SRC DST` of a converter: read, convert, write, say what was found.

    Ends the process with status 1 and one message if anything is wrong with the checkpoint.

    Args:
        convert: The conversion: weights to weights and what `meta` says of the architecture.
        description: Help text of the command.
        entries: See ``pick_state_dict``.
    """
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('src', metavar='SRC', help='the original checkpoint')
    parser.add_argument('dst', metavar='DST', help='file to write')
    args = parser.parse_args()
    try:
        state_dict, arch = convert(pick_state_dict(load_checkpoint(args.src), entries))
        save_checkpoint(dict(state_dict=state_dict, meta=dict(arch=arch)), args.dst)
    except ConversionError as error:
        sys.exit(f'{args.src} was not converted: {error}')

    print(f'architecture: {arch}')
    print(f'{len(state_dict)} tensors written to {args.dst}')
