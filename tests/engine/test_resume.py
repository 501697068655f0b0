"""Which checkpoint a training goes on from."""

import os

import pytest
import torch

from spartan_mm.engine.resume import find_resumable, read_resumable
from spartan_mm.errors import CheckpointError


@pytest.fixture
def save(tmp_path):
    """Writes checkpoints, one a second."""
    saved = []

    def save(name, **content):
        path = tmp_path / name
        content = dict(meta=dict(epoch=1, iter=len(saved), seed=7), optimizer={},
                       state_dict=dict(weight=torch.arange(1000.))) | content
        torch.save(content, path)
        saved.append(path)
        os.utime(path, (len(saved), len(saved)))
        (tmp_path / 'last_checkpoint').write_text(str(path))
        return path

    return save


@pytest.fixture
def messages(monkeypatch):
    """What is printed to the log."""
    texts = []
    monkeypatch.setattr('spartan_mm.engine.resume.print_log', lambda text, *_: texts.append(text))
    return texts


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    # In the weights, of which a thousand make most of the file.
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGES = [
    lambda path: path.write_bytes(path.read_bytes()[:-100]),
    lambda path: path.write_bytes(b''),
    flip_a_bit,
    lambda path: torch.save([1], path),
]


def test_nothing_to_resume_from(tmp_path, save):
    assert find_resumable(tmp_path) is None
    assert find_resumable(tmp_path / 'missing') is None
    torch.save({}, tmp_path / 'best_coco_bbox_mAP_epoch_3.pth')
    assert find_resumable(tmp_path) is None


def test_the_one_that_was_written_last(tmp_path, save):
    save('epoch_50.pth')  # of another training, before this one
    path = save('epoch_1_iter_8.pth')
    assert find_resumable(tmp_path).path == str(path)
    assert find_resumable(tmp_path).seed == 7
    (tmp_path / 'last_checkpoint').unlink()
    assert find_resumable(tmp_path).path == str(path)


def test_the_one_that_last_checkpoint_names_wherever_the_folder_is(tmp_path, save):
    save('epoch_1.pth')
    save('epoch_2.pth')
    (tmp_path / 'last_checkpoint').write_text('/somewhere/else/epoch_1.pth\n')
    assert find_resumable(tmp_path).path == str(tmp_path / 'epoch_1.pth')


@pytest.mark.parametrize('damage', DAMAGES)
def test_a_damaged_one_falls_back_to_the_one_before(tmp_path, save, messages, damage):
    save('epoch_1.pth')
    before, damaged = save('epoch_2.pth'), save('epoch_3.pth')
    damage(damaged)
    assert find_resumable(tmp_path).path == str(before)
    assert str(damaged) in messages[0]
    assert messages[1] == f'going on from the one before, {before}'


def test_a_missing_one_falls_back_to_the_one_before(tmp_path, save, messages):
    before = save('epoch_1.pth')
    save('epoch_2.pth').unlink()
    assert find_resumable(tmp_path).path == str(before)
    assert 'epoch_2.pth' in messages[0] and messages[0].endswith('is gone')


def test_no_start_from_the_beginning_if_all_are_damaged(tmp_path, save, messages):
    for number in (1, 2):
        save(f'epoch_{number}.pth').write_bytes(b'x')
    with pytest.raises(CheckpointError, match=r'none of the 2 .*epoch_2\.pth.* --work-dir'):
        find_resumable(tmp_path)


def test_weights_alone_are_nothing_to_go_on_from(save):
    path = save('epoch_1.pth')
    checkpoint = torch.load(path)
    del checkpoint['optimizer']
    torch.save(checkpoint, path)
    with pytest.raises(CheckpointError, match=r'epoch_1\.pth has no state of a training'):
        read_resumable(path)
