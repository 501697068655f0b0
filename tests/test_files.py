"""Files are there as a whole or not at all."""

import errno
import os
import stat

import pytest

from spartan_mm.files import UnwritableError, remove_unfinished, write_whole


def test_a_file_replaces_the_one_before(tmp_path):
    path = tmp_path / 'new' / 'file.bin'
    for content in (b'first', b'second, longer'):
        with write_whole(path) as file:
            file.write(content)
        assert path.read_bytes() == content
    assert [entry.name for entry in path.parent.iterdir()] == ['file.bin']
    # As any other program may read it that could read a file made by open().
    (tmp_path / 'usual').touch()
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE((tmp_path / 'usual').stat().st_mode)


@pytest.mark.parametrize('error', [OSError(errno.ENOSPC, 'full'), KeyboardInterrupt()])
def test_an_error_leaves_what_was_there(tmp_path, error):
    path = tmp_path / 'file.bin'
    path.write_bytes(b'before')
    with pytest.raises(type(error)), write_whole(path) as file:
        file.write(b'half')
        raise error
    assert path.read_bytes() == b'before'
    assert [entry.name for entry in tmp_path.iterdir()] == ['file.bin']


def test_a_full_disk_explains_itself(tmp_path):
    path = tmp_path / 'file.bin'
    with pytest.raises(UnwritableError) as caught, write_whole(path):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert str(caught.value) == f'{path} cannot be written: No space left on device; make room'
    assert (caught.value.errno, caught.value.strerror) == (errno.ENOSPC, 'No space left on device')


def test_an_error_of_another_file_stays_what_it_is(tmp_path):
    with pytest.raises(FileNotFoundError, match='absent'), write_whole(tmp_path / 'file.bin'):
        open(tmp_path / 'absent')


@pytest.mark.parametrize('name, message', [
    ('folder', 'folder cannot be written: it is a folder; name another place'),
    ('file/deeper/a.png', 'cannot be written: .*file is a file, not a folder; name another place')])
def test_no_place(tmp_path, name, message):
    (tmp_path / 'folder').mkdir()
    (tmp_path / 'file').touch()
    with pytest.raises(UnwritableError, match=message), write_whole(tmp_path / name):
        pass


def test_what_killed_processes_leave_is_removed(tmp_path):
    for name in ('.epoch_1.pth.x1.unfinished', '.hidden', 'epoch_1.pth'):
        (tmp_path / name).touch()
    remove_unfinished(tmp_path)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ['.hidden', 'epoch_1.pth']
