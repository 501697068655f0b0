"""Reading checkpoints as data: tensors, numbers and text, and nothing that a file asks to run."""
import hashlib
import importlib
import json
import os
import re
import sys
import tarfile
import threading
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from pickle import UnpicklingError
from typing import Any
from urllib.parse import urlparse

import numpy as np
import torch
from mmengine import dist
from mmengine.logging.history_buffer import HistoryBuffer
from safetensors import safe_open

from ..errors import CheckpointError
from . import hub
from .pickle_scan import Scan

# What publishing appends to a name: the first digits of the content's SHA-256. Eight digits may be
# a date, too.
_HASH = re.compile(r'-(?!(?:19|20)\d{6}\.)([0-9a-f]{8,64})\.')

# What torch says of a file that asks for more than it may, and what that is.
_REFUSALS = {
    r'GLOBAL (.+?) (?:whose|was not)': '{}',
    r'Can only create new object .* but got (.+)': 'the class {}',
    r'Trying to call reduce for unrecognized function (.+)': 'the function {}',
    r"Can only build .* but got <class '(.+)'>": 'a change of {}',
}


# Of Python's own modules, those whose classes hold values, as settings in checkpoints do.
_VALUE_MODULES = frozenset(['argparse', 'collections', 'copyreg', 'datetime', 'decimal', 'enum',
                            'fractions', 'pathlib', 'types', 'typing', 'uuid'])
_NO_VALUES = sys.stdlib_module_names - _VALUE_MODULES
_LOCK = threading.Lock()


class _Refused(Exception):
    """The name of something that reading a file would have to run."""


def read_checkpoint(path: str | Path, map_location: Any = 'cpu', foreign: bool = False) -> Any:
    """Read a checkpoint without running anything that is in it.

    It is ``torch.load(weights_only=True)``, which is also told of the few classes that mmengine
    writes beside the weights, and of what ``torch.serialization.add_safe_globals`` declared. What a
    file claims to hold is held against its size before any memory is taken.

    Args:
        path: A file written by ``torch.save`` or a safetensors file. Of the latter, the entry
            ``meta`` of the header, JSON, becomes the ``meta`` beside ``state_dict``.
        map_location: Where the tensors go, see ``torch.load``.
        foreign: Whether objects of other packages' classes are read as empty placeholders, so that
            the packages need not be installed: training checkpoints often hold more than tensors,
            the authors' SpaRTAN files an omegaconf config. What names functions of Python or of the
            operating system is refused all the same.

    Returns:
        What was saved.

    Raises:
        FileNotFoundError: There is no such file.
        CheckpointError: The file cannot be read, or asks for anything to be run.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f'checkpoint {path} does not exist')
    try:
        if _is_safetensors(path):
            return _read_safetensors(path, map_location)
        return _read_pickle(path, map_location, foreign)
    except _Refused as error:
        raise CheckpointError(
            f'{path} is refused: reading it would run {error}, which can do anything on this '
            'machine and has no place among weights. Nothing was run. Ask for the weights as '
            'safetensors; if the file is your own and the name a class of yours, allow it with '
            'torch.serialization.add_safe_globals; a checkpoint of the original authors is '
            'converted by spartan-mm convert FILE OUT --to mm') from error
    # A damaged file is reported by a dozen exception types.
    except Exception as error:
        raise CheckpointError(f'{path} cannot be read as a checkpoint: {error}') from error


def read_foreign(path: str | Path) -> Any:
    """Read a checkpoint of another code base onto the CPU, see :func:`read_checkpoint`.

    Raises:
        CheckpointError: The file does not exist, is not a checkpoint, or is refused.
    """
    if Path(path).is_dir():
        raise CheckpointError(f'{path} is a folder, not a checkpoint')
    try:
        return read_checkpoint(path, foreign=True)
    except OSError as error:
        raise CheckpointError(str(error)) from error


class _Placeholder:
    """Takes the place of an object whose class is not allowed to run."""

    def __new__(cls, *args, **kwargs):
        return super().__new__(cls)

    def __init__(self, *args, **kwargs):
        pass

    def _ignore(self, *args):
        pass

    __setstate__ = __setitem__ = _ignore


def _make_placeholder(name: str, content: type | None) -> type:
    """Make a class of a name; calling it gives a placeholder, or what torch fills in its place."""
    members = dict(__module__=name.rpartition('.')[0], __qualname__=name.rpartition('.')[2])
    if content:
        made = OrderedDict if content is dict else list
        members['__new__'] = lambda cls, *args, **kwargs: made()
    return type(members['__qualname__'], (_Placeholder, ), members)


def local_file(checkpoint: str | Path) -> Path:
    """Where a checkpoint lies; one behind a URL is downloaded to torch's cache first.

    One on the Hugging Face Hub goes to the cache of the Hub. If its name ends with a hash, as that
    of published files does, the content is checked by it.

    Args:
        checkpoint: Path, URL, or an address on the Hub, see :mod:`.hub`.

    Returns:
        The path of the file.

    Raises:
        CheckpointError: It cannot be downloaded, or is not what its name says.
    """
    if '://' not in str(checkpoint):
        return Path(checkpoint)
    if str(checkpoint).startswith(hub.SCHEME):
        path = hub.fetch(str(checkpoint))
        stated = _HASH.search(path.name)
        if stated and not hashlib.sha256(path.read_bytes()).hexdigest().startswith(stated[1]):
            raise _not_as_stated(checkpoint, f'it lies in {path}')
        return path
    name = Path(urlparse(str(checkpoint)).path).name
    stated = _HASH.search(name)
    if not stated:
        # Any two files may have this name.
        name = f'{hashlib.sha256(str(checkpoint).encode()).hexdigest()[:8]}-{name}'
    path = Path(torch.hub.get_dir()) / 'checkpoints' / name
    # One process of each node; the others wait for it.
    if int(os.environ.get('LOCAL_RANK', 0)) == 0 and not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(str(checkpoint), str(path), stated and stated[1],
                                           progress=dist.is_main_process())
        except OSError as error:
            raise CheckpointError(f'{checkpoint} cannot be downloaded: {error}') from error
        except RuntimeError as error:
            raise _not_as_stated(checkpoint, error) from error
    dist.barrier()
    return path


def _not_as_stated(checkpoint: str | Path, detail: Any) -> CheckpointError:
    return CheckpointError(
        f'{checkpoint} is refused: what was downloaded is not the file that its name states the '
        f'hash of ({detail}). Try again; if you trust it nonetheless, download it by other means '
        'and give the path')


def with_tuples(meta: dict[str, Any]) -> dict[str, Any]:
    """Make tuples of the lists in ``meta`` that are tuples in OpenMMLab; JSON has none."""
    dataset_meta = dict(meta.get('dataset_meta') or {})
    if isinstance(dataset_meta.get('classes'), list):
        dataset_meta['classes'] = tuple(dataset_meta['classes'])
    if isinstance(dataset_meta.get('palette'), list):
        dataset_meta['palette'] = [tuple(colour) for colour in dataset_meta['palette']]
    return dict(meta, dataset_meta=dataset_meta) if dataset_meta else meta


def _is_safetensors(path: Path) -> bool:
    with path.open('rb') as file:
        head = file.read(9)
    fits = int.from_bytes(head[:8], 'little') + 8 <= path.stat().st_size
    return path.suffix == '.safetensors' or (head[8:] == b'{' and fits)


def _read_safetensors(path: Path, map_location: Any) -> dict[str, Any]:
    device = str(map_location) if isinstance(map_location, (str, torch.device)) else 'cpu'
    with safe_open(path, framework='pt', device=device) as file:
        meta = json.loads((file.metadata() or {}).get('meta', '{}'))
        weights = {name: file.get_tensor(name) for name in file.keys()}
    if not isinstance(meta, dict):
        raise CheckpointError("the entry 'meta' of its header is no dict")
    return dict(meta=with_tuples(meta), state_dict=weights)


def _read_pickle(path: Path, map_location: Any, foreign: bool) -> Any:
    # torch refuses these, too, but advises to read them without care.
    scan = Scan(path.stat().st_size)
    with path.open('rb') as file:
        # torch looks at the beginning, Python's zipfile at the end.
        zipped = file.read(4) == b'PK\x03\x04'
    if zipped:
        with zipfile.ZipFile(path) as file:
            sizes = {}
            for entry in file.infolist():
                # torch does not tell upper from lower case; of several entries it takes any.
                name = entry.filename.lower().partition('/')[2]
                sizes[name] = min(entry.file_size, sizes.get(name, entry.file_size))
            if 'constants.pkl' in sizes:
                raise CheckpointError('it is a TorchScript program, not a checkpoint of weights')
            if sum(entry.file_size for entry in file.infolist()) > path.stat().st_size:
                raise CheckpointError('its entries claim more bytes than it has')
            for entry in file.infolist():
                if entry.filename.lower().endswith('data.pkl'):
                    scan.read(file.open(entry))
            if any(size > sizes.get(f'data/{key}'.lower(), -1)
                   for key, (size, _) in scan.storages.items()):
                raise CheckpointError('its tensors claim more bytes than their entries have')
    elif tarfile.is_tarfile(path):
        raise CheckpointError('it is a tar archive, which torch wrote before version 0.1.10')
    else:
        with path.open('rb') as file:
            # Two numbers and what machine it was, the content, the keys of the storages.
            for _ in range(5):
                scan.read(file)
    try:
        with _declared_safe(scan if foreign else None):
            return torch.load(path, map_location=map_location, weights_only=True)
    except UnpicklingError as error:
        raise _explain(str(error)) from error


def _explain(message: str) -> Exception:
    """Put torch's refusal in our words, without its advice to read the file without care."""
    for pattern, name in _REFUSALS.items():
        found = re.search(pattern, message)
        if found:
            name = name.format(found[1])
            # It leaves the module of Python's own functions out.
            return _Refused(name if '.' in name or ' ' in name else f'builtins.{name}')
    return CheckpointError(message.rpartition('WeightsUnpickler error:')[2].strip().split('\n')[0])


@contextmanager
def _declared_safe(scan: Scan | None) -> Iterator[None]:
    """Tell torch what stands for which name; ours come before what the process declared.

    Args:
        scan: Of a file whose foreign objects become placeholders.
    """
    own = _safe_globals()
    names = {name for _, name in own}
    # torch has one list for all threads.
    with _LOCK:
        declared = torch.serialization.get_safe_globals()
        others = {entry[1] if isinstance(entry, tuple) else
                  f'{entry.__module__}.{entry.__qualname__}': entry for entry in declared}
        if scan:
            # What is left out here is refused when the file is read.
            own = [*own, *((_make_placeholder(name, scan.filled.get(name)), name)
                           for name in scan.names - {*names, *others}
                           if name.partition('.')[0] not in _NO_VALUES)]
        if names.isdisjoint(others):
            with torch.serialization.safe_globals(own):
                yield
            return
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(
            [*own, *(entry for name, entry in others.items() if name not in names)])
        try:
            yield
        finally:
            torch.serialization.clear_safe_globals()
            torch.serialization.add_safe_globals(declared)


@cache
def _safe_globals() -> list[tuple[Callable, str]]:
    """What NumPy and mmengine write into a checkpoint: for each name what stands for it.

    NOTE: ``numpy.ndarray`` and ``numpy.dtype`` themselves are not safe: an array of objects over
    given bytes, or a type that claims to hold objects, makes Python follow any address. So their
    names stand for functions that make plain numbers alone. torch also has to know the types of
    what is given a state: these have names that no file can ask for, as they lack a module.
    """
    numpy_core = importlib.import_module(
        'numpy._core.multiarray' if hasattr(np, '_core') else 'numpy.core.multiarray')
    arrays = [(function, f'numpy.{core}.multiarray.{name}') for core in ('core', '_core')
              for function, name in ((_empty_array, '_reconstruct'), (numpy_core.scalar, 'scalar'))]
    number_types = [(type(np.dtype(code)), f'numpy dtype {code}')
                    for code in np.typecodes['All'] if np.dtype(code).kind in 'biufc']
    return [
        *arrays, *number_types,
        (_Array, 'numpy array'),
        (_array_type, 'numpy.ndarray'),
        (_plain_dtype, 'numpy.dtype'),
        # Protocol 2 makes b'' so; an array without elements has it.
        (bytes, 'builtins.bytes'),
        # Their names alone, but for frozenset, range and slice, see pickle_scan.
        *((kind, f'builtins.{kind.__name__}') for kind in (
            bool, dict, float, frozenset, int, list, range, slice, str, tuple)),
        (_statistics_method, 'builtins.getattr'),
        (HistoryBuffer, 'mmengine.logging.history_buffer.HistoryBuffer'),
    ]


def _plain_dtype(code: str, *_: Any) -> np.dtype:
    """Stand in for ``numpy.dtype``: numbers pass. These dtypes ignore states that are set."""
    if not re.fullmatch(r'[biufc]\d{1,2}', str(code)):
        raise _Refused(f'numpy.dtype({code!r})')
    return np.dtype(code)


class _Array(np.ndarray):
    """An array that takes its numbers once.

    NOTE: NumPy frees the numbers that an array has when it gets others, also while a tensor looks
    at them, and torch makes a tensor of an array if a file asks for it.
    """

    def __setstate__(self, state: tuple) -> None:
        """Take numbers."""
        if self.size:
            raise _Refused('a second change of a numpy.ndarray')
        super().__setstate__(state)

    def __reduce__(self) -> tuple:
        """Be an ordinary array in a file."""
        return self.view(np.ndarray).__reduce__()


def _empty_array(*_: Any) -> np.ndarray:
    """Stand in for NumPy's ``_reconstruct``; a state gives the array its numbers."""
    return _Array(0)


def _array_type(*_: Any) -> None:
    """Stand in for ``numpy.ndarray``, which files name as an argument of ``_reconstruct``."""
    raise _Refused('numpy.ndarray')


def _statistics_method(owner: Any, name: str) -> Callable:
    """Stand in for ``getattr``, by which the statistics of a ``HistoryBuffer`` are pickled."""
    # The first instance fills the table.
    if owner is not HistoryBuffer or getattr(HistoryBuffer, name, None) not in HistoryBuffer(
            )._statistics_methods.values():
        raise _Refused(f'getattr of {getattr(owner, "__name__", owner)}.{name}')
    return getattr(owner, name)
