"""Datasets that are made once: complete or not there at all, and never in place of other data."""

import json
import os
import secrets
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path, PurePath
from typing import Any

SPLITS = ('train', 'val')

Stamp = dict[str, Any]


def make_once(root: str | Path, description: str, stamp: Stamp, infos: Sequence[str],
              write: Callable[[Path], None]) -> Path:
    """Make a dataset, unless it is there already, made with the same arguments.

    It is written beside ``root`` and moved there when complete, so an interrupted run leaves
    nothing half-made.

    Args:
        root: Its folder; one made earlier with other arguments is replaced.
        description: What is in it.
        stamp: What the content depends on, fit for JSON.
        infos: JSON files in it that hold, under ``info`` if that is there, ``description``,
            ``stamp`` and ``pictures``, their number for each split. Beside them and the folders of
            the splits nothing lies in the folder.
        write: Writes everything to the empty folder that it is given.

    Returns:
        The folder, as an absolute path.

    Raises:
        FileExistsError: ``root`` is there and holds something else.
    """
    root = Path(root).resolve()

    def is_made() -> bool:
        return _find_stamp(root, description, infos) == stamp

    if is_made():
        return root
    root.parent.mkdir(parents=True, exist_ok=True)
    # Unlike mkdtemp's, which nobody else may read, it has the usual permissions.
    partial = root.parent / f'.{root.name}-{secrets.token_hex(4)}'
    partial.mkdir()
    try:
        write(partial)
        if not _is_missing(root):
            # Another process may have made the same in the meantime.
            if is_made():
                return root
            replaced = Path(tempfile.mkdtemp(prefix=f'.{root.name}-', dir=root.parent))
            os.rename(root, replaced / root.name)
            shutil.rmtree(replaced)
        try:
            os.rename(partial, root)
        except OSError:
            if not is_made():
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return root


def _is_missing(root: Path) -> bool:
    """Say whether there is nothing at a path, or an empty folder."""
    return not root.exists() or (root.is_dir() and not any(root.iterdir()))


def _find_stamp(root: Path, description: str, names: Sequence[str]) -> Stamp | None:
    """Read with which arguments a dataset was made; None if it is missing or incomplete."""
    if _is_missing(root):
        return None
    holds = f'does not hold {description}'
    try:
        infos = [json.loads((root / name).read_text()) for name in names]
        infos = [info.get('info', info) for info in infos]
        if all(info['description'] == description for info in infos):
            stamp = infos[0]['stamp']
            counts = infos[0].get('pictures', stamp)  # older datasets have no other
            own = {*SPLITS, *(PurePath(name).parts[0] for name in names)}
            strange = sorted({path.name for path in root.iterdir()} - own)
            if not strange:
                complete = all(info['stamp'] == stamp for info in infos) and all(
                    sum(1 for _ in (root / split).rglob('*.*')) == counts[split]
                    for split in SPLITS)
                return stamp if complete else None
            holds = f'has {", ".join(strange)} in it'
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        pass
    raise FileExistsError(f'{root} is there already and {holds}, so it is not replaced: name '
                          'another folder, or remove it.')
