"""The comparison of SparK's weights with random ones: its pictures, its choice, its table."""
from types import SimpleNamespace

import cv2
import numpy as np
import torch
from pretraining import choose, paint, table
from torch.testing import assert_close


def test_what_is_drawn_gets_the_contrast_of_its_square():
    images = torch.rand(2, 3, 64, 96)
    visible = torch.tensor([[1, 0, 0, 1, 1, 0], [0, 1, 1, 0, 0, 1]]).view(2, 1, 2, 3).bool()
    squares = images.view(2, 3, 2, 32, 3, 32)
    normalized = ((squares - squares.mean((1, 3, 5), True))
                  / squares.var((1, 3, 5), keepdim=True).sqrt()).view_as(images)
    model = SimpleNamespace(head=SimpleNamespace(patch_size=32),
                            reconstruct=lambda images, visible: -normalized)
    painted = paint(model, images, visible).view_as(squares)
    seen = visible.view(2, 1, 2, 1, 3, 1)
    assert_close(painted, torch.where(seen, squares, 2 * squares.mean((1, 3, 5), True) - squares),
                 rtol=1e-4, atol=1e-4)


def test_few_pictures_of_each_class(tmp_path):
    for name in 'ab':
        (tmp_path / 'all' / name).mkdir(parents=True)
        for index in range(9):
            cv2.imwrite(str(tmp_path / 'all' / name / f'{index}.png'), np.zeros((8, 8), np.uint8))
    found = [{path.relative_to(root).as_posix() for path in root.rglob('*.png')} for root in (
        choose(tmp_path / 'all', tmp_path / str(number), 3, seed)
        for number, seed in enumerate((0, 0, 1)))]
    assert found[0] == found[1] != found[2]
    assert sorted(path.split('/')[1] for path in found[0]) == list('aaabbb')


def test_table():
    text = table({'10': {'random weights': {'0': 60., '1': 62., '2': 70.},
                         'SparK': {'0': 65., '1': 69.}}})
    assert text.splitlines()[2] == '| 10 | 2 | 61.0 ± 1.4 | 67.0 ± 2.8 | 6.0 ± 1.4 |'
