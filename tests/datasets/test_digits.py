"""The digits dataset is correct COCO, disjoint, repeatable, and safe to ask for twice."""

import json
import runpy
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from mmdet.datasets import CocoDataset
from mmdet.evaluation import CocoMetric
from pycocotools.coco import COCO

from spartan_mm.datasets import DIGITS_CATEGORIES, make_digits
from spartan_mm.datasets import digits as module
from spartan_mm.detection import CheckedCocoDataset

TOOL = Path(__file__).parents[2] / 'tools' / 'dataset_converters' / 'make_digits.py'
CLASSES = [category['name'] for category in DIGITS_CATEGORIES]
ARGUMENTS = dict(num_train=40, num_val=12, seed=3, image_size=(160, 128), progress=False)


@pytest.fixture(scope='module')
def paths(tmp_path_factory):
    return make_digits(tmp_path_factory.mktemp('data') / 'digits', **ARGUMENTS)


@pytest.fixture(scope='module')
def sources():
    return module._load_sources(0)


def snapshot(root):
    return {p.relative_to(root): p.read_bytes() for p in root.rglob('*') if p.is_file()}


@pytest.mark.parametrize('split, count', [('train', 40), ('val', 12)])
def test_valid_coco(paths, split, count):
    coco = COCO(getattr(paths, f'{split}_annotations'))
    assert len(coco.imgs) == count
    for image in coco.imgs.values():
        picture = cv2.imread(str(getattr(paths, f'{split}_images') / image['file_name']))
        assert picture.shape == (image['height'], image['width'], 3)
    assert sorted(coco.anns) == list(range(1, len(coco.anns) + 1))
    for annotation in coco.anns.values():
        left, top, width, height = annotation['bbox']
        image = coco.imgs[annotation['image_id']]
        assert left >= 0 and top >= 0 and width >= 1 and height >= 1
        assert left + width <= image['width'] and top + height <= image['height']
        assert annotation['category_id'] in coco.cats
        if annotation['iscrowd']:
            mask = coco.annToMask(annotation)
            rows, columns = np.nonzero(mask)
            assert annotation['area'] == mask.sum()
            assert [columns.min(), rows.min()] == [left, top]
            assert [np.ptp(columns) + 1, np.ptp(rows) + 1] == [width, height]
        else:
            assert annotation['area'] == width * height


def test_has_what_coco_has(paths):
    coco = COCO(paths.train_annotations)
    annotations = list(coco.anns.values())
    per_image = [len(coco.imgToAnns[image_id]) for image_id in coco.imgs]
    assert 0 in per_image and max(per_image) > 3
    assert any(annotation['iscrowd'] for annotation in annotations)
    heights = np.array([item['bbox'][3] for item in annotations if not item['iscrowd']]) / 128
    assert heights.min() < 0.15 and heights.max() > 0.45
    assert len({(image['width'], image['height']) for image in coco.imgs.values()}) == 3
    assert {item['category_id'] for item in annotations} == {
        item['id'] for item in DIGITS_CATEGORIES
    }
    ids = [category['id'] for category in DIGITS_CATEGORIES]
    assert ids == sorted(ids) and ids != list(range(ids[0], ids[0] + 10))


def test_mmdet_maps_the_ids(paths):
    dataset = CocoDataset(data_root=str(paths.root), ann_file='annotations/val.json',
                          data_prefix=dict(img='val/'), metainfo=dict(classes=CLASSES))
    coco = COCO(paths.val_annotations)
    seen = 0
    for index in range(len(dataset)):
        info = dataset.get_data_info(index)
        annotations = coco.imgToAnns[info['img_id']]
        assert len(info['instances']) == len(annotations)
        for instance, annotation in zip(info['instances'], annotations, strict=True):
            name = coco.cats[annotation['category_id']]['name']
            assert CLASSES[instance['bbox_label']] == name
            seen += 1
    assert seen > 10


@pytest.mark.parametrize('shift, expected', [(0, 1.0), (1, 0.0)])
def test_mmdet_evaluates_it(paths, shift, expected):
    """The ground truth scores 1, and 0 with each label replaced by the next."""
    dataset = CheckedCocoDataset(data_root=str(paths.root), ann_file='annotations/val.json',
                                 data_prefix=dict(img='val/'), test_mode=True)
    metric = CocoMetric(ann_file=str(paths.val_annotations), metric='bbox')
    metric.dataset_meta = dataset.metainfo
    for index in range(len(dataset)):
        info = dataset.get_data_info(index)
        objects = [item for item in info['instances'] if not item['ignore_flag']]
        predictions = dict(
            bboxes=torch.tensor([item['bbox'] for item in objects]).reshape(-1, 4),
            labels=torch.tensor([(item['bbox_label'] + shift) % 10 for item in objects]),
            scores=torch.ones(len(objects)),
        )
        sample = dict(img_id=info['img_id'], ori_shape=(info['height'], info['width']),
                      pred_instances=predictions)
        metric.process({}, [sample])
    assert metric.evaluate(len(dataset))['coco/bbox_mAP'] == pytest.approx(expected, abs=0.01)


def test_splits_share_neither_digits_nor_photographs(sources):
    train, val = sources['train'], sources['val']
    _, indices = module.share_out_digits(0)
    everything = np.concatenate([*indices['train'], *indices['val']])
    assert len(everything) == len(np.unique(everything)) == 1797
    for of_train, of_val, whole in zip(train.photos, val.photos, (640, 640), strict=True):
        assert of_train.shape[1] + of_val.shape[1] == whole
        assert not np.shares_memory(of_train, of_val)


def make_canvas():
    return module._Canvas(np.zeros((128, 160, 3), dtype=np.float32))


def test_box_is_tight_around_the_ink(sources):
    for seed in range(8):
        rng = np.random.default_rng(seed)
        canvas = make_canvas()
        glyph = module._draw_glyph(rng, sources['train'].digits[seed], rng.uniform(15, 80))
        assert canvas.paint(glyph, seed, module._draw_position(rng, canvas.shape, glyph),
                            np.full(3, 254.0))
        rows, columns = (canvas.picture()[..., 0] >= 127).nonzero()
        item, = canvas.objects()
        left, top, width, height = item['bbox']
        assert item['category_id'] == DIGITS_CATEGORIES[seed]['id']
        assert [left, left + width - 1] == [columns.min(), columns.max()]
        assert [top, top + height - 1] == [rows.min(), rows.max()]


def test_box_leaves_out_what_is_hidden():
    canvas, white = make_canvas(), np.full(3, 255.0)
    bar = np.ones((20, 50), dtype=np.float32)
    assert canvas.paint(bar, 0, (30, 40), white)
    assert not canvas.paint(bar, 1, (32, 50), white), 'hides most of it'
    assert canvas.paint(np.ones((60, 10), dtype=np.float32), 1, (20, 87), white)
    assert [item['bbox'] for item in canvas.objects()] == [[40, 30, 47, 20], [87, 20, 10, 60]]


def test_every_sample_can_be_drawn(sources):
    rng = np.random.default_rng(0)
    for source in sources.values():
        for samples in source.digits:
            for sample in samples:
                glyph = module._draw_glyph(rng, sample[None], 7)
                assert min(glyph.shape) >= 2


def test_repeatable_and_extensible(paths, tmp_path):
    more = make_digits(tmp_path / 'more', **(ARGUMENTS | dict(num_train=41)))
    again = snapshot(more.root / 'train')
    assert len(again) == 41
    assert again.items() >= snapshot(paths.root / 'train').items()
    assert snapshot(more.root / 'val') == snapshot(paths.root / 'val')
    first, second = (json.loads(p.train_annotations.read_text()) for p in (paths, more))
    assert second['annotations'][: len(first['annotations'])] == first['annotations']
    other = make_digits(tmp_path / 'other', **(ARGUMENTS | dict(num_val=1, seed=4)))
    assert other.train_annotations.read_text() != paths.train_annotations.read_text()


def test_made_once_and_replaced_when_asked_for_otherwise(tmp_path, monkeypatch):
    small = ARGUMENTS | dict(num_train=3, num_val=1)
    root = tmp_path / 'digits'
    make_digits(root, **small)
    with monkeypatch.context() as patch:
        patch.setattr(module, '_load_sources', lambda _: pytest.fail('made again'))
        make_digits(root, **small)
    (root / 'train' / '000002.jpg').unlink()
    make_digits(root, **small)
    assert len(list((root / 'train').iterdir())) == 3
    make_digits(root, **(small | dict(num_train=2)))
    assert len(list((root / 'train').iterdir())) == 2
    assert [path.name for path in tmp_path.iterdir()] == ['digits']
    (root / 'notes.txt').touch()
    with pytest.raises(FileExistsError, match='has notes.txt in it'):
        make_digits(root, **(small | dict(seed=9)))


def test_interrupted_run_leaves_nothing(tmp_path, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(module, '_draw_picture', interrupt)
    with pytest.raises(KeyboardInterrupt):
        make_digits(tmp_path / 'digits', **ARGUMENTS)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('name', ['notes.txt', 'annotations'])
def test_other_data_is_not_replaced(tmp_path, name):
    (tmp_path / name).mkdir()
    with pytest.raises(FileExistsError, match='does not hold handwritten .* not replaced'):
        make_digits(tmp_path, **ARGUMENTS)
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize('arguments', [dict(num_train=0), dict(image_size=(320, 32))])
def test_bad_arguments(tmp_path, arguments):
    with pytest.raises(ValueError, match='at least'):
        make_digits(tmp_path / 'digits', **(ARGUMENTS | arguments))


def test_tool(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, 'argv', [TOOL.name, 'digits', '--num-train', '2', '--num-val', '1'])
    runpy.run_path(str(TOOL), run_name='__main__')
    assert str(tmp_path / 'digits' / 'annotations' / 'val.json') in capsys.readouterr().out
    assert len(list((tmp_path / 'digits' / 'train').iterdir())) == 2
