"""One training at a time writes to a work dir."""

import errno
import os
import signal
import subprocess
import sys

import pytest

from spartan_mm.engine import claim
from spartan_mm.engine.claim import claim_work_dir
from spartan_mm.errors import UsageError
from spartan_mm.files import UnwritableError

pytestmark = pytest.mark.skipif(claim.fcntl is None, reason='this system has no locks of POSIX')


@pytest.fixture
def other(tmp_path):
    """Another process that has claimed the folder."""
    code = ('import fcntl, sys, time\n'
            'file = open(sys.argv[1], "a+")\n'
            'fcntl.lockf(file, fcntl.LOCK_EX)\n'
            'file.write("process 5 on host"); file.flush()\n'
            'print("locked", flush=True); time.sleep(600)')
    process = subprocess.Popen([sys.executable, '-c', code, str(tmp_path / 'training.lock')],
                               stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == 'locked\n'
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def test_the_second_is_refused_until_the_first_is_gone(tmp_path, other):
    with pytest.raises(UsageError, match=f'another training is running in {tmp_path}, process 5 on '
                                         'host; .*another --work-dir'):
        claim_work_dir(tmp_path)
    os.kill(other.pid, signal.SIGKILL)
    other.wait()
    with claim_work_dir(tmp_path):
        assert (tmp_path / 'training.lock').read_text().startswith(f'process {os.getpid()} on ')


def test_processes_that_load_data_do_not_keep_it(tmp_path):
    """Those of a training that was killed live on for some seconds."""
    claimed = claim_work_dir(tmp_path / 'new' / 'folder')
    child = os.fork()
    if child == 0:
        signal.pause()
    claimed.close()
    try:
        code = ('import sys; from spartan_mm.engine.claim import claim_work_dir\n'
                'claim_work_dir(sys.argv[1])')
        subprocess.run([sys.executable, '-c', code, str(tmp_path / 'new' / 'folder')], check=True)
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_all_processes_refuse(tmp_path, monkeypatch):
    """Only the main one looks; the others learn of it."""
    monkeypatch.setattr(claim.dist, 'is_main_process', lambda: False)
    monkeypatch.setattr(claim.dist, 'broadcast_object_list',
                        lambda items: items.__setitem__(0, UsageError('taken')))
    with pytest.raises(UsageError, match='taken'):
        claim_work_dir(tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('place', ['file', 'file/deeper'])
def test_a_file_in_the_way(tmp_path, place):
    (tmp_path / 'file').write_text('mine')
    with pytest.raises(UnwritableError, match='file is a file, not a folder; name another place'):
        claim_work_dir(tmp_path / place)


def test_without_locks_it_goes_on_with_a_warning(tmp_path, monkeypatch):
    def refuse(*arguments):
        raise OSError(errno.ENOLCK, 'No locks available')

    warnings = []
    monkeypatch.setattr(claim.fcntl, 'lockf', refuse)
    monkeypatch.setattr(claim, 'print_log', lambda text, *_: warnings.append(text))
    assert claim_work_dir(tmp_path) is None
    assert len(warnings) == 1 and 'cannot be locked' in warnings[0]
