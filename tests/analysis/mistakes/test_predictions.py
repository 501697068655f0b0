"""Predictions and annotations are read as they are written."""

import pickle

import pytest
import torch
from mmdet.structures import DetDataSample
from mmengine.config import Config
from mmengine.dataset import BaseDataset
from mmengine.structures import InstanceData
from mmpretrain.structures import DataSample

from spartan_mm.analysis.mistakes.predictions import read_results, read_truth, spread

from .results import make_found


@pytest.fixture
def read(tmp_path):
    """Writes predictions, and reads them."""
    def read(content, scope='mmdet', classes=('a', 'b')):
        path = tmp_path / 'predictions.pkl'
        path.write_bytes(pickle.dumps(content))
        dataset = dict(type=BaseDataset, lazy_init=True, metainfo=dict(classes=classes))
        return read_results(Config(dict(default_scope=scope,
                                        test_dataloader=dict(dataset=dataset))), path)
    return read


def test_a_detectors(read):
    found = {3: make_found((0, (1, 2, 3, 4), 0.5), (1, (5, 6, 7, 8), 0.2)), 1: make_found()}
    samples = [DetDataSample(metainfo=dict(img_id=key), pred_instances=InstanceData(
        bboxes=torch.from_numpy(value.boxes), labels=torch.from_numpy(value.labels),
        scores=torch.from_numpy(value.scores))) for key, value in found.items()]
    results = read([sample.to_dict() for sample in samples])
    assert results.classes == ('a', 'b') and list(results.predictions) == [3, 1]
    for key, value in found.items():
        for name in ('boxes', 'labels', 'scores'):
            actual, expected = getattr(results.predictions[key], name), getattr(value, name)
            torch.testing.assert_close(torch.from_numpy(actual), torch.from_numpy(expected))


def test_a_classifiers(read):
    scores = torch.tensor([[0.9, 0.1], [0.2, 0.8], [0.6, 0.4]])
    samples = [DataSample(metainfo=dict(img_path=f'./{index}.png')).set_gt_label(truth)
               .set_pred_score(scores[index]).to_dict() for index, truth in enumerate([0, 0, 1])]
    results = read(samples, 'mmpretrain')
    assert results.paths == ('./0.png', './1.png', './2.png') and results.classes == ('a', 'b')
    assert results.truths.tolist() == [0, 0, 1] and results.predicted.tolist() == [0, 1, 0]
    torch.testing.assert_close(torch.from_numpy(results.scores), scores)
    with pytest.raises(ValueError, match='scores of 2 classes, but the test dataset names 1'):
        read(samples, 'mmpretrain', ('a', ))


@pytest.mark.parametrize('scope, kind', [('mmdet', 'detector'), ('mmpretrain', 'classifier')])
class TestFilesOfSomethingElse:

    @pytest.mark.parametrize('content', [
        [], dict(a=1), [1], [dict(img_id=1)], [dict(img_path='a', pred_score=1)]])
    def test_content(self, scope, kind, content, read):
        with pytest.raises(ValueError, match=f'predictions.pkl holds no predictions of a {kind}'):
            read(content, scope)

    def test_no_file(self, scope, kind, tmp_path):
        with pytest.raises(FileNotFoundError, match='nowhere.pkl do not exist'):
            read_results(Config(dict(default_scope=scope)), tmp_path / 'nowhere.pkl')


def test_crowds_are_told_apart_from_objects():
    objects = [dict(bbox=[1, 2, 30, 40], bbox_label=1, ignore_flag=0),
               dict(bbox=[20, 10, 70, 30], bbox_label=1, ignore_flag=1),
               dict(bbox=[5, 6, 7, 8], bbox_label=0, ignore_flag=0)]
    truth = read_truth(dict(instances=objects))
    assert truth.boxes.tolist() == [[1, 2, 30, 40], [20, 10, 70, 30], [5, 6, 7, 8]]
    assert truth.labels.tolist() == [1, 1, 0] and truth.crowds.tolist() == [False, True, False]
    assert read_truth(dict(instances=[])).boxes.shape == (0, 4)


@pytest.mark.parametrize('total, count, expected', [
    (200, 4, [25, 75, 125, 175]), (5, 5, [0, 1, 2, 3, 4]), (3, 8, [0, 1, 2]), (9, 1, [4])])
def test_spread(total, count, expected):
    assert spread(total, count) == expected
