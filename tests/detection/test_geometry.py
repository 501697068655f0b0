"""The training transforms mean what torchvision's classes of the official recipe mean."""

import numpy as np
import pytest
import torch
import torchvision.transforms.v2 as tv
from mmdet.datasets.transforms import PackDetInputs, Resize
from mmdet.registry import TRANSFORMS
from mmdet.structures.bbox import HorizontalBoxes
from PIL import Image
from torch.testing import assert_close
from torchvision import tv_tensors

from spartan_mm.detection import AntialiasedResize, FilterSmallBoxes, RandomIoUCrop, RandomZoomOut

SIZE = (120, 160)  # height, width
BOXES = [[10, 20, 60, 80], [70, 30, 150, 110], [100, 5, 120, 25]]


@pytest.fixture(autouse=True)
def seeded():
    np.random.seed(0)
    torch.manual_seed(0)


def make_results(boxes=BOXES, size=SIZE, ignored=()):
    """A noisy picture with one plain rectangle for each box, its colour telling which."""
    image = np.random.randint(0, 100, (*size, 3), dtype=np.uint8)
    for index, (left, top, right, bottom) in enumerate(boxes):
        image[top:bottom, left:right] = 200 + index
    flags = np.zeros(len(boxes), dtype=bool)
    flags[list(ignored)] = True
    return dict(img=image, img_shape=size,
                gt_bboxes=HorizontalBoxes(np.array(boxes, dtype=np.float32).reshape(-1, 4)),
                gt_bboxes_labels=np.arange(len(boxes)), gt_ignore_flags=flags)


def pixels_in(results, index):
    """The rectangle of a box, found again in the pixels: (left, top, right, bottom)."""
    rows, columns = (results['img'][..., 0] == 200 + index).nonzero()
    return [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]


class TestRandomZoomOut:
    def test_boxes_follow_pixels_on_a_black_canvas(self):
        for _ in range(10):
            results = RandomZoomOut(prob=1)(make_results())
            assert results['img'].dtype == np.uint8
            assert results['img'].shape[:2] == results['img_shape']
            for index, box in enumerate(results['gt_bboxes'].numpy()):
                assert box.tolist() == pixels_in(results, index)
            left, top = (results['gt_bboxes'].numpy()[0, :2] - BOXES[0][:2]).astype(int)
            results['img'][top : top + SIZE[0], left : left + SIZE[1]] = 0
            assert not results['img'].any()

    def test_draws_what_torchvision_draws(self):
        """Ratio and position have the distribution of torchvision's class."""
        ours, theirs = [], []
        for _ in range(400):
            results = RandomZoomOut(prob=1)(make_results())
            height, width = results['img_shape']
            left, top = results['gt_bboxes'].numpy()[0, :2] - BOXES[0][:2]
            ours.append([height / 120, width / 160, left / width, top / height])

            image = tv_tensors.Image(torch.zeros(3, *SIZE))
            left, top, right, bottom = tv.RandomZoomOut().make_params([image])['padding']
            height, width = top + 120 + bottom, left + 160 + right
            theirs.append([height / 120, width / 160, left / width, top / height])
        ours, theirs = np.array(ours), np.array(theirs)
        np.testing.assert_allclose(ours[:, 0], ours[:, 1], atol=0.02)
        assert_close(ours.mean(0), theirs.mean(0), atol=0.15, rtol=0)
        assert_close(ours.std(0), theirs.std(0), atol=0.1, rtol=0)
        assert 1 <= ours[:, 0].min() < 1.1 and 3.9 < ours[:, 0].max() <= 4

    def test_prob(self):
        grown = [RandomZoomOut()(make_results())['img_shape'] != SIZE for _ in range(200)]
        assert 70 < sum(grown) < 130


class TestRandomIoUCrop:
    @pytest.mark.parametrize('seed', range(8))
    def test_equals_torchvision_for_the_same_draws(self, seed, monkeypatch):
        """Torchvision, fed with the uniform numbers that ours drew, takes the same crop."""
        np.random.seed(seed)
        transform = RandomIoUCrop(prob=1)
        thresholds, trials = [], []
        judge = transform._judge

        def spy(draws, min_iou, *args):
            thresholds.append(transform.min_ious.index(min_iou))
            trials.append(draws)
            return judge(draws, min_iou, *args)

        monkeypatch.setattr(transform, '_judge', spy)
        boxes = np.array(BOXES, dtype=np.float32)
        crop = transform._draw_crop(*SIZE, boxes)
        if crop is None:
            thresholds.append(transform.min_ious.index(1.0))

        script = replay(thresholds, trials, SIZE)
        monkeypatch.setattr(torch, 'randint', lambda **_: torch.tensor([next(script)]))
        monkeypatch.setattr(torch, 'rand', lambda _: next(script))
        image = tv_tensors.Image(torch.zeros(3, *SIZE))
        tv_boxes = tv_tensors.BoundingBoxes(boxes, format='XYXY', canvas_size=SIZE)
        params = tv.RandomIoUCrop().make_params([image, tv_boxes])

        if crop is None:
            assert params == {}
        else:
            left, top = params['left'], params['top']
            expected = [left, top, left + params['width'], top + params['height']]
            assert crop.tolist() == expected

    @pytest.mark.parametrize('min_iou', [0.0, 0.3, 0.7])
    def test_crop_keeps_its_promises(self, min_iou):
        transform = RandomIoUCrop(min_ious=[min_iou] * 50 + [1.0], prob=1)
        cropped = 0
        for _ in range(40):
            results = transform(make_results())
            height, width = results['img_shape']
            assert results['img'].shape[:2] == (height, width)
            if (height, width) == SIZE:
                continue
            cropped += 1
            assert 0.3 * 120 - 1 <= height <= 120 and 0.3 * 160 - 1 <= width <= 160
            assert 0.5 <= width / height <= 2

            kept, boxes = results['gt_bboxes_labels'], results['gt_bboxes'].numpy()
            assert len(kept) == len(boxes) == len(results['gt_ignore_flags']) >= 1
            for index, box in zip(kept, boxes, strict=True):
                assert box.tolist() == pixels_in(results, index)
            crop_area = height * width
            full = np.array([BOXES[index] for index in kept])
            full_areas = (full[:, 2:] - full[:, :2]).prod(1)
            areas = (boxes[:, 2:] - boxes[:, :2]).prod(1)
            assert (areas / (crop_area + full_areas - areas)).max() >= min_iou
        assert cropped > 0

    def test_box_whose_centre_is_outside_is_dropped(self):
        transform = RandomIoUCrop()
        transform._draw_crop = lambda *_: np.array([0, 0, 100, 70])
        results = transform(make_results())
        assert results['gt_bboxes_labels'].tolist() == [0]
        assert results['gt_bboxes'].numpy().tolist() == [[10, 20, 60, 70]]

    def test_thresholds_are_equally_likely(self):
        transform = RandomIoUCrop(prob=1)
        seen = []
        transform._judge = lambda draws, min_iou, *_: (seen.append(min_iou) or np.zeros((1, 4)),
                                                       np.ones(1, dtype=bool))
        whole = sum(transform._draw_crop(10, 10, np.ones((1, 4))) is None for _ in range(1400))
        counts = [*(seen.count(value) for value in transform.min_ious[:-1]), whole]
        assert sum(counts) == 1400
        assert 140 < min(counts) and max(counts) < 260

    def test_prob(self):
        """One image in five stays whole at once, and one in seven of the rest draws 1."""
        transform = RandomIoUCrop()
        transform._judge = lambda *_: (np.zeros((1, 4)), np.ones(1, dtype=bool))
        whole = sum(transform._draw_crop(10, 10, np.ones((1, 4))) is None for _ in range(2000))
        assert abs(whole / 2000 - (0.2 + 0.8 / 7)) < 0.05

    @pytest.mark.parametrize('boxes, ignored', [([], []), (BOXES[:1], [0])])
    def test_without_deciding_boxes_the_image_stays_whole(self, boxes, ignored):
        transform = RandomIoUCrop(min_ious=(0.0, 1.0), prob=1)
        for _ in range(10):
            assert transform(make_results(boxes, ignored=ignored))['img_shape'] == SIZE

    def test_ignored_boxes_are_cropped_along(self):
        transform = RandomIoUCrop()
        transform._draw_crop = lambda height, width, deciding: np.array([0, 0, 150, 115])
        results = transform(make_results(ignored=[1]))
        assert results['gt_ignore_flags'].tolist() == [False, True, False]

    def test_tiny_image(self):
        transform = RandomIoUCrop(prob=1)
        for _ in range(20):
            results = transform(make_results([[0, 0, 2, 2]], size=(2, 2)))
            assert min(results['img'].shape) > 0


def replay(thresholds, trials, size):
    """Yield the draws in the order in which torchvision asks for them."""
    for round_, threshold in enumerate(thresholds):
        yield threshold
        if round_ >= len(trials):
            return
        for draws in torch.tensor(trials[round_], dtype=torch.float32):
            yield draws[:2]
            scales = 0.3 + 0.7 * draws[:2]
            width, height = int(size[1] * scales[0]), int(size[0] * scales[1])
            if 0.5 <= width / height <= 2:
                yield draws[2:]


class TestFilterSmallBoxes:
    def test_box_of_exactly_the_minimum_stays(self):
        boxes = [[0, 0, 1, 1], [5, 5, 5.9, 20], [5, 5, 20, 5.9], [3, 3, 9, 9]]
        results = make_results([[0, 0, 1, 1]] * 4)
        results['gt_bboxes'] = HorizontalBoxes(np.array(boxes, dtype=np.float32))
        results = FilterSmallBoxes()(results)
        assert results['gt_bboxes_labels'].tolist() == [0, 3]
        assert len(results['gt_bboxes']) == len(results['gt_ignore_flags']) == 2

    @pytest.mark.parametrize('boxes', [BOXES, []])
    def test_image_without_boxes_is_kept(self, boxes):
        results = FilterSmallBoxes(min_size=100)(make_results(boxes))
        assert results['gt_bboxes'].numpy().shape == (0, 4)


VIEWS = dict(whole=lambda image: image, cropped=lambda image: image[5:-7, 11:-2],
             mirrored=lambda image: image[:, ::-1],
             cropped_and_mirrored=lambda image: image[5:-7, 11:-2][:, ::-1],
             turned=lambda image: image[::-1, ::-1])


class TestAntialiasedResize:
    @pytest.mark.parametrize('size', [(120, 160), (480, 333), (300, 700), (40, 90), (1, 1)])
    def test_equals_torchvision_s_and_nearly_pillow_s(self, size):
        image = make_results(size=size, boxes=[])['img']
        found = AntialiasedResize(scale=(72, 64))(dict(img=image))['img']
        tensor = torch.from_numpy(image).permute(2, 0, 1)
        expected = tv.functional.resize(tensor, [64, 72], antialias=True).permute(1, 2, 0)
        np.testing.assert_array_equal(found, expected)

        pillow_s = np.asarray(Image.fromarray(image).resize((72, 64), Image.Resampling.BILINEAR))
        difference = np.abs(found.astype(int) - pillow_s)
        assert difference.max() <= 1 and difference.mean() < 0.05

    @pytest.mark.parametrize('view', VIEWS)
    def test_views(self, view):
        image = VIEWS[view](make_results()['img'])
        resize = AntialiasedResize(scale=(64, 64))
        found, expected = resize(dict(img=image))['img'], resize(dict(img=image.copy()))['img']
        np.testing.assert_array_equal(found, expected)

    @pytest.mark.parametrize('keep_ratio', [False, True])
    @pytest.mark.parametrize('clip_object_border', [False, True])
    def test_everything_but_pixels_is_as_by_mmdet(self, keep_ratio, clip_object_border):
        options = dict(scale=(50, 70), keep_ratio=keep_ratio, clip_object_border=clip_object_border)
        boxes = [*BOXES, [-20, -10, 170, 130]]
        found = AntialiasedResize(**options)(make_results(BOXES) | outside(boxes))
        expected = Resize(**options, backend='pillow')(make_results(BOXES) | outside(boxes))
        assert found.keys() == expected.keys()
        assert found.pop('img').shape == expected.pop('img').shape
        assert_close(found.pop('gt_bboxes').tensor, expected.pop('gt_bboxes').tensor)
        for key, value in expected.items():
            np.testing.assert_array_equal(found[key], value, err_msg=key)

    @pytest.mark.parametrize('image', [np.zeros((8, 8, 3), np.float32), np.zeros((8, 8), np.uint8)])
    def test_other_images_are_refused_by_name(self, image):
        with pytest.raises(TypeError, match='photo.jpg'):
            AntialiasedResize(scale=(4, 4))(dict(img=image, img_path='photo.jpg'))

    def test_is_packed_without_a_copy(self):
        results = AntialiasedResize(scale=(64, 64))(make_results())
        packed = PackDetInputs(meta_keys=())(results)['inputs']
        assert packed.shape == (3, 64, 64) and packed.is_contiguous()
        assert np.shares_memory(packed.numpy(), results['img'])


def outside(boxes):
    """Boxes that reach beyond the image, as entries of the results."""
    return dict(gt_bboxes=HorizontalBoxes(np.array(boxes, dtype=np.float32)))


@pytest.mark.parametrize('build, message', [
    (lambda: RandomZoomOut(ratio_range=(0.5, 2)), '1 <= low'),
    (lambda: RandomIoUCrop(min_ious=(0.5, 0.9)), r'must contain 1\.0')])
def test_bad_settings(build, message):
    with pytest.raises(ValueError, match=message):
        build()


@pytest.mark.parametrize('size', [(120, 160), (480, 333)])
def test_mmdet_pillow_resize_is_torchvision_s(size):
    """No resize of our own is needed at test."""
    results = make_results(size=size, boxes=[[1, 2, 30, 40]])
    expected = tv.Resize([64, 64])(Image.fromarray(results['img']))
    resize = Resize(scale=(64, 64), keep_ratio=False, backend='pillow', interpolation='bilinear')
    np.testing.assert_array_equal(resize(results)['img'], np.asarray(expected))


@pytest.mark.parametrize('boxes', [BOXES, []])
def test_whole_pipeline(boxes):
    """Built by name from mmdet's registry, in the official order."""
    pipeline = [dict(type='RandomPhotometricDistort'), dict(type='RandomZoomOut'),
                dict(type='RandomIoUCrop'), dict(type='FilterSmallBoxes'),
                dict(type='RandomFlip', prob=0.5), dict(type='AntialiasedResize', scale=(64, 64)),
                dict(type='FilterSmallBoxes'), dict(type='PackDetInputs')]
    transforms = [TRANSFORMS.build(item) for item in pipeline]
    for _ in range(10):
        results = dict(make_results(boxes), img_id=1, img_path='', ori_shape=SIZE)
        for transform in transforms:
            results = transform(results)
        assert results['inputs'].shape == (3, 64, 64)
        assert results['inputs'].dtype == torch.uint8
        instances = results['data_samples'].gt_instances
        assert instances.bboxes.tensor.shape == (len(instances.labels), 4)
        assert ((instances.bboxes.tensor >= 0) & (instances.bboxes.tensor <= 64)).all()
