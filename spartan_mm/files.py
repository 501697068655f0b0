"""Writing files so that nobody ever sees half of one, and nothing else is lost.

A link is written through: it stays, and what it leads to is replaced. Folders, FIFOs, devices,
links to nowhere and what is read at the same time are never written over.
"""

import errno
import json
import os
import secrets
import signal
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from .errors import ExplainedError
from .text import printable

#: What the names of files end in that are not whole yet.
UNFINISHED = '.unfinished'


class UnwritableError(ExplainedError, OSError):
    """A file cannot be written; made of errno, the reason and the file, as any ``OSError``."""

    def __str__(self) -> str:
        remedy = 'make room' if self.errno in (errno.ENOSPC, errno.EDQUOT) else 'name another place'
        return printable(f'{self.filename} cannot be written: {self.strerror}; {remedy}')


def clean_up_on_sigterm() -> None:
    """Let SIGTERM end this process in order: what is unfinished is removed, processes are ended."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))


def check_writable(path: str | Path, *sources: str | Path) -> Path:
    """Check before long work that its result has a place, as far as one can tell by looking.

    Args:
        path: The file to write; its folder need not exist.
        sources: What is read, which must not be written over.

    Returns:
        The file to write, behind all links.

    Raises:
        UnwritableError: It is one of the sources, no regular file or closed to this user, or its
            folder is a file or closed to this user.
    """
    # Not pathlib's own questions, which some names make fail.
    path, target = Path(path), Path(os.path.realpath(path))
    exists, is_file = os.path.exists(target), os.path.isfile(target)
    folder = next(folder for folder in target.parents if os.path.lexists(folder))
    if os.path.isdir(target):
        problem = errno.EISDIR, 'it is a folder'
    elif is_file and any(map(target.samefile, filter(os.path.exists, sources))):
        problem = errno.EEXIST, 'it is what is read'
    elif lost := [part for part in (path, *path.parents)
                  if os.path.islink(part) and not os.path.exists(part)]:
        problem = errno.ENOENT, f'{lost[0]} is a link that leads nowhere'
    elif exists and not is_file:
        problem = errno.EEXIST, 'it is there and no regular file'
    elif not os.path.isdir(folder):
        problem = errno.ENOTDIR, f'{folder} is a file, not a folder'
    elif not os.access(folder, os.W_OK | os.X_OK) or (
            exists and not os.access(target, os.W_OK)):
        problem = errno.EACCES, os.strerror(errno.EACCES)
    else:
        return target
    raise UnwritableError(*problem, str(path))


@contextmanager
def write_whole(path: str | Path, flush: bool = True) -> Iterator[IO[bytes]]:
    """Open a file for writing that takes its name only when it is complete and on the disk.

    Until then, and for ever if the process is killed or an error leaves the block, the name stands
    for what it stood for before. Permissions are those of the file that is replaced, or the usual
    ones, and never more.

    Args:
        path: The file; its folder is made if need be.
        flush: Whether to wait until it is on the disk; without, a power failure may cost it.

    Yields:
        The file, open for bytes.

    Raises:
        UnwritableError: The file cannot be written, for want of space for example.

    Example:
        >>> import pathlib, tempfile
        >>> path = pathlib.Path(tempfile.mkdtemp(), 'notes.txt')
        >>> with write_whole(path) as file:
        ...     _ = file.write(b'all of it')
        >>> path.read_bytes()
        b'all of it'
    """
    target = check_writable(path)
    # The name of a file may be as long as names may be.
    unfinished = target.with_name(f'.{target.name[:40]}.{secrets.token_hex(4)}{UNFINISHED}')
    mode = stat.S_IMODE(target.stat().st_mode) if os.path.exists(target) else 0o666
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with open(unfinished, 'xb', opener=lambda *args: os.open(*args, mode)) as file:
            yield file
            file.flush()
            if flush:
                os.fsync(file.fileno())
        os.replace(unfinished, target)
    except BaseException as error:
        unfinished.unlink(missing_ok=True)
        # An error of another file, or one that the system does not know, is the caller's own.
        if (isinstance(error, OSError) and error.errno is not None and str(error.filename) in
                ('None', str(unfinished), *map(str, target.parents))):
            raise UnwritableError(error.errno, error.strerror, str(path)) from error
        raise
    if flush:
        _flush_folder(target.parent)


def write_json(path: str | Path, content: Any) -> None:
    """Write JSON, the whole file or none."""
    text = json.dumps(content, indent=1, ensure_ascii=False)
    # Bytes of a name that are no UTF-8 become escapes, which JSON reads as Python's own names.
    with write_whole(path) as file:
        file.write(f'{text}\n'.encode(errors='backslashreplace'))


def remove_unfinished(folder: str | Path) -> None:
    """Remove what processes that were killed while writing have left in a folder."""
    for path in Path(folder).glob(f'.*{UNFINISHED}'):
        path.unlink(missing_ok=True)


def _flush_folder(folder: Path) -> None:
    """Bring the names in a folder to the disk; without it a new name may be lost with the power."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        return  # folders cannot be opened on every system
    try:
        os.fsync(handle)
    except OSError:
        pass  # nor flushed on every file system
    finally:
        os.close(handle)
