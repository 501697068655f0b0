"""What a detector gets wrong is found, called what it is, ranked and drawn."""

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from spartan_mm.analysis.mistakes import pictures
from spartan_mm.analysis.mistakes.confusion import Confusions, count_detections
from spartan_mm.analysis.mistakes.errors import (
    KINDS,
    count_kinds,
    find_errors,
    match,
    measure_overlaps,
)

from .results import make_results

CAT, DOG = 0, 1
BOX = (10, 10, 30, 30)
SHIFTED = (20, 10, 40, 30)  # an IoU of 1/3 with BOX
ELSEWHERE = (60, 50, 80, 60)


def find(objects, found, **thresholds):
    return find_errors(make_results([objects], [found]), **thresholds)


@pytest.mark.parametrize('objects, found, kinds', [
    ([(CAT, BOX)], [(CAT, BOX, 0.9)], []),
    ([(CAT, BOX)], [], ['missed']),
    ([(CAT, BOX)], [(CAT, BOX, 0.2)], ['missed']),
    ([], [(CAT, BOX, 0.9)], ['background']),
    ([(CAT, BOX)], [(CAT, BOX, 0.8), (CAT, ELSEWHERE, 0.9)], ['background']),
    ([(CAT, BOX)], [(DOG, BOX, 0.9)], ['class']),
    ([(CAT, BOX)], [(CAT, SHIFTED, 0.9)], ['location']),
    # Two errors, as in TIDE: neither another class nor another box alone would mend it.
    ([(CAT, BOX)], [(DOG, SHIFTED, 0.7)], ['missed', 'class and location']),
    ([(CAT, BOX)], [(CAT, BOX, 0.9), (CAT, BOX, 0.8)], ['duplicate']),
    # The right class for the object that it overlaps little, the wrong one for the other.
    ([(CAT, BOX), (DOG, SHIFTED)], [(CAT, BOX, 0.9), (CAT, SHIFTED, 0.8)], ['class']),
    # Each takes the object that it overlaps most.
    ([(CAT, BOX), (CAT, (12, 10, 32, 30))], [(CAT, (12, 10, 32, 30), 0.9), (CAT, BOX, 0.8)], []),
    ([(CAT, BOX, True)], [(CAT, (12, 12, 20, 20), 0.9)], []),
    ([(CAT, BOX, True)], [(DOG, (12, 12, 20, 20), 0.9)], ['background']),
])
def test_kinds(objects, found, kinds):
    assert [error.kind for error in find(objects, found)] == kinds


def test_what_is_known_of_an_error():
    [wrong] = find([(CAT, BOX)], [(DOG, (10, 10, 30, 26), 0.9)])
    assert (wrong.found_label, wrong.true_label, wrong.index) == (DOG, CAT, 0)
    assert [*wrong.found_box] == [10, 10, 30, 26] and [*wrong.true_box] == [*BOX]
    assert wrong.score == wrong.severity == pytest.approx(0.9)
    assert wrong.overlap == pytest.approx(0.8)
    assert wrong.describe(('cat', 'dog')) == ('dog 0.90', 'is cat, IoU 0.80')

    [missed] = find([(CAT, BOX)], [(CAT, BOX, 0.1), (CAT, BOX, 0.2), (DOG, BOX, 0.25)])
    assert missed.severity == pytest.approx(0.8) and [*missed.found_box] == [*BOX]
    assert missed.describe(('cat', 'dog')) == ('cat', 'scored only 0.20')

    [alarm] = find([], [(DOG, BOX, 0.5)])
    assert alarm.true_box is None and alarm.overlap == 0
    assert alarm.describe(('cat', 'dog')) == ('dog 0.50', 'nothing there')


def test_the_worst_is_first():
    errors = find_errors(make_results(
        [[(CAT, BOX)], [(CAT, ELSEWHERE)], [(CAT, BOX)], []],
        [[], [], [(CAT, BOX, 0.1)], [(DOG, BOX, 0.4), (DOG, ELSEWHERE, 0.95)]]))
    # Of the objects without a trace of a detection, the larger first.
    assert [(error.kind, error.index, round(error.severity, 2)) for error in errors] == [
        ('missed', 0, 1), ('missed', 1, 1), ('background', 3, 0.95), ('missed', 2, 0.9),
        ('background', 3, 0.4)]
    assert count_kinds(errors) == {kind: dict(missed=3, background=2).get(kind, 0)
                                   for kind in KINDS}


def test_thresholds():
    found = [(CAT, (10, 10, 30, 26), 0.6)]
    assert find([(CAT, BOX)], found, score_threshold=0.6, iou_threshold=0.8) == []
    assert [error.kind for error in find([(CAT, BOX)], found, iou_threshold=0.9)] == ['location']
    assert [error.kind for error in find([(CAT, BOX)], found, score_threshold=0.7)] == ['missed']
    with pytest.raises(ValueError, match='iou_threshold=0.1 must be above 0.1'):
        find([], [], iou_threshold=0.1)


def test_predictions_of_another_dataset():
    with pytest.raises(ValueError, match='no prediction for image 1'):
        find_errors(make_results([[], []], [[]]))


def test_overlaps():
    boxes = np.array([BOX, ELSEWHERE, (5, 5, 5, 9)], dtype=float)
    others = np.array([BOX, SHIFTED, (0, 0, 100, 100)] * 2, dtype=float)
    crowds = np.arange(6) > 2
    expected = [[1, 1 / 3, 0.04, 1, 0.5, 1], [0, 0, 0.02, 0, 0, 1], [0, 0, 0, 0, 0, 0]]
    torch.testing.assert_close(torch.tensor(measure_overlaps(boxes, others, crowds)),
                               torch.tensor(expected, dtype=torch.double))
    assert measure_overlaps(boxes, np.zeros((0, 4)), crowds[:0]).shape == (3, 0)


def test_matching_goes_by_turns():
    overlaps = np.array([[0.6, 0.7], [0.5, 0.9], [0.6, 0.6]])
    assert match(overlaps, 0.5).tolist() == [1, 0, -1]
    assert match(overlaps, 0.65).tolist() == [1, -1, -1]
    assert match(np.zeros((2, 0)), 0.5).tolist() == [-1, -1]


@pytest.mark.parametrize('seed', range(5))
def test_right_and_left_out_is_what_cocos_evaluation_says(seed, capsys):
    random = np.random.default_rng(seed)

    def draw_boxes(number):
        corners = random.integers(0, 30, (number, 2))
        return np.concatenate([corners, corners + random.integers(5, 25, (number, 2))], 1)

    objects = [(int(random.integers(2)), tuple(box.tolist()), bool(random.random() < 0.2))
               for box in draw_boxes(12)]
    found = [(int(random.integers(2)), tuple(box.tolist()), float(score))
             for box, score in zip(draw_boxes(40), random.permutation(40) / 40, strict=True)]
    counts = count_detections(make_results([objects], [found]), score_threshold=0).counts
    errors = find(objects, found, score_threshold=0)

    def to_coco(label, box):
        left, top, right, bottom = box
        return dict(image_id=1, category_id=label, bbox=[left, top, right - left, bottom - top])

    truth = COCO()
    truth.dataset = dict(images=[dict(id=1)], categories=[dict(id=0), dict(id=1)], annotations=[
        dict(to_coco(label, box), id=number, iscrowd=int(crowd),
             area=(box[2] - box[0]) * (box[3] - box[1]))
        for number, (label, box, crowd) in enumerate(objects, start=1)])
    truth.createIndex()
    evaluation = COCOeval(truth, truth.loadRes([dict(to_coco(label, box), score=score)
                                                for label, box, score in found]), 'bbox')
    evaluation.params.iouThrs, evaluation.params.areaRng = np.array([0.5]), [[0, 1e5]]
    evaluation.evaluate()
    for image in evaluation.evalImgs:
        left_out = image['dtIgnore'][0].astype(bool)
        right = (image['dtMatches'][0] > 0) & ~left_out
        label = image['category_id']
        assert counts[label, label] == right.sum()
        alarms = [error for error in errors
                  if error.kind != 'missed' and error.found_label == label]
        assert len(alarms) == counts[:, label].sum() - right.sum() == (~right & ~left_out).sum()


def test_records():
    results = make_results([[(CAT, BOX)], [(CAT, BOX)]],
                           [[], [(CAT, BOX, 0.9), (CAT, ELSEWHERE, 0.5)]])
    missed, alarm = find_errors(results)
    assert missed.as_record(results) == dict(
        file='./0.png', kind='missed', severity=1., true_bbox=[10, 10, 30, 30], true_class='cat')
    assert alarm.as_record(results) == dict(
        file='./1.png', kind='background', severity=0.5, score=0.5, found_class='cat',
        found_bbox=[60, 50, 80, 60])


class TestSheet:

    @pytest.fixture
    def draw(self, tmp_path):
        """Draws what was found in a cat, a cat as large as its picture, and nothing."""
        for i in range(3):
            Image.new('RGB', (100, 70), (40 + i, 90, 90)).save(tmp_path / f'{i}.png')

        def draw(*found, per_kind=8):
            results = make_results([[(CAT, BOX)], [(CAT, (0, 0, 100, 70))], []], found, tmp_path)
            return pictures.draw_errors(find_errors(results), results, per_kind)
        return draw

    def test_boxes_lie_where_they_are(self, draw):
        # A window of 1.8 x 20 pixels around the box, in the middle of a cell of 180.
        sheet = draw([(DOG, BOX, 0.9)], [(CAT, (0, 0, 100, 70), 1)], [])
        pixels = np.array(sheet).astype(int)
        true = np.abs(pixels - (0x56, 0xB4, 0xE9)).sum(-1) == 0
        found = np.abs(pixels - (0xE6, 0x9F, 0x00)).sum(-1) == 0
        cell = np.abs(pixels - (40, 90, 90)).sum(-1) == 0
        rows, columns = np.nonzero(cell)
        top, left = rows.min(), columns.min()
        rows, columns = np.nonzero(true & (np.arange(len(true)) > top)[:, None])
        # The window starts at (2, 2), 5 pixels on the sheet for each of the picture.
        assert abs(rows - top - 40).min() <= 2 and abs(rows - top - 140).min() <= 2
        assert abs(columns - left - 40).min() <= 2 and abs(columns - left - 140).min() <= 2
        assert found[top:top + 180, left:left + 180].any()

    def test_the_worst_of_each_kind(self, draw, monkeypatch):
        found = [], [], [(DOG, BOX, 0.9), (DOG, ELSEWHERE, 0.8)]
        one, both = draw(*found, per_kind=1), draw(*found, per_kind=2)
        monkeypatch.setattr(pictures, '_COLUMNS', 1)
        below = draw(*found, per_kind=2)
        assert one.width <= both.width and one.height == both.height < below.height

    def test_no_errors(self, draw):
        assert draw([(CAT, BOX, 1)], [(CAT, (0, 0, 100, 70), 1)], []).size > (50, 10)

    def test_a_missing_picture(self, draw, tmp_path):
        (tmp_path / '0.png').unlink()
        with pytest.raises(FileNotFoundError, match=r'0\.png'):
            draw([], [], [])


class TestConfusions:

    def test_each_object_and_each_detection_counts_once(self):
        found = count_detections(make_results(
            [[(CAT, BOX), (DOG, SHIFTED), (CAT, (50, 0, 90, 40), True)],
             [(CAT, BOX), (DOG, ELSEWHERE)]],
            # A duplicate of the cat; in a crowd of cats; the dog is missed.
            [[(CAT, BOX, 0.9), (CAT, BOX, 0.8), (CAT, (60, 0, 80, 20), 0.9)],
             # The cat taken for a dog, twice; the dog found; below the threshold.
             [(DOG, BOX, 0.9), (DOG, BOX, 0.7), (DOG, ELSEWHERE, 0.5), (CAT, BOX, 0.2)]]))
        assert found.counts.tolist() == [[1, 1, 0], [0, 1, 1], [1, 1, 0]]
        assert found.rank() == [(0, 1, 1), (1, 2, 1), (2, 0, 1), (2, 1, 1)]
        assert found.draw().axes[0].get_title('left') == (
            '2 of 4 objects found (50.0 %),\n2 of 5 detections right (40.0 %)')

    def test_the_right_class_comes_first(self):
        """A better detection of the wrong class does not take the object away."""
        found = count_detections(make_results([[(CAT, BOX)]], [[(DOG, BOX, 0.9), (CAT, BOX, 0.8)]]))
        assert found.counts.tolist() == [[1, 0, 0], [0, 0, 0], [0, 1, 0]]

    def test_the_figure_has_a_row_and_a_column_more(self, tmp_path):
        figure = Confusions(np.arange(9).reshape(3, 3), ('cat', 'dog'), surplus=True).draw()
        axes = figure.axes[0]
        assert [text.get_text() for text in axes.get_yticklabels()] == [
            'cat (3)', 'dog (12)', 'no object left (21)']
        assert [text.get_text() for text in axes.get_xticklabels()] == ['cat', 'dog', 'missed']
        figure.savefig(tmp_path / 'matrix.png')

    def test_a_class_that_the_dataset_has_not(self):
        with pytest.raises(ValueError, match='0.png is of class 7, but the dataset has 2 classes'):
            count_detections(make_results([[]], [[(7, BOX, 0.9)]]))
