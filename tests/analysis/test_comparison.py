"""Models side by side: what is published, what is measured, and a plot that can be read."""

import csv
import io
import itertools
import random
from dataclasses import replace

import pytest

from spartan_mm.analysis import comparison
from spartan_mm.analysis.benchmark import StepError, Summary, Workload
from spartan_mm.analysis.comparison import (
    Accuracy,
    Comparison,
    Row,
    compare,
    draw_comparison,
    find_accuracy,
    make_csv,
    make_markdown,
)
from spartan_mm.analysis.kernels import KernelCount
from spartan_mm.analysis.sizes import Complexity, Count
from spartan_mm.errors import UsageError


@pytest.mark.parametrize('name, value, metric, dataset, source', [
    ('spartan_t', 77.7, 'top-1, %', 'ImageNet-1k', 'paper'),
    ('mmpretrain:resnet18_8xb32_in1k', 69.9, 'top-1, %', 'ImageNet-1k', 'mmpretrain'),
    ('mmdet::detr/detr_r50_8xb2-150e_coco.py', 39.9, 'box AP', 'COCO', 'mmdet'),
])
def test_published_accuracy(name, value, metric, dataset, source):
    found = find_accuracy(name)
    assert (found.value, found.metric, found.dataset) == (value, metric, dataset)
    assert found.source.startswith(source)


def test_detectors_share_axes():
    """Metafiles that say which part of COCO, and those that do not, mean the same figure."""
    rows = [replace(make_row(name, 20, 50.), accuracy=find_accuracy(name))
            for name in ('rtdetr_r18vd', 'mmdet::detr/detr_r50_8xb2-150e_coco.py')]
    rows.append(replace(rows[0], accuracy=find_accuracy('rtdetr_r18vd', 50.)))
    assert {(row.accuracy.metric, row.accuracy.dataset) for row in rows} == {('box AP', 'COCO')}
    assert len(draw_comparison(Comparison(tuple(rows))).axes) == 2


def test_accuracy_of_the_user():
    assert find_accuracy('timm:resnet18') is None
    assert find_accuracy('timm:resnet18', 69.8) == Accuracy(69.8, 'top-1, %', 'ImageNet-1k',
                                                            'given by the user')
    assert find_accuracy('rtdetr_spartan_t', 50.).metric == 'box AP'
    with pytest.raises(UsageError, match='an accuracy is given for timm:resnet18, but'):
        compare(['xt'], accuracies={'timm:resnet18': 69.8})


@pytest.mark.slow
def test_times():
    """All models that can run are measured, the others' problem is told."""
    names = ['xt', 'timm:test_resnet', 'timm:vit_tiny_patch16_224', 'xt']
    found = compare(names, (64, 64), deploy=True, accuracies={'timm:test_resnet': 12.5},
                    workload=Workload(batch=2), rounds=2)
    backbone, resnet, failing = found.rows
    assert (backbone.has_spartan, backbone.count.form) == (True, 'deploy form')
    assert (resnet.has_spartan, resnet.count.form) == (False, 'training form')
    assert min(backbone.rate, resnet.rate) > 0 and backbone.latency.median > 0
    assert failing.problem.startswith('timm:vit_tiny_patch16_224 cannot be run on images of 64x64')

    text = make_markdown(found)
    assert 'took turns' in text and 'images/s (batch 2)' in text
    assert '| SpaRTAN-XT | spartan_mm | deploy form |' in text
    assert failing.problem in text and f'torch {found.machine["torch"]}' in text
    records = list(csv.DictReader(io.StringIO(make_csv(found))))
    assert [record['model'] for record in records] == [
        'SpaRTAN-XT', 'test_resnet', 'timm:vit_tiny_patch16_224']
    assert int(records[0]['parameters']) == backbone.count.total.parameters
    assert float(records[1]['latency_ms']) == pytest.approx(1e3 * resnet.latency.median)
    assert float(records[1]['accuracy']) == 12.5 and not records[0]['accuracy']


def test_model_that_fails_when_it_is_measured(monkeypatch):
    def run_group(group, report):
        for form in group.forms:
            if form.model == 'timm:test_resnet':
                raise StepError(form, 'it cannot run: no such op')
        return dict(machine={}, results=[dict(times=[0.5, 0.5], batch=1, sizes=[(32, 32)])])
    monkeypatch.setattr(comparison, 'run_group', run_group)
    working, failing = compare(
        ['timm:test_vit', 'timm:test_resnet'], (160, 160), workload=Workload()).rows
    assert (working.rate, working.problem) == (2., None)
    assert failing.problem == 'it cannot run: no such op' and failing.rate is None


def make_row(name, size, accuracy, ours=False, latency=None, metric='top-1, %'):
    count = Count(name, 'config', 'training form', (224, 224),
                  {'': Complexity(int(size * 1e6), int(size * 3e8), int(size * 3e8), 1)},
                  {'': 'SpaRTAN' if ours else 'ResNet'}, KernelCount())
    return Row(name, count, Accuracy(accuracy, metric, 'data', 'paper'),
               latency and Summary(latency, latency, latency))


@pytest.mark.slow
def test_plot():
    random.seed(0)
    rows = [make_row(f'a_model_{index}', random.uniform(2, 8), random.uniform(70, 78),
                     index % 4 == 0, random.uniform(0.02, 0.09)) for index in range(16)]
    # Apart from them: another metric, sizes far apart, and one that was not measured.
    rows += [make_row('detector', 100, 40., metric='box AP', latency=1.),
             make_row('small', 1, 30., metric='box AP')]
    figure = draw_comparison(Comparison(tuple(rows)))
    assert len(figure.axes) == 6
    figure.draw_without_rendering()
    for axes in figure.axes:
        labels = {text.get_text(): text for text in axes.texts}
        boxes = [text.get_window_extent().padded(-1) for text in labels.values()]
        assert not any(one.overlaps(other) for one, other in itertools.combinations(boxes, 2))
    assert len(figure.axes[0].texts) == 16 and len(figure.axes[5].texts) == 1
    assert figure.axes[3].get_xscale() == 'log' and figure.axes[0].get_xscale() == 'linear'


def test_plot_of_nothing():
    assert draw_comparison(compare(['timm:test_resnet'], (32, 32))) is None
