"""AP and curves of each class are COCO's, as counted by hand."""

import json
from types import SimpleNamespace

import numpy as np
import pytest

from spartan_mm.analysis.mistakes import coco_curves
from spartan_mm.analysis.mistakes.coco_curves import (
    SUMMARY,
    CocoResults,
    draw_class_ap,
    draw_class_precision_recall,
    draw_precision_recall,
)
from spartan_mm.analysis.mistakes.predictions import DetectorResults
from spartan_mm.datasets.data_errors import DataError

from .results import make_found

# The order of the file, which is that of the labels; ids are in another one.
CLASSES = ('cat', 'dog', 'bird')
IDS = (7, 3, 9)


def evaluate(predictions, ann_file, classes=CLASSES):
    dataset = SimpleNamespace(metainfo=dict(classes=classes))
    return coco_curves.evaluate(DetectorResults(dataset, predictions), ann_file)


@pytest.fixture(scope='module')
def ann_file(tmp_path_factory):
    """Two cats, a dog and a crowd of dogs in three pictures; no bird."""
    def item(number, image, label, left, iscrowd=0):
        region = dict(segmentation=dict(size=[100, 200], counts=[0, 20000])) if iscrowd else {}
        return dict(id=number, image_id=image, category_id=IDS[label], bbox=[left, 0, 50, 40],
                    area=2000, iscrowd=iscrowd, **region)

    path = tmp_path_factory.mktemp('coco') / 'annotations.json'
    path.write_text(json.dumps(dict(
        images=[dict(id=i, file_name=f'{i}.jpg', width=200, height=100) for i in (1, 2, 3)],
        annotations=[item(0, 1, 0, 0), item(1, 2, 0, 100), item(2, 2, 1, 0), item(3, 3, 1, 0, 1)],
        categories=[dict(id=number, name=name)
                    for number, name in zip(IDS, CLASSES, strict=True)])))
    return path


PREDICTIONS = {
    # Cats: the first is right, the second nowhere, the third right. IoU of the dog: 30 / 50.
    1: make_found((0, (0, 0, 50, 40), 0.9), (0, (100, 50, 150, 90), 0.8)),
    2: make_found((0, (100, 0, 150, 40), 0.7), (1, (0, 0, 30, 40), 0.6)),
    3: make_found()}


@pytest.fixture(scope='module')
def results(ann_file):
    return evaluate(PREDICTIONS, ann_file)


def test_average_precision(results):
    assert results.classes == ('dog', 'cat', 'bird')
    assert results.objects.tolist() == [1, 2, 0]
    # Cats: 51 recalls up to one half with a precision of 1, 50 beyond it with 2 / 3.
    cat = (51 + 50 * 2 / 3) / 101
    # The dog counts up to an IoU of 0.6: 3 thresholds of 10.
    np.testing.assert_allclose(results.average_precision(), [0.3, cat, np.nan])
    np.testing.assert_allclose(results.average_precision(0.5), [1, cat, np.nan])
    np.testing.assert_allclose(results.average_precision(0.75), [0, cat, np.nan])
    # An area of 2000 is between 32 and 96 squared.
    np.testing.assert_allclose(results.average_precision(area='medium'), [0.3, cat, np.nan])
    assert np.isnan(results.average_precision(area='small')).all()

    assert list(results.summary) == list(SUMMARY)
    assert results.summary['AP'] == pytest.approx((0.3 + cat) / 2)
    assert results.summary['AP50'] == pytest.approx((1 + cat) / 2)
    assert results.summary['AR 100'] == pytest.approx((0.3 + 1) / 2)
    assert results.summary['AP large'] == -1


def test_curves(results):
    curve = results.curve(0.5)
    np.testing.assert_allclose(curve[:, 0], 1)
    np.testing.assert_allclose(curve[:, 1], [1] * 51 + [2 / 3] * 50)
    assert np.isnan(curve[:, 2]).all()


def test_images_without_predictions_are_left_out(ann_file):
    results = evaluate({1: PREDICTIONS[1]}, ann_file)
    assert results.objects.tolist() == [0, 1, 0]
    assert results.summary['AP'] == pytest.approx(1)


@pytest.mark.parametrize('arguments, message', [
    (dict(iou=0.42), 'iou=0.42: the evaluation has only the thresholds 0.5, 0.55'),
    (dict(area='tiny'), "area='tiny' must be one of 'all', 'small'"),
])
def test_what_was_not_evaluated(arguments, message, results):
    with pytest.raises(ValueError, match=message):
        results.average_precision(**arguments)


def test_nothing_detected(ann_file):
    with pytest.raises(ValueError, match='nothing was detected in any of 1 images'):
        evaluate({1: make_found()}, ann_file)


def test_predictions_of_something_else(ann_file):
    with pytest.raises(DataError, match='predictions of 1 images that it does not have'):
        evaluate({4: PREDICTIONS[1]}, ann_file)
    with pytest.raises(DataError, match='the dataset to evaluate has the classes'):
        evaluate(PREDICTIONS, ann_file, ('horse', ))


def test_bars(results):
    axes = draw_class_ap(results).axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ['cat (2)', 'dog (1)']
    ap50, ap = ([bar.get_width() for bar in bars] for bars in axes.containers)
    assert ap == pytest.approx([(51 + 50 * 2 / 3) / 101, 0.3])
    assert ap50 == pytest.approx([(51 + 50 * 2 / 3) / 101, 1])


def test_precision_recall(results):
    lines = draw_precision_recall(results).axes[0].lines
    assert [line.get_label() for line in lines][::9] == ['0.50: 0.917', '0.95: 0.417']
    lines = draw_class_precision_recall(results).axes[0].lines
    assert [line.get_label() for line in lines] == ['dog: 1.000', 'cat: 0.835', 'mean: 0.917']
    assert lines[-1].get_ydata()[-1] == pytest.approx(5 / 6)


def make_results(num_classes):
    """Make classes of which the last but one is the best and the last has no objects."""
    precision = np.ones((10, 101, num_classes, 4, 3)) * np.arange(num_classes)[:, None, None]
    precision /= num_classes
    precision[:, :, -1] = -1
    return CocoResults(tuple(f'class {i}' for i in range(num_classes)), np.arange(num_classes),
                       precision, {})


def test_many_classes():
    results = make_results(100)
    [axes] = draw_class_ap(results).axes
    names = [label.get_text() for label in axes.get_yticklabels()]
    assert len(names) == 80 and names[0] == 'class 98 (98)' and names[-1] == 'class 0 (0)'
    assert '19 in the middle left out' in axes.get_title(loc='left')
    lines = draw_class_precision_recall(results).axes[0].lines
    assert len(lines) == 100
    named = [line.get_label() for line in lines if not line.get_label().startswith('_')]
    assert [name.split(':')[0] for name in named] == [
        'class 98', 'class 97', 'class 96', 'class 2', 'class 1', 'class 0', 'mean']


def test_no_objects():
    with pytest.raises(ValueError, match='no objects of any class'):
        draw_class_ap(make_results(1))
