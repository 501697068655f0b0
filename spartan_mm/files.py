"""Writing files so that nobody ever sees half of one."""

import errno
import json
import os
import tempfile
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


def check_writable(path: str | Path) -> None:
    """Check before long work that its result has a place, as far as one can tell by looking.

    Args:
        path: The file to write; its folder need not exist.

    Raises:
        UnwritableError: It is a folder, or its folder is a file or closed to this user.
    """
    path = Path(path)
    if os.path.isdir(path):
        raise UnwritableError(errno.EISDIR, 'it is a folder', str(path))
    folder = next(folder for folder in path.absolute().parents if os.path.exists(folder))
    if not folder.is_dir():
        raise UnwritableError(errno.ENOTDIR, f'{folder} is a file, not a folder', str(path))
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UnwritableError(errno.EACCES, os.strerror(errno.EACCES), str(path))


@contextmanager
def write_whole(path: str | Path) -> Iterator[IO[bytes]]:
    """Open a file for writing that takes its name only when it is complete and on the disk.

    Until then, and for ever if the process is killed or an error leaves the block, the name stands
    for what it stood for before.

    Args:
        path: The file; its folder is made if need be.

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
    path = Path(path)
    check_writable(path)
    unfinished = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, unfinished = tempfile.mkstemp(UNFINISHED, f'.{path.name}.', path.parent)
        with os.fdopen(handle, 'wb') as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        # A temporary file is private to its owner; this one gets the usual permissions.
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(unfinished, 0o666 & ~umask)
        os.replace(unfinished, path)
    except BaseException as error:
        if unfinished is not None:
            os.unlink(unfinished)
        # An error of another file, or one that the system does not know, is the caller's own.
        if (isinstance(error, OSError) and error.errno is not None
                and error.filename in (None, unfinished, str(path.parent))):
            raise UnwritableError(error.errno, error.strerror, str(path)) from error
        raise
    _flush_folder(path.parent)


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
