"""Files are there as a whole or not at all."""

import errno
import json
import os
import stat

import pytest

from spartan_mm.datasets.atomic_folder import make_once
from spartan_mm.files import (
    UnwritableError,
    check_writable,
    remove_unfinished,
    write_json,
    write_whole,
)


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


@pytest.fixture
def places(tmp_path):
    """A folder of what must not be written over."""
    (tmp_path / 'folder').mkdir()
    (tmp_path / 'file').write_bytes(b'before')
    os.mkfifo(tmp_path / 'fifo')
    (tmp_path / 'link to nowhere').symlink_to('nowhere')
    (tmp_path / 'link to itself').symlink_to('link to itself')
    (tmp_path / 'link to fifo').symlink_to('fifo')
    (tmp_path / 'link').symlink_to('file')
    return tmp_path


@pytest.mark.parametrize('name, message', [
    ('folder', 'it is a folder'), ('file/deeper/a.png', '.*file is a file, not a folder'),
    ('fifo/a.png', '.*fifo is a file, not a folder'), ('fifo', 'it is there and no regular file'),
    ('link to fifo', 'it is there and no regular file'),
    ('link to nowhere', '.*/link to nowhere is a link that leads nowhere'),
    ('link to itself', '.*/link to itself is a link that leads nowhere'),
    ('link to nowhere/a.png', '.*/link to nowhere is a link that leads nowhere'),
    ('n' * 300, 'File name too long')])
def test_no_place(places, name, message):
    before = sorted(places.iterdir())
    with pytest.raises(UnwritableError, match=f'{name} cannot be written: ({message}); name'):
        with write_whole(places / name):
            pass
    assert sorted(places.iterdir()) == before
    assert stat.S_ISFIFO((places / 'fifo').stat().st_mode)
    assert (places / 'link to nowhere').is_symlink()


def test_a_link_is_written_through(places):
    with write_whole(places / 'link') as file:
        file.write(b'after')
    assert (places / 'link').is_symlink() and (places / 'file').read_bytes() == b'after'


@pytest.mark.parametrize('source', ['file', 'link', 'hard link', 'folder/../file'])
def test_what_is_read_is_not_written_over(places, source):
    (places / 'hard link').hardlink_to(places / 'file')
    for name in ('file', 'link'):
        with pytest.raises(UnwritableError, match='it is what is read; name another place'):
            check_writable(places / name, places / 'absent', places / source)
    check_writable(places / 'other', places / source)


@pytest.mark.parametrize('umask', [0o022, 0o077])
def test_permissions_are_never_more_than_usual(tmp_path, umask):
    (tmp_path / 'private').touch(0o600)
    before = os.umask(umask)
    try:
        for name, usual in (('new', 0o666 & ~umask), ('private', 0o600)):
            with write_whole(tmp_path / name):
                [unfinished] = tmp_path.glob(f'.{name}*')
                assert stat.S_IMODE(unfinished.stat().st_mode) == usual
            assert stat.S_IMODE((tmp_path / name).stat().st_mode) == usual
    finally:
        os.umask(before)


@pytest.mark.parametrize('umask', [0o022, 0o077])
def test_permissions_of_a_folder(tmp_path, umask):
    before = os.umask(umask)
    try:
        make_once(tmp_path / 'data', 'nothing', {}, ['info.json'], lambda folder: None)
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / 'data').stat().st_mode) == 0o777 & ~umask


def test_the_longest_name(tmp_path):
    path = tmp_path / ('ü' * 125 + '.json')
    write_json(path, [os.fsdecode(b'caf\xe9')])
    assert json.loads(path.read_text()) == [os.fsdecode(b'caf\xe9')]


def test_what_killed_processes_leave_is_removed(tmp_path):
    for name in ('.epoch_1.pth.x1.unfinished', '.hidden', 'epoch_1.pth'):
        (tmp_path / name).touch()
    remove_unfinished(tmp_path)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ['.hidden', 'epoch_1.pth']
