"""Evaluators that would fail after the work are refused before it, with the names that exist."""
import re

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.logging import MMLogger
from mmengine.registry import METRICS, MODELS

import spartan_mm.classification  # noqa: F401 - registers the metrics
from spartan_mm.datasets.evaluators import check_evaluator, find_evaluator_faults
from spartan_mm.detection import CheckedCocoMetric
from spartan_mm.errors import UsageError

DETECTOR = dict(type='RTDETR', bbox_head=dict(type='RTDETRHead', num_classes=3))
WITH_MASKS = dict(type='MaskRCNN', roi_head=dict(
    bbox_head=dict(num_classes=3), mask_head=dict(num_classes=3)))
CLASSIFIER = dict(type='ImageClassifier', head=dict(type='LinearClsHead', num_classes=3))


def make_config(evaluator, model=DETECTOR, scope='mmdet'):
    return Config(dict(default_scope=scope, model=model, val_evaluator=evaluator))


def of_coco(**options):
    return dict(type='CheckedCocoMetric', ann_file='not_read.json', **options)


@pytest.mark.parametrize('options, message', [
    (dict(metric=['bbox', 'segm']), "'segm' needs masks.*take 'bbox'"),
    (dict(metric='boxes'), 'metric has no boxes; take some of bbox, segm, proposal, proposal_fast'),
    (dict(metric=None), 'metric=.*must be a list of some of bbox'),
    (dict(metric_items=['mAP', 'mAP_90']), 'metric_items has no mAP_90; .* mAP_50,.*_l@1000'),
    (dict(metric_items='mAP'), "metric_items='mAP' must be a list"),
    (dict(proposal_nums=100), r'proposal_nums=100 must be a list.*\(1, 10, 100\)'),
    (dict(proposal_nums=(1, 10)), 'three numbers with 100 among them'),
    (dict(proposal_nums=(1, 10, 50)), 'three numbers with 100 among them'),
    (dict(iou_thrs='0.5'), r"iou_thrs='0.5' must be numbers.*\[0.5, 0.75\]"),
    (dict(iou_thrs=[50, 75]), r'iou_thrs=\[50, 75\] must be numbers from 0 to 1'),
    (dict(classwise=True, iou_thrs=[0.5]), 'classwise=True .* there are 1'),
    (dict(metrics='bbox'), 'has no option metrics; it has .*metric, metric_items'),
    (dict(backend='fast'), "cannot evaluate: ValueError: backend='fast' must be one of")])
@pytest.mark.parametrize('in_list', [False, True])
def test_options_of_coco_that_would_fail(options, message, in_list):
    evaluator = of_coco(**options)
    config = make_config([of_coco(), evaluator] if in_list else evaluator)
    with pytest.raises(UsageError, match=f'^val_evaluator: .*{message}') as refused:
        check_evaluator(config, 'val')
    assert '\n' not in str(refused.value)


@pytest.mark.parametrize('evaluator, model', [
    (of_coco(), DETECTOR), ([of_coco(), of_coco(prefix='again')], DETECTOR),
    (of_coco(iou_thrs=[0.5]), DETECTOR), (of_coco(iou_thrs=0.5), DETECTOR),
    (of_coco(iou_thrs=np.array([0.5, 0.75]), metric_items=['mAP_50', 'AR@100']), DETECTOR),
    (of_coco(metric=['proposal', 'proposal_fast']), DETECTOR), (of_coco(classwise=True), DETECTOR),
    (of_coco(proposal_nums=(1, 10, 100)), DETECTOR), (of_coco(format_only=True,
                                                              outfile_prefix='no/such'), DETECTOR),
    (of_coco(metric=['bbox', 'segm']), WITH_MASKS),
    (dict(type='CocoMetric', ann_file='not_read.json'), DETECTOR),
    (dict(type='DumpDetResults', out_file_path='not_written.pkl'), DETECTOR), (None, DETECTOR)],
    ids=str)
def test_options_that_work(evaluator, model, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    assert not [*find_evaluator_faults(make_config(evaluator, model), 'val')]
    assert not [*tmp_path.iterdir()]
    assert not capfd.readouterr().out


@METRICS.register_module()
class EvaluatorsOwn(CheckedCocoMetric):
    """Of a user: takes more, and needs more than a made-up prediction has."""

    def __init__(self, *args, **kwargs):
        self.most = kwargs.pop('most', 1)
        super().__init__(*args, **kwargs)

    def process(self, batch, samples):
        assert all('img_path' in sample for sample in samples)


@MODELS.register_module()
class EvaluatorsSegmenter(torch.nn.Module):
    pass


@pytest.mark.parametrize('evaluator, model, scope', [
    (dict(type='EvaluatorsOwn', most=3), DETECTOR, 'mmdet'),
    (dict(type='OVCocoMetric', ann_file='a.json'), DETECTOR, 'mmdet'),
    (dict(type='VOCMultiLabelMetric'), CLASSIFIER, 'mmpretrain'),
    (dict(type='MultiDatasetsEvaluator', metrics=[of_coco()], dataset_prefixes=['a']), DETECTOR,
     'mmdet'),
    (dict(metrics=[of_coco()]), DETECTOR, 'mmdet'),
    (dict(type='Accuracy', _scope_='mmpretrain'), CLASSIFIER, 'mmdet'),
    (of_coco(metric='segm'), dict(type='EvaluatorsSegmenter'), 'mmdet'),
    (dict(type='Accuracy', topk=(1, 5)), dict(type='ImageClassifier', head=dict(type='Own')),
     'mmpretrain'),
    (dict(type='Accuracy', topk=(1, 5)), dict(head=dict(a_head=dict(num_classes=2), b_head=dict(
        num_classes=9))), 'mmpretrain')], ids=str)
def test_what_nobody_here_can_judge_stays(evaluator, model, scope):
    config = make_config(evaluator, model, scope)
    before = config.to_dict()
    check_evaluator(config, 'val')
    assert config.to_dict() == before


@pytest.mark.parametrize('evaluator, message', [
    (dict(metrics=of_coco(metric='boxes')), 'metric has no boxes'),
    (dict(type='CocoMetrik'), "no metric of type 'CocoMetrik'; the closest names are .*CocoMetric"),
    (dict(type='CocoMetric', iou_thrs=[0.5]), r'CocoMetric\(iou_thrs=\[0.5\]\) cannot evaluate'),
    (dict(type='CocoMetric', metric=['segm']), "'segm' needs masks")])
def test_metrics_of_mmdet(evaluator, message):
    fault, = find_evaluator_faults(make_config(evaluator), 'val')
    assert re.search(message, fault), fault


@pytest.mark.parametrize('evaluator, message', [
    (dict(type='Accuracy', thrs=1), r'Accuracy\(thrs=1\) cannot evaluate: TypeError'),
    (dict(type='Accuracy', thrs=('a', )), 'cannot evaluate: TypeError'),
    (dict(type='Accuracy', topk='5'), 'cannot evaluate'),
    (dict(type='Accuracy', top=5), 'no option top; it has .*topk'),
    (dict(type='SingleLabelMetric', items=['f1']), 'f1 is not supported.*f1-score')])
def test_metrics_of_a_classifier_that_would_fail(evaluator, message):
    fault, = find_evaluator_faults(make_config(evaluator, CLASSIFIER, 'mmpretrain'), 'val')
    assert re.search(message, fault), fault


@pytest.mark.parametrize('topk, taken', [((1, 5), [1, 3]), (5, [3]), ((1, 3), (1, 3)), (1, 1)])
def test_topk_of_fewer_classes(topk, taken):
    config = make_config([dict(type='Accuracy', topk=topk)], CLASSIFIER, 'mmpretrain')
    check_evaluator(config, 'val')
    assert config.val_evaluator[0].topk == taken


def test_metrics_are_silent_and_everything_is_logged_afterwards(capfd):
    config = make_config(of_coco(format_only=True, outfile_prefix='not_written'))
    logger = MMLogger.get_instance('evaluators')  # the one that is in use from here on
    for number in range(2):
        check_evaluator(config, 'val')
        logger.info('line %d', number)
    out, err = capfd.readouterr()
    assert (out + err).count('line') == 2 and 'results' not in out + err
