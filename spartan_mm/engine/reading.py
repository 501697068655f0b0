"""Reading checkpoints as data: tensors, numbers and text, and nothing that a file asks to run.

NOTE: ``torch.load(weights_only=True)`` is not used. Before torch 2.6 a crafted file makes it run
code all the same (CVE-2025-32434), and before 2.5 it cannot be told of the few classes that
mmengine writes beside the weights. What stands here is the same for every torch, and names what it
refuses.
"""
import collections
import hashlib
import importlib
import json
import os
import pickle
import re
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import urlparse

import numpy as np
import torch
from mmengine import dist
from mmengine.config import Config
from safetensors import safe_open

from ..errors import ExplainedError
from .config_text import find_code


class CheckpointError(ExplainedError, RuntimeError):
    """A checkpoint cannot be read, or belongs to another model."""


# What publishing appends to a name: the first digits of the content's SHA-256. Eight digits may be
# a date, too.
_HASH = re.compile(r'-(?!(?:19|20)\d{6}\.)([0-9a-f]{8,64})\.')


class _Refused(Exception):
    """The name of something that reading a file would have to run."""


def read_checkpoint(path: str | Path, map_location: Any = 'cpu') -> Any:
    """Read a checkpoint without running anything that is in it.

    Args:
        path: a file written by ``torch.save`` or a safetensors file. Of the latter, the entry
            ``meta`` of the header, JSON, becomes the ``meta`` beside ``state_dict``.
        map_location: where the tensors go, see ``torch.load``.

    Returns:
        What was saved.

    Raises:
        FileNotFoundError: if there is no such file.
        CheckpointError: if the file cannot be read, or asks for anything to be run.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f'checkpoint {path} does not exist')
    read = _read_safetensors if _is_safetensors(path) else _read_pickle
    try:
        checkpoint = read(path, map_location)
    except _Refused as error:
        raise CheckpointError(
            f'{path} is refused: reading it would run {error}, which can do anything on this '
            'machine and has no place among weights. Nothing was run. Ask for the weights as '
            'safetensors; if the file is your own and the name a class of yours, allow it with '
            'torch.serialization.add_safe_globals; a checkpoint of the original authors is '
            'converted by tools/model_converters/spartan_to_mm.py or rtdetr_to_mm.py') from error
    # A damaged file is reported by a dozen exception types.
    except Exception as error:
        raise CheckpointError(f'{path} cannot be read as a checkpoint: {error}') from error
    return checkpoint


def read_config(checkpoint: Any, name: str | Path) -> Config | None:
    """Read the config inside of a checkpoint, and import what it names.

    Args:
        checkpoint: what :func:`read_checkpoint` gave.
        name: what to call the checkpoint in an error message.

    Returns:
        The config; None if there is none.

    Raises:
        CheckpointError: if the config would run code, or is none.
    """
    for place, key in _config_places(checkpoint):
        problem = _find_problem(place[key], name)
        if problem:
            raise CheckpointError(problem)
        try:
            return Config.fromstring(place[key], '.py')
        except Exception as error:  # whatever Python says about what is no config
            raise CheckpointError(f'the config inside of {name} cannot be used: {error}') from error
    return None


def _find_problem(text: str, name: str | Path) -> str | None:
    code = find_code(text)
    return code and (
        f'{name} is refused: the config in it would run code ({code}), or build what is not '
        'registered, as soon as it is used. Nothing was run. If it is your own, give the config '
        'file beside the checkpoint; else ask for the weights alone')


def _config_places(checkpoint: Any) -> Iterator[tuple[dict[str, Any], str]]:
    """Find the configs in a checkpoint, where mmengine looks for them, in its order.

    Yields:
        A dict and the key in it.
    """
    places = (('message_hub', 'runtime_info', 'cfg'), ('meta', 'cfg'), ('meta', 'config'))
    for *outer, last in places:
        found = checkpoint
        for key in outer:
            found = found.get(key) if isinstance(found, dict) else None
        if isinstance(found, dict) and isinstance(found.get(last), str):
            yield found, last


def with_tuples(meta: dict[str, Any]) -> dict[str, Any]:
    """Make tuples of the lists in ``meta`` that are tuples in OpenMMLab; JSON has none."""
    dataset_meta = dict(meta.get('dataset_meta') or {})
    if isinstance(dataset_meta.get('classes'), list):
        dataset_meta['classes'] = tuple(dataset_meta['classes'])
    if isinstance(dataset_meta.get('palette'), list):
        dataset_meta['palette'] = [tuple(colour) for colour in dataset_meta['palette']]
    return dict(meta, dataset_meta=dataset_meta) if dataset_meta else meta


def local_file(checkpoint: str | Path) -> Path:
    """Where a checkpoint lies; one behind a URL is downloaded to torch's cache first.

    If its name ends with a hash, as that of published files does, the content is checked by it.

    Args:
        checkpoint: Path or URL.

    Returns:
        The path of the file.

    Raises:
        CheckpointError: if it cannot be downloaded, or is not what its name says.
    """
    if '://' not in str(checkpoint):
        return Path(checkpoint)
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
            raise CheckpointError(
                f'{checkpoint} is refused: what was downloaded is not the file that its name '
                f'states the hash of ({error}). Try again; if you trust it nonetheless, download '
                'it by other means and give the path'
            ) from error
    dist.barrier()
    return path


# mmengine's log says what follows 'load_from_' in these names.

def load_from_local(filename: str, map_location: Any = None) -> Any:
    """Read a file, in the place of mmengine's function.

    Who asks may go on to run the config in it, as mmengine's inferencers do, or to ignore it, as
    resuming and testing do. One that would run code is replaced by one that says so when it is run.
    """
    checkpoint = read_checkpoint(filename, map_location)
    for place, key in _config_places(checkpoint):
        problem = _find_problem(place[key], filename)
        if problem:
            # mmengine replaces what stands in two braces, even within a string.
            message = re.sub('[{}]', '', ascii(problem))
            place[key] = f'raise RuntimeError({message})'
    return checkpoint


def load_from_http(filename: str, map_location: Any = None, *_: Any, **__: Any) -> Any:
    """Download a file unless that was done before, and read it, in the place of mmengine's."""
    return load_from_local(str(local_file(filename)), map_location)


def refuse_scheme(filename: str, map_location: Any = None) -> None:
    """Refuse an address whose content mmengine would unpickle unchecked."""
    raise CheckpointError(f'{filename} is refused: checkpoints are read safely from files and from '
                          'http(s) alone; download it and give the path')


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


def _read_pickle(path: Path, map_location: Any) -> Any:
    # Both forms are read by other means, in which old versions of torch run code.
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as file:
            if any(Path(name).name == 'constants.pkl' for name in file.namelist()):
                raise CheckpointError('it is a TorchScript program, not a checkpoint of weights')
    elif tarfile.is_tarfile(path):
        raise CheckpointError('it is a tar archive, which torch wrote before version 0.1.10')
    reader = SimpleNamespace(
        __name__=__name__, Unpickler=_Unpickler,
        load=lambda file, **options: _Unpickler(file, **options).load())
    # With this variable torch accepts no reader but its own.
    forced = os.environ.pop('TORCH_FORCE_WEIGHTS_ONLY_LOAD', None)
    try:
        return torch.load(path, map_location=map_location, pickle_module=reader,
                          weights_only=False)
    finally:
        if forced is not None:
            os.environ['TORCH_FORCE_WEIGHTS_ONLY_LOAD'] = forced


class _Unpickler(pickle._Unpickler):
    """Knows the names in :func:`_known_globals`, and no others.

    The Python implementation, because the compiled one does not say which object a state is given
    to: it would set attributes of the known classes and functions themselves.
    """

    dispatch = dict(pickle._Unpickler.dispatch)

    def find_class(self, module: str, name: str) -> Any:
        """Look a name up."""
        # Python 2's names, which torch writes.
        module = dict(__builtin__='builtins', copy_reg='copyreg').get(module, module)
        full_name = f'{module}.{name}'
        known = _allowed_by_user() | _known_globals()
        if full_name not in known:
            raise _Refused(full_name)
        return known[full_name]

    def load_build(self) -> None:
        """Give an object its state, if it is one that may have one."""
        state, target = self.stack[-1], self.stack[-2]
        if isinstance(target, np.dtype):
            # Anything but the byte order would describe another type.
            allowed = state[2:] == (None, None, None, -1, -1, 0)
        elif type(target) is np.ndarray:
            allowed = state[2].kind in 'biufc'
        else:
            own = (collections.OrderedDict, _history_buffer(), *_allowed_by_user().values())
            allowed = type(target) in own
        if not allowed:
            raise _Refused(f'a change of {type(target).__name__}')
        super().load_build()

    dispatch[pickle.BUILD[0]] = load_build


@cache
def _known_globals() -> dict[str, Any]:
    """What torch, NumPy and mmengine write into a checkpoint, by name."""
    numpy_core = importlib.import_module(
        'numpy._core.multiarray' if hasattr(np, '_core') else 'numpy.core.multiarray')
    harmless = (bool, bytearray, bytes, complex, dict, float, frozenset, int, list, range, set,
                slice, str, tuple)
    return {
        **{f'builtins.{kind.__name__}': kind for kind in harmless},
        **{f'torch.{name}': value for name, value in vars(torch).items()
           if isinstance(value, torch.dtype)},
        **{f'torch._utils.{name}': getattr(torch._utils, name)
           for name in ('_rebuild_parameter', '_rebuild_tensor', '_rebuild_tensor_v2')},
        **{f'numpy.{core}.multiarray.{name}': getattr(numpy_core, name)
           for core in ('core', '_core') for name in ('_reconstruct', 'scalar')},
        '_codecs.encode': _encode,
        'builtins.getattr': _statistics_method,
        'collections.Counter': collections.Counter,
        'collections.OrderedDict': collections.OrderedDict,
        'mmengine.logging.history_buffer.HistoryBuffer': _history_buffer(),
        'numpy.dtype': _plain_dtype,
        'numpy.ndarray': np.ndarray,
        'torch.Size': torch.Size,
        'torch.device': torch.device,
    }


def _allowed_by_user() -> dict[str, Callable]:
    """What this process declared safe by torch's means, by name."""
    entries = getattr(torch.serialization, 'get_safe_globals', list)()
    named = (entry if isinstance(entry, tuple) else (entry, None) for entry in entries)
    return {name or f'{item.__module__}.{item.__qualname__}': item for item, name in named}


def _history_buffer() -> type:
    from mmengine.logging.history_buffer import HistoryBuffer
    return HistoryBuffer


def _statistics_method(owner: Any, name: str) -> Callable:
    """Stand in for ``getattr``, by which the statistics of a ``HistoryBuffer`` are pickled."""
    buffer = _history_buffer()
    # The first instance fills the table.
    if owner is not buffer or getattr(buffer, name, None) not in buffer(
            )._statistics_methods.values():
        raise _Refused(f'getattr of {getattr(owner, "__name__", owner)}.{name}')
    return getattr(owner, name)


def _plain_dtype(code: str, *_: Any) -> np.dtype:
    """Stand in for ``numpy.dtype``: numbers pass."""
    if not re.fullmatch(r'[biufc]\d{1,2}', str(code)):
        raise _Refused(f'numpy.dtype({code!r})')
    return np.dtype(code)


def _encode(text: str, encoding: str = 'latin1') -> bytes:
    """Stand in for ``_codecs.encode``, by which Python 2's protocol holds bytes."""
    if encoding not in ('latin1', 'utf-8', 'ascii'):
        raise _Refused(f'the codec {encoding!r}')
    return text.encode(encoding)

