"""Pictures to check exported files with: where they come from, and through which pipeline."""
import shutil

import numpy as np
import pytest
from mmengine.config import Config

import spartan_mm.classification
import spartan_mm.detection  # noqa: F401 - registers what the configs name
from spartan_mm.errors import UsageError
from spartan_mm.export.pictures import find_pictures, resized


@pytest.fixture
def config(user_project, monkeypatch):
    monkeypatch.chdir(user_project)
    return Config.fromfile('user_detector.py')


def test_of_the_test_data(config):
    pictures = find_pictures(config, 3)
    assert pictures.source == '3 of 4 test images of the config'
    assert pictures.sizes == [(96, 48), (96, 64), (96, 80)]
    assert {image.shape for image in pictures.images} == {(3, 64, 64)}
    # In RGB: OpenCV wrote (0, 128, 255) as BGR.
    assert pictures.images[0][:, 30, 15].tolist() == [255, 128, 0]


def test_of_a_folder(config, tmp_path, monkeypatch):
    shutil.copytree('pictures', tmp_path / 'some')
    monkeypatch.chdir(tmp_path / 'some')
    pictures = find_pictures(config, '.')
    assert pictures.names == [f'{index}.png' for index in range(4)]
    assert pictures.source == '4 of 4 images in some'
    assert find_pictures(config, tmp_path / 'some' / '2.png').sizes == [(96, 80)]


@pytest.mark.parametrize('installed, kind', [
    (True, "scikit-learn's photographs"), (False, 'smooth random pictures')])
def test_without_test_data(config, tmp_path, monkeypatch, capsys, installed, kind):
    monkeypatch.chdir(tmp_path)
    if not installed:
        monkeypatch.setitem(__import__('sys').modules, 'sklearn.datasets', None)
    pictures = find_pictures(config, 5)
    assert len(pictures.images) == 5 and kind in pictures.source
    assert 'annotations.json' in capsys.readouterr().out
    again = find_pictures(config, 3)
    assert all(map(np.array_equal, pictures.images, again.images))


def test_a_pipeline_that_normalizes(config):
    config.test_dataloader.dataset.pipeline.insert(
        1, dict(type='mmcv.Normalize', mean=[1.5] * 3, std=[2.] * 3))
    with pytest.raises(UsageError, match='makes no whole numbers from 0 to 255'):
        find_pictures(config, 'pictures')


def test_resized():
    image = np.zeros((3, 64, 64), np.uint8)
    image[1] = 7
    assert resized(image, (64, 64)) is image
    other = resized(image, (32, 96))
    assert other.shape == (3, 32, 96) and (other[1] == 7).all() and not other[[0, 2]].any()
