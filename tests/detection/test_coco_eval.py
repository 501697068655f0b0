"""COCO's metrics are the same whoever computes them."""

import json
import sys

import faster_coco_eval
import numpy as np
import pycocotools.cocoeval
import pytest
import torch
from mmdet.evaluation import CocoMetric
from mmdet.evaluation.metrics import coco_metric
from mmengine.structures import InstanceData

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
    dict(iou_thrs=np.array([0.5, 0.75])),
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
