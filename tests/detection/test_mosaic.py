"""Mosaics are the official ones, whatever is kept of the images before."""
import json
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from mmdet.registry import DATASETS
from mmdet.structures.bbox import HorizontalBoxes
from mmengine.dataset import ConcatDataset
from torch.testing import assert_close

from spartan_mm.datasets import make_digits
from spartan_mm.detection import DenseMosaic
from spartan_mm.detection.mosaic import Affine, Picture, arrange, turn
from spartan_mm.engine.data_order import PlacedDataset

GOLDEN = Path(__file__).parents[1] / 'data' / 'golden' / 'deim_mosaic'
META = json.loads(GOLDEN.with_suffix('.json').read_text())['meta']
CANVAS = {name: value for name, value in np.load(GOLDEN.with_suffix('.npz')).items()}


def picture(name, boxes, labels):
    return Picture(CANVAS[name], torch.from_numpy(CANVAS[boxes]), CANVAS[labels],
                   np.zeros(len(CANVAS[labels]), bool))


@pytest.mark.parametrize('number', range(4))
def test_images_are_resized_as_officially(number):
    image = CANVAS[f'image{number}']
    kept = DenseMosaic(side=META['output_size'])._resize(dict(
        img=image, gt_bboxes=HorizontalBoxes(torch.from_numpy(CANVAS[f'boxes{number}'])),
        gt_bboxes_labels=CANVAS[f'labels{number}'], gt_ignore_flags=None))
    # Within a grey level of Pillow's resize.
    assert_close(kept.image.astype(int), CANVAS[f'resized{number}'].astype(int), rtol=0, atol=1)
    assert_close(kept.boxes, torch.from_numpy(CANVAS[f'resized_boxes{number}']), rtol=1e-5,
                 atol=1e-5)


def test_canvas_is_the_official_one():
    mosaic = arrange([picture(f'resized{i}', f'resized_boxes{i}', f'labels{i}') for i in range(4)])
    assert (mosaic.image == CANVAS['canvas']).all()
    assert_close(mosaic.boxes, torch.from_numpy(CANVAS['canvas_boxes']), rtol=0, atol=0)
    assert (mosaic.labels == CANVAS['canvas_labels']).all()


@pytest.mark.parametrize('case', META['cases'], ids=lambda case: str(case['seed']))
def test_turns_as_officially(case):
    mosaic = turn(picture('canvas', 'canvas_boxes', 'canvas_labels'),
                  Affine(case['angle'], case['scale'], tuple(case['translate'])))
    assert (mosaic.image == CANVAS[f'affine{case["seed"]}']).all()
    assert_close(mosaic.boxes, torch.from_numpy(CANVAS[f'affine_boxes{case["seed"]}']), rtol=1e-6,
                 atol=1e-5)


def test_draws_within_the_ranges():
    mosaic = DenseMosaic()
    angles, scales, shifts = zip(*(mosaic._draw_affine(100, 200) for _ in range(300)), strict=True)
    assert -10 <= min(angles) < -9 and 9 < max(angles) <= 10
    assert 0.5 <= min(scales) < 0.55 and 1.45 < max(scales) <= 1.5
    across, down = np.abs(shifts).max(0)
    assert 18 <= across <= 20 and 9 <= down <= 10


@pytest.fixture(scope='module')
def digits(tmp_path_factory):
    return make_digits(tmp_path_factory.mktemp('data') / 'digits', 12, 4, progress=False).root


def make_dataset(root, **load):
    return DATASETS.build(dict(
        type='CheckedCocoDataset', data_root=str(root), ann_file='annotations/train.json',
        data_prefix=dict(img='train'), pipeline=[
            dict(type='LoadImageFromFile'), dict(type='LoadAnnotations', with_bbox=True, **load),
            dict(type='DenseMosaic', side=60), dict(type='FilterSmallBoxes'),
            dict(type='PackDetInputs')]))


def seen(samples):
    """What a training sees of samples."""
    return [(sample['inputs'], sample['data_samples'].gt_instances.bboxes.tensor,
             sample['data_samples'].gt_instances.labels) for sample in samples]


def test_what_was_made_before_makes_no_difference(digits):
    items = [(3, (0, 1, 0), (5, 3)), (5, (0, 1, 1), (5, 3)), (2, (0, 2, 0), (5, 3, 2, 9))]
    warm = PlacedDataset(make_dataset(digits), 0, 0)
    expected = seen([warm[item] for item in items])
    for item, sample in zip(items, expected, strict=True):
        cold = PlacedDataset(make_dataset(digits), 0, 0)
        assert_close(seen([cold[item]]), [sample], rtol=0, atol=0)


def test_images_of_before_are_not_decoded_again(digits, monkeypatch):
    decoded = []
    dataset = PlacedDataset(make_dataset(digits), 0, 0)
    load = dataset.pipeline.transforms[2].load
    monkeypatch.setattr(dataset.pipeline.transforms[2], 'load',
                        lambda info: decoded.append(info['sample_idx']) or load(info))
    for number in range(8):
        dataset[number, (0, number, 0), tuple(range(number + 1))]
    assert decoded == []
    dataset[8, (0, 8, 0), (9, )]
    assert decoded == [9]


def test_draws_from_all_images_if_nobody_says_which_were_last(digits):
    inputs = [sample['inputs'] for sample in make_dataset(digits)]
    assert len(inputs) == 12 and all(image.shape[0] == 3 for image in inputs)


def test_joined_datasets_are_mixed(digits):
    first, second = make_dataset(digits), make_dataset(digits)
    joined = PlacedDataset(ConcatDataset([first, second]), 0, 0)
    joined[14, (0, 0, 0), (1, 14)]
    kept = second.pipeline.transforms[2]._kept
    assert {index for *_, index in kept} == {1, 2}


def test_annotation_files_of_the_same_images_are_kept_apart(digits):
    dataset = make_dataset(digits)
    dataset.full_init()
    mosaic, info = dataset.pipeline.transforms[2], dataset.get_data_info(0)
    boxes = [mosaic._keep(each).boxes for each in (
        info, dict(info, ann_file='other.json', instances=[]))]
    assert [len(each) > 0 for each in boxes] == [True, False]


def test_an_undecodable_other_gives_way_to_the_own_image(tmp_path):
    root = make_digits(tmp_path / 'digits', 2, 1, progress=False).root
    dataset = PlacedDataset(make_dataset(root), 0, 0)
    dataset.full_init()
    other = dataset.get_data_info(1)['img_path']
    Path(other).write_bytes(b'no image')
    dataset[0, (0, 0, 0), (1, )]
    assert dataset.bad_images.count == 0
    assert [index for *_, index in dataset.pipeline.transforms[2]._kept] == [0]


def test_objects_lie_where_their_boxes_say(tmp_path):
    """Boxes of plain rectangles hold all of their pixels after the turn."""
    image = np.zeros((50, 80, 3), np.uint8)
    cv2.rectangle(image, (20, 10), (59, 29), (255, 255, 255), -1)
    mosaic = turn(Picture(image, torch.tensor([[20., 10., 60., 30.]]), None, None),
                  Affine(8., 0.7, (3, -2)))
    rows, columns = mosaic.image[..., 0].nonzero()
    found = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
    assert_close(mosaic.boxes[0], torch.tensor(found).float(), rtol=0, atol=1.)


def test_masks_are_refused(digits):
    mosaic = DenseMosaic()
    with pytest.raises(NotImplementedError, match='with_mask'):
        mosaic(dict(img=None, gt_bboxes=HorizontalBoxes(torch.zeros(0, 4)), gt_masks=[]))


def test_a_dataset_has_to_tell():
    with pytest.raises(RuntimeError, match='CheckedCocoDataset'):
        DenseMosaic()(dict(img=None, gt_bboxes=HorizontalBoxes(torch.zeros(0, 4))))
