"""The comparison of recipes for fine-tuning: its shapes, its configs, its table."""

from pathlib import Path

import numpy as np
import pytest
from compare_finetuning import (
    RECIPES,
    SHAPES,
    draw_picture,
    draw_shape,
    make_config,
    table,
)
from readme_tables import fill_page


@pytest.mark.parametrize('name', SHAPES)
def test_shapes_fill_their_square(name):
    for angle in (0., 0.7, 2.):
        mask = draw_shape(name, 60, angle)
        assert mask.shape == (60, 60)
        assert 0.15 < mask.mean() < 0.8


def test_boxes_of_a_picture_do_not_touch():
    for seed in range(10):
        picture, objects = draw_picture(np.random.default_rng(seed))
        assert picture.shape == (256, 320, 3)
        covered = np.zeros(picture.shape[:2], int)
        for left, top, width, height in (item['bbox'] for item in objects):
            assert min(left, top) >= 0
            covered[top:top + height, left:left + width] += 1
        assert objects
        assert covered.max() == 1


@pytest.mark.slow
def test_recipes_differ_in_nothing_else(tmp_path):
    configs = [make_config('shapes', tmp_path, recipe, 7, tmp_path / 'classifier.pth').to_dict()
               for recipe in RECIPES.values()]
    keys = {key for key in configs[0] if configs[0][key] != configs[1].get(key)}
    assert keys == {'optim_wrapper', 'param_scheduler', 'custom_hooks'}
    for config in configs:
        assert config['train_cfg']['max_epochs'] == 7
        assert config['optim_wrapper']['optimizer']['lr'] == 1e-3
        files = [config[f'{split}_dataloader']['dataset']['ann_file']
                 for split in ('train', 'val', 'test')]
        assert files == [f'annotations/{split}.json' for split in ('train', 'val', 'test')]


def test_what_is_not_measured_is_a_dash(tmp_path):
    runs = {str(seed): dict(AP=value, AP50=0.5, steps=96)
            for seed, value in enumerate((0.2, 0.3))}
    text = table(dict(digits_100={'for fine-tuning': runs}), 96)
    lines = text.splitlines()
    assert lines[2].endswith('| for fine-tuning | 2 | 25.0 ± 7.1 | 50.0 ± 0.0 | 96 of 96 |')
    assert lines[3].endswith("| RT-DETR's | – | – | – | – of 96 |")

    page = Path(tmp_path, 'page.md')
    page.write_text('a\n<!-- table finetuning: begin -->\nold\n<!-- table finetuning: end -->\nb\n')
    fill_page(page, dict(finetuning=text))
    assert page.read_text().splitlines()[2:-2] == lines
    before = page.read_text()
    with pytest.raises(ValueError, match='other'):
        fill_page(page, dict(other=text))
    assert page.read_text() == before
