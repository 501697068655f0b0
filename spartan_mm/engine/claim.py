"""One training at a time writes to a work dir."""

import logging
import os
import socket
from pathlib import Path
from typing import IO

from mmengine import dist
from mmengine.logging import print_log

from ..errors import ExplainedError, UsageError
from ..files import UnwritableError, check_writable

try:
    import fcntl
except ImportError:
    fcntl = None  # not on Windows


def claim_work_dir(work_dir: str | Path) -> IO[str] | None:
    """Claim a work dir for this training, until the returned file is closed or the process ends.

    The main process locks a file in it; all of them have to call this. Locks of POSIX's kind end
    with the process however it ends, and processes that load data do not inherit them.

    Args:
        work_dir: The folder; it is made if need be.

    Returns:
        The locked file; None in other processes, and where files cannot be locked.

    Raises:
        UsageError: Another training has claimed it.
        UnwritableError: There can be no such folder.
    """
    file, problem = None, [None]
    if dist.is_main_process():
        try:
            file = _lock(Path(work_dir, 'training.lock'))
        except ExplainedError as error:
            problem = [error]
    dist.broadcast_object_list(problem)
    if problem[0] is not None:
        raise problem[0]
    return file


def _lock(path: Path) -> IO[str] | None:
    check_writable(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open('a+')
    except OSError as error:
        raise UnwritableError(error.errno, error.strerror, str(path)) from error
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError) as error:
        file.seek(0)
        raise UsageError(f'another training is running in {path.parent}, {file.read()}; wait for '
                         'its end, or name another --work-dir') from error
    except (OSError, AttributeError) as error:
        # Some network file systems know no locks.
        print_log(f'{path} cannot be locked ({error}): nothing keeps another training from '
                  'writing to the same work dir', 'current', logging.WARNING)
        file.close()
        return None
    file.truncate(0)
    file.write(f'process {os.getpid()} on {socket.gethostname()}')
    file.flush()
    return file
