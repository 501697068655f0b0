"""Folders that are made once: complete or not there at all, and never in place of other data."""

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

Stamp = dict[str, Any]


def make_once(root: str | Path, stamp: Stamp, find_stamp: Callable[[Path], Stamp | None],
              write: Callable[[Path], None]) -> Path:
    """Make a folder, unless it is there already, made with the same arguments.

    It is written beside ``root`` and moved there when complete, so an interrupted run leaves
    nothing half-made.

    Args:
        root: The folder; one made earlier with other arguments is replaced.
        stamp: What the content depends on, fit for JSON.
        find_stamp: Reads the stamp of a folder; None if the folder is missing or incomplete. It
            raises if the folder holds something else.
        write: Writes everything, the stamp too, to the empty folder that it is given.

    Returns:
        The folder, as an absolute path.
    """
    root = Path(root).resolve()
    if find_stamp(root) == stamp:
        return root

    root.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f'.{root.name}-', dir=root.parent))
    try:
        write(partial)
        partial.chmod(0o755)  # mkdtemp lets nobody else read
        _move(partial, root, stamp, find_stamp)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return root


def is_missing(root: Path) -> bool:
    """Say whether there is nothing at a path, or an empty folder."""
    return not root.exists() or (root.is_dir() and not any(root.iterdir()))


def refuse_to_replace(root: Path, strange: set[str], kind: str) -> FileExistsError:
    """Make the error for a folder that holds something else.

    Args:
        root: The folder.
        strange: Names of what does not belong there, if anything is known.
        kind: What is expected there.
    """
    holds = f'has {", ".join(sorted(strange))} in it' if strange else f'is no {kind}'
    return FileExistsError(
        f'{root} is there already and {holds}, so it is not replaced: '
        'name another folder, or remove it.')


def _move(partial: Path, root: Path, stamp: Stamp,
          find_stamp: Callable[[Path], Stamp | None]) -> None:
    """Move the complete folder to ``root``, in place of an earlier one."""
    if not is_missing(root):
        # Another process may have made the same in the meantime.
        if find_stamp(root) == stamp:
            return
        replaced = Path(tempfile.mkdtemp(prefix=f'.{root.name}-', dir=root.parent))
        os.rename(root, replaced / root.name)
        shutil.rmtree(replaced)
    try:
        os.rename(partial, root)
    except OSError:
        if find_stamp(root) != stamp:
            raise
