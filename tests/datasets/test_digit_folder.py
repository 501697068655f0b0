"""The folder of digits is scikit-learn's, shared out as for the detector, safe to ask for twice."""

import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
from sklearn.datasets import load_digits

from spartan_mm.datasets import atomic_folder, make_digit_folder
from spartan_mm.datasets import digits as detection_digits

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
    _, indices = detection_digits.share_out_digits(0)
    for split in ('train', 'val'):
        assert indices_in(root, split).keys() == set(np.concatenate(indices[split]))
        source = detection_digits._load_sources(0)[split]
        assert all((a == b).all() for a, b in zip(source.indices, indices[split], strict=True))


def test_another_seed_holds_out_others(root, tmp_path):
    other = make_digit_folder(tmp_path / 'digits', seed=1)
    assert indices_in(other, 'val') != indices_in(root, 'val')
    assert snapshot(make_digit_folder(tmp_path / 'digits')) == snapshot(root)


def test_made_once_and_completed(tmp_path, monkeypatch):
    root = make_digit_folder(tmp_path / 'digits')
    with monkeypatch.context() as patch:
        patch.setattr(atomic_folder.tempfile, 'mkdtemp', lambda **_: pytest.fail('made again'))
        make_digit_folder(root)
    content = snapshot(root)
    next((root / 'val' / '7').iterdir()).unlink()
    make_digit_folder(root)
    assert snapshot(root) == content
    assert [path.name for path in tmp_path.iterdir()] == ['digits']


@pytest.mark.parametrize('name', ['notes.txt', 'info.json', 'train'])
def test_other_data_is_not_replaced(tmp_path, name):
    (tmp_path / name).write_text('[]')
    with pytest.raises(FileExistsError, match='is no folder of digits, so it is not replaced'):
        make_digit_folder(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_digits_with_other_files_are_not_replaced(tmp_path):
    root = make_digit_folder(tmp_path / 'digits')
    (root / 'notes.txt').touch()
    with pytest.raises(FileExistsError, match='has notes.txt in it'):
        make_digit_folder(root, seed=9)


def test_tool(tmp_path):
    result = subprocess.run([sys.executable, str(TOOL), 'digits'], cwd=tmp_path, text=True,
                            capture_output=True)
    assert result.returncode == 0, result.stderr
    assert f'{tmp_path / "digits" / "val"}: 359 pictures' in result.stdout
