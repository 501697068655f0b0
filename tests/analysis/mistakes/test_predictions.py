"""Predictions and annotations are read as they are written."""

import pickle

import numpy as np
import pytest
import torch
from mmdet.structures import DetDataSample
from mmengine.structures import InstanceData
from mmpretrain.structures import DataSample
from pycocotools import mask as coco_mask

from spartan_mm.analysis.mistakes.predictions import (
    collect_outcomes,
    collect_predictions,
    read_outcomes,
    read_predictions,
    read_truth,
    spread,
)
from spartan_mm.inference import Detections


def make_found(*boxes, labels=None, scores=None):
    return Detections(np.array(boxes, dtype=np.float32).reshape(-1, 4),
                      np.array(labels or [0] * len(boxes), dtype=int),
                      np.array(scores or [0.9] * len(boxes), dtype=np.float32))


def make_sample(img_id, found):
    instances = InstanceData(bboxes=torch.from_numpy(found.boxes),
                             labels=torch.from_numpy(found.labels),
                             scores=torch.from_numpy(found.scores))
    sample = DetDataSample(metainfo=dict(img_id=img_id))
    sample.pred_instances = instances
    return sample


def region(mask, form):
    """Describe a mask in one of COCO's three ways."""
    if form == 'polygon':
        rows, columns = np.nonzero(mask)
        left, top, right, bottom = columns.min(), rows.min(), columns.max() + 1, rows.max() + 1
        return [[left, top, right, top, right, bottom, left, bottom]]
    compressed = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
    if form == 'compressed':
        return compressed
    flat = mask.ravel(order='F').astype(int)
    borders = np.flatnonzero(np.diff(flat)) + 1
    runs = np.diff([0, *borders, len(flat)]).tolist()
    return dict(size=list(mask.shape), counts=runs if not flat[0] else [0, *runs])


@pytest.fixture
def write(tmp_path):
    """Write a file of predictions."""
    def write(content):
        path = tmp_path / 'predictions.pkl'
        path.write_bytes(pickle.dumps(content))
        return path
    return write


@pytest.mark.parametrize('form', ['samples', 'dicts', 'file'])
def test_predictions_by_image_id(form, write):
    found = {3: make_found((1, 2, 3, 4), (5, 6, 7, 8), labels=[0, 1], scores=[0.5, 0.2]),
             1: make_found()}
    content = [make_sample(key, value) for key, value in found.items()]
    dicts = [sample.to_dict() for sample in content]
    predictions = (read_predictions(write(dicts)) if form == 'file' else
                   collect_predictions(content if form == 'samples' else dicts))
    assert list(predictions) == [3, 1]
    for key, value in found.items():
        for name in ('boxes', 'labels', 'scores'):
            actual, expected = getattr(predictions[key], name), getattr(value, name)
            torch.testing.assert_close(torch.from_numpy(actual), torch.from_numpy(expected))


@pytest.mark.parametrize('form', ['samples', 'file'])
def test_outcomes(form, write):
    scores = torch.tensor([[0.9, 0.1], [0.2, 0.8], [0.6, 0.4]])
    samples = [DataSample(metainfo=dict(img_path=f'./{index}.png')).set_gt_label(truth)
               .set_pred_score(scores[index]) for index, truth in enumerate([0, 0, 1])]
    outcomes = (read_outcomes(write([sample.to_dict() for sample in samples]))
                if form == 'file' else collect_outcomes(samples))
    assert outcomes.paths == ('./0.png', './1.png', './2.png')
    assert outcomes.truths.tolist() == [0, 0, 1] and outcomes.predicted.tolist() == [0, 1, 0]
    torch.testing.assert_close(torch.from_numpy(outcomes.scores), scores)


@pytest.mark.parametrize('read, kind', [(read_predictions, 'detector'),
                                        (read_outcomes, 'classifier')])
class TestFilesOfSomethingElse:

    @pytest.mark.parametrize('content', [
        [], dict(a=1), [1], [dict(img_id=1)], [dict(img_path='a', pred_score=1)]])
    def test_content(self, read, kind, content, write):
        with pytest.raises(ValueError, match=f'predictions.pkl holds no predictions of a {kind}'):
            read(write(content))

    def test_no_file(self, read, kind, tmp_path):
        with pytest.raises(FileNotFoundError, match='nowhere.pkl do not exist'):
            read(tmp_path / 'nowhere.pkl')


@pytest.mark.parametrize('form', ['polygon', 'compressed', 'uncompressed', 'box'])
def test_crowds_are_apart_from_objects(form):
    mask = np.zeros((60, 80), dtype=bool)
    mask[10:30, 20:70] = True
    crowd = dict(bbox=[20, 10, 70, 30], bbox_label=1, ignore_flag=1)
    if form != 'box':
        crowd['mask'] = region(mask, form)
    objects = [dict(bbox=[1, 2, 30, 40], bbox_label=1, ignore_flag=0), crowd,
               dict(bbox=[5, 6, 7, 8], bbox_label=0, ignore_flag=0)]
    truth = read_truth(dict(instances=objects), (60, 80))
    assert truth.boxes.tolist() == [[1, 2, 30, 40], [5, 6, 7, 8]]
    assert truth.labels.tolist() == [1, 0]
    [(label, found)] = truth.crowds
    assert label == 1 and found.dtype == bool
    assert np.array_equal(found, mask)


@pytest.mark.parametrize('total, count, expected', [
    (200, 4, [25, 75, 125, 175]), (5, 5, [0, 1, 2, 3, 4]), (3, 8, [0, 1, 2]), (9, 1, [4])])
def test_spread(total, count, expected):
    assert spread(total, count) == expected
