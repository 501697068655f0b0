"""Writing files so that nobody ever sees half of one."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

#: What the names of files end in that are not whole yet.
UNFINISHED = '.unfinished'


@contextmanager
def write_whole(path: str | Path) -> Iterator[IO[bytes]]:
    """Open a file for writing that takes its name only when it is complete and on the disk.

    Until then, and for ever if the process is killed or an error leaves the block, the name stands
    for what it stood for before.

    Args:
        path: the file; its folder is made if need be.

    Yields:
        The file, open for bytes.

    Raises:
        OSError: the file cannot be written, for want of space for example.

    Example:
        >>> import pathlib, tempfile
        >>> path = pathlib.Path(tempfile.mkdtemp(), 'notes.txt')
        >>> with write_whole(path) as file:
        ...     _ = file.write(b'all of it')
        >>> path.read_bytes()
        b'all of it'
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, unfinished = tempfile.mkstemp(UNFINISHED, f'.{path.name}.', path.parent)
    try:
        with os.fdopen(handle, 'wb') as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        # A temporary file is private to its owner; this one gets the usual permissions.
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(unfinished, 0o666 & ~umask)
        os.replace(unfinished, path)
    except BaseException:
        os.unlink(unfinished)
        raise
    _flush_folder(path.parent)


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
