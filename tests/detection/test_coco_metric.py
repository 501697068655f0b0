"""COCO's metrics: the same whoever computes them, and of all images or not at all."""

import json
import math
import sys

import faster_coco_eval
import numpy as np
import pycocotools.cocoeval
import pytest
import torch
from mmdet.evaluation import CocoMetric
from mmdet.evaluation.metrics import coco_metric
from mmengine.structures import InstanceData

from spartan_mm.datasets.data_errors import DataError
from spartan_mm.detection import CheckedCocoMetric

CATEGORIES = [dict(id=3 * index + 1, name=f'class {index}') for index in range(6)]
META = dict(classes=tuple(category['name'] for category in CATEGORIES))


def boxes(random, count):
    """Boxes of all three of COCO's areas, (count, 4) as x1, y1, x2, y2."""
    corners = random.uniform(0, 300, (count, 2))
    return np.concatenate([corners, corners + random.uniform(4, 200, (count, 2))], 1)


@pytest.fixture
def ground_truth(tmp_path):
    """Sixteen images, one of them without objects, with crowds and objects to be ignored."""
    random = np.random.default_rng(0)
    images, annotations = [], []
    for image in range(1, 17):
        images.append(dict(id=image, file_name=f'{image}.jpg', width=640, height=480))
        for x1, y1, x2, y2 in boxes(random, random.integers(3, 12) if image > 1 else 0):
            annotations.append(dict(
                id=len(annotations) + 1, image_id=image, iscrowd=int(random.random() < 0.15),
                category_id=CATEGORIES[random.integers(0, 5)]['id'],  # none of the sixth
                bbox=[x1, y1, x2 - x1, y2 - y1], area=(x2 - x1) * (y2 - y1) * random.uniform(.4, 1)
            ))
    path = tmp_path / 'annotations.json'
    path.write_text(json.dumps(dict(images=images, annotations=annotations, categories=CATEGORIES)))
    return path


@pytest.fixture
def predictions(ground_truth):
    """Objects that are found more or less well, and as many that are not there; equal scores."""
    random = np.random.default_rng(1)
    content = json.loads(ground_truth.read_text())
    samples = []
    for image in content['images']:
        own = [item for item in content['annotations'] if item['image_id'] == image['id']] * 2
        found = np.array([item['bbox'] for item in own]).reshape(-1, 4)
        found[:, 2:] += found[:, :2]
        found += random.normal(0, 6, found.shape)
        labels = np.array([item['category_id'] // 3 for item in own], dtype=int)
        # More than the hundred that count in an image.
        found = np.concatenate([found, boxes(random, 110)])
        labels = np.concatenate([labels, random.integers(0, 6, 110)])
        scores = random.random(len(found)).round(1)
        samples.append(dict(
            img_id=image['id'], ori_shape=(480, 640),
            pred_instances=InstanceData(bboxes=torch.tensor(found), labels=torch.tensor(labels),
                                        scores=torch.tensor(scores))))
    return samples


@pytest.fixture
def evaluate(ground_truth, predictions, monkeypatch):
    """Evaluates; gives the metrics, and the evaluator's numbers before they are rounded."""
    recorded = []
    for owner in (pycocotools.cocoeval.COCOeval, faster_coco_eval.COCOeval_faster):
        def summarize(self, original=owner.summarize):
            original(self)
            recorded.append((type(self).__module__.partition('.')[0], np.array(self.stats)))
        monkeypatch.setattr(owner, 'summarize', summarize)

    def evaluate(**options):
        metric = CheckedCocoMetric(str(ground_truth), proposal_nums=(1, 10, 100), **options)
        metric.dataset_meta = META
        metric.process({}, predictions)
        metrics = metric.evaluate(len(predictions))
        return metrics, *recorded.pop()
    return evaluate


@pytest.mark.parametrize('options', [
    dict(),
    dict(classwise=True),
    dict(metric='proposal', metric_items=['AR@100', 'AR@1000', 'AR_s@1000']),
    dict(iou_thrs=[0.5, 0.75]),
], ids=str)
def test_numbers_are_those_of_pycocotools(evaluate, options):
    expected, module, numbers = evaluate(**options)
    assert module == 'pycocotools'
    metrics, module, faster = evaluate(backend='faster_coco_eval', **options)
    assert module == 'faster_coco_eval'
    assert len(numbers) == 12 and (numbers > 0).sum() > 5
    torch.testing.assert_close(faster, numbers, rtol=0, atol=1e-12)
    assert metrics.keys() == expected.keys()
    for name, value in expected.items():
        assert metrics[name] == pytest.approx(value, nan_ok=True, abs=0), name


def test_pycocotools_is_back_afterwards(evaluate, monkeypatch):
    evaluate(backend='faster_coco_eval')
    assert coco_metric.COCOeval is pycocotools.cocoeval.COCOeval
    monkeypatch.setattr(CocoMetric, 'compute_metrics', lambda self, results: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        evaluate(backend='faster_coco_eval')
    assert coco_metric.COCOeval is pycocotools.cocoeval.COCOeval


def test_mistakes(monkeypatch):
    with pytest.raises(ValueError, match="backend='fast' must be one of 'pycocotools', 'faster_"):
        CheckedCocoMetric(backend='fast')
    with pytest.raises(ValueError, match='use_mp_eval is for pycocotools'):
        CheckedCocoMetric(backend='faster_coco_eval', use_mp_eval=True)
    monkeypatch.setitem(sys.modules, 'faster_coco_eval', None)
    with pytest.raises(ImportError, match='faster_coco_eval >= .* not installed'):
        CheckedCocoMetric(backend='faster_coco_eval')


class TestMetric:
    """Of all images or not at all."""

    @pytest.fixture
    def metric(self, tmp_path):
        def metric(content, **kwargs):
            (tmp_path / 'set.json').write_text(json.dumps(content))
            metric = CheckedCocoMetric(str(tmp_path / 'set.json'), **kwargs)
            metric.dataset_meta = dict(classes=[item['name'] for item in content['categories']])
            return metric
        return metric

    def predict(self, content, images=None):
        """The annotated boxes themselves, of the images with these ids."""
        labels = {item['id']: label for label, item in enumerate(content['categories'])}
        samples = []
        for image in content['images']:
            own = [item for item in content['annotations']
                   if item['image_id'] == image['id'] and not item['iscrowd']]
            boxes = torch.tensor([item['bbox'] for item in own]).reshape(-1, 4)
            boxes[:, 2:] += boxes[:, :2]
            samples.append(dict(
                img_id=image['id'], ori_shape=(image['height'], image['width']),
                pred_instances=dict(bboxes=boxes, scores=torch.ones(len(own)), labels=torch.tensor(
                    [labels[item['category_id']] for item in own], dtype=torch.long))))
        return [sample for sample in samples if images is None or sample['img_id'] in images]

    def evaluate(self, metric, samples):
        metric.process({}, samples)
        return metric.evaluate(len(samples))

    def test_all_images(self, metric, content):
        assert self.evaluate(metric(content), self.predict(content))['coco/bbox_mAP'] == 1

    def test_annotation_id_0_is_found_like_any_other(self, metric, content):
        content['annotations'][0]['id'] = 0
        assert self.evaluate(metric(content), self.predict(content))['coco/bbox_mAP'] == 1

    def test_missing_images(self, metric, content):
        with pytest.raises(DataError, match=r'set.json: 2 of 3 images have no predictions '
                                            r"\(image ids 3, 9\).*missing_images='leave_out'"):
            self.evaluate(metric(content), self.predict(content, [7]))
        # The rest alone: what is missing does not count as not found.
        content['annotations'][1]['iscrowd'] = 0
        found = self.evaluate(metric(content, missing_images='leave_out'),
                              self.predict(content, [7]))
        assert found['coco/bbox_mAP'] == 1

    def test_other_images(self, metric, content):
        samples = self.predict(content)
        with pytest.raises(DataError, match='more than once.*image ids 7'):
            self.evaluate(metric(content), [*samples, samples[0]])
        samples[0]['img_id'] = 8
        with pytest.raises(DataError, match='predictions of 1 images that it does not have '
                                            r'\(image ids 8\)'):
            self.evaluate(metric(content), samples)
        with pytest.raises(DataError, match='no predictions to evaluate'):
            metric(content).compute_metrics([])

    def test_nan(self, metric, content):
        samples = self.predict(content)
        samples[0]['pred_instances']['scores'][0] = float('nan')
        with pytest.raises(DataError, match=r'1 of 3 images contain NaN .*image ids 7'):
            self.evaluate(metric(content), samples)

    def test_classes_of_another_file(self, metric, content):
        with pytest.raises(DataError, match='reads the categories dog, cat, bird, but the dataset '
                                            'to evaluate has the classes cat, dog'):
            metric(content).dataset_meta = dict(classes=('cat', 'dog'))

    def test_boxes_as_in_coco(self, metric, content):
        """One of no size is an object that nobody finds; one that is no number stops."""
        content['annotations'][2].update(bbox=[5, 6, 0, 10], area=0)
        found = self.evaluate(metric(content), self.predict(content))
        assert found['coco/bbox_mAP'] == pytest.approx(0.5)
        content['annotations'][2].update(bbox=[5, 6, math.nan, 10])
        with pytest.raises(DataError, match='annotation 13 of image 7 .*not finite'):
            metric(content)

    def test_ground_truth_from_the_samples(self, content):
        metric = CheckedCocoMetric()
        metric.dataset_meta = dict(classes=('dog', 'cat', 'bird'))
        samples = self.predict(content)
        for sample in samples:
            found = sample['pred_instances']
            sample['instances'] = [dict(bbox=box, bbox_label=label) for box, label in zip(
                found['bboxes'].tolist(), found['labels'].tolist(), strict=True)]
        assert self.evaluate(metric, samples)['coco/bbox_mAP'] == 1

    def test_bad_options(self, metric, content):
        with pytest.raises(ValueError, match="missing_images='skip' must be"):
            metric(content, missing_images='skip')
        with pytest.raises(ValueError, match='sort_categories'):
            metric(content, sort_categories=True)
        with pytest.raises(FileNotFoundError, match='no annotation file'):
            CheckedCocoMetric('none.json')
