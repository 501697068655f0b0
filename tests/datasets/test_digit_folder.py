"""The folder of digits is scikit-learn's, shared out as for the detector, safe to ask for twice."""

import runpy
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
from sklearn.datasets import load_digits

from spartan_mm.datasets import atomic_folder, make_digit_folder
from spartan_mm.datasets.digits import _load_sources, share_out_digits

TOOL = Path(__file__).parents[2] / 'tools' / 'dataset_converters' / 'make_digit_folder.py'


@pytest.fixture(scope='module')
def root(tmp_path_factory):
    return make_digit_folder(tmp_path_factory.mktemp('data') / 'digits')


def indices_in(root, split):
    return {int(path.stem): int(path.parent.name) for path in (root / split).glob('*/*.png')}


def snapshot(root):
    return {path.relative_to(root): path.read_bytes() for path in root.rglob('*') if path.is_file()}


def test_all_samples_are_there_once_and_in_their_class(root):
    train, val = indices_in(root, 'train'), indices_in(root, 'val')
    assert not train.keys() & val.keys()
    target = load_digits().target
    assert train | val == dict(enumerate(target.tolist()))
    for label in range(10):
        held_out = sum(of_class == label for of_class in val.values())
        assert held_out == round(0.2 * (target == label).sum())


def test_pictures_are_the_samples(root):
    images = load_digits().images
    for split in ('train', 'val'):
        for index, label in list(indices_in(root, split).items())[::50]:
            path = root / split / str(label) / f'{index:04d}.png'
            picture = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
            assert picture.dtype == np.uint8 and picture.shape == (8, 8)
            assert (picture == np.round(images[index] * 255 / 16)).all()


def test_what_is_held_out_is_held_out_from_the_detector(root):
    samples, indices = share_out_digits(0)
    sources = _load_sources(0)
    for split in ('train', 'val'):
        assert indices_in(root, split).keys() == set(np.concatenate(indices[split]))
        for of_class, found in zip(indices[split], sources[split].digits, strict=True):
            assert (found == samples[of_class]).all()


@pytest.fixture
def few(monkeypatch):
    """A twentieth of the samples, which is as good where the files are not looked at."""
    def share_out(seed):
        samples, indices = share_out_digits(seed)
        return samples, {split: [of_class[::20] for of_class in classes]
                         for split, classes in indices.items()}
    monkeypatch.setattr('spartan_mm.datasets.digit_folder.share_out_digits', share_out)


def test_another_seed_holds_out_others(tmp_path, few):
    one, again = (snapshot(make_digit_folder(tmp_path / name)) for name in 'ab')
    assert one == again and len(one) > 90
    assert indices_in(make_digit_folder(tmp_path / 'c', seed=1), 'val') != indices_in(
        tmp_path / 'a', 'val')


def test_made_once_and_completed(tmp_path, monkeypatch, few):
    root = make_digit_folder(tmp_path / 'digits')
    with monkeypatch.context() as patch:
        patch.setattr(atomic_folder.tempfile, 'mkdtemp', lambda **_: pytest.fail('made again'))
        make_digit_folder(root)
    content = snapshot(root)
    next((root / 'val' / '7').iterdir()).unlink()
    make_digit_folder(root)
    assert snapshot(root) == content
    assert [path.name for path in tmp_path.iterdir()] == ['digits']
    (root / 'notes.txt').touch()
    with pytest.raises(FileExistsError, match='has notes.txt in it'):
        make_digit_folder(root, seed=9)


@pytest.mark.parametrize('name', ['notes.txt', 'info.json', 'train'])
def test_other_data_is_not_replaced(tmp_path, name):
    (tmp_path / name).write_text('[]')
    with pytest.raises(FileExistsError, match='does not hold handwritten .* not replaced'):
        make_digit_folder(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_tool(tmp_path, monkeypatch, capsys, few):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, 'argv', [TOOL.name, 'digits'])
    runpy.run_path(str(TOOL), run_name='__main__')
    assert f'{tmp_path / "digits" / "val"}: 20 pictures' in capsys.readouterr().out
