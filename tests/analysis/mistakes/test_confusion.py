"""Predictions of a classifier are counted right, and drawn."""

import numpy as np
import pytest
import torch
from mmpretrain.structures import DataSample
from PIL import Image

from spartan_mm.analysis.mistakes.confusion import count_confusions, draw_confusion
from spartan_mm.analysis.mistakes.errors import (
    describe_mistake,
    find_mistakes,
    summarize_mistakes,
)
from spartan_mm.analysis.mistakes.pictures import draw_mistakes
from spartan_mm.analysis.mistakes.predictions import Outcomes, collect_outcomes

CLASSES = ('cat', 'dog', 'a long name, with a second one')
# The class that is predicted, how sure, and the class that it is.
CASES = [(0, 0.9, 0), (1, 0.8, 0), (1, 0.6, 1), (2, 0.95, 1), (0, 0.5, 2), (1, 0.7, 1)]


def make_sample(index, predicted, score, truth, folder='.'):
    scores = torch.full((3, ), (1 - score) / 2)
    scores[predicted] = score
    return DataSample(metainfo=dict(img_path=f'{folder}/{index}.png')).set_gt_label(
        truth).set_pred_score(scores).set_pred_label(predicted)


@pytest.fixture
def outcomes(tmp_path):
    for index in range(len(CASES)):
        Image.new('RGB', (8, 8), (40 * index, 0, 0)).save(tmp_path / f'{index}.png')
    return collect_outcomes([make_sample(index, *case, tmp_path)
                             for index, case in enumerate(CASES)])


def test_counts(outcomes):
    assert count_confusions(outcomes).tolist() == [[1, 1, 0], [0, 2, 1], [1, 0, 0]]


def test_matrix(outcomes):
    counts = count_confusions(outcomes)
    axes = draw_confusion(counts, CLASSES).axes[0]
    assert axes.get_title(loc='left') == '3 of 6 right (50.00 %)'
    shares = np.array(axes.images[0].get_array())
    np.testing.assert_allclose(shares, [[1 / 2, 1 / 2, 0], [0, 2 / 3, 1 / 3], [1, 0, 0]])
    written = {text.get_position()[::-1]: int(text.get_text()) for text in axes.texts}
    assert written == {(row, column): count for (row, column), count in np.ndenumerate(counts)
                       if count}
    assert [label.get_text() for label in axes.get_yticklabels()] == [
        'cat (2)', 'dog (3)', 'a long name, with a second one (1)']


@pytest.mark.parametrize('num_classes, written', [(30, True), (100, False)])
def test_matrix_of_many_classes(num_classes, written, tmp_path):
    figure = draw_confusion(np.eye(num_classes, dtype=int), [str(i) for i in range(num_classes)])
    assert bool(figure.axes[0].texts) == written
    figure.savefig(tmp_path / 'matrix.png')


def test_a_class_without_pictures():
    figure = draw_confusion(np.array([[0, 0], [1, 2]]), ('a', 'b'))
    assert np.isfinite(np.array(figure.axes[0].images[0].get_array())).all()


def test_another_number_of_names():
    with pytest.raises(ValueError, match='3 classes in the counts, but 2 names'):
        draw_confusion(np.eye(3), ('a', 'b'))


def test_mistakes_are_sorted_by_confidence(outcomes):
    assert find_mistakes(outcomes).tolist() == [3, 1, 4]
    assert [describe_mistake(outcomes, index, CLASSES) for index in (3, 1, 4)] == [
        ('is dog (0.03)', 'taken for a long name (0.95)'),
        ('is cat (0.10)', 'taken for dog (0.80)'),
        ('is a long name (0.25)', 'taken for cat (0.50)')]


@pytest.mark.parametrize('limit, order', [(48, 'the most confident first'),
                                          (3, 'the most confident first'),
                                          (2, 'the 2 most confident')])
def test_summary(outcomes, limit, order):
    assert summarize_mistakes(outcomes, limit) == f'3 of 6 misclassified, {order}'


def reds(sheet):
    """The pictures on a sheet, left to right and down, by their colour."""
    pixels = np.array(sheet)
    rows, columns = np.nonzero((pixels[..., 0] % 40 == 0) & (pixels[..., 1:] == 0).all(-1))
    return list(dict.fromkeys(pixels[rows, columns, 0].tolist()))


def test_sheet(outcomes):
    sheet = draw_mistakes(outcomes, CLASSES)
    # Each pixel of the small pictures is a square, all of one colour.
    assert reds(sheet) == [120, 40, 160]
    assert (np.array(sheet)[..., 0] == 120).sum() >= 180 * 180
    fewer = draw_mistakes(outcomes, CLASSES, limit=2, columns=1)
    assert reds(fewer) == [120, 40]
    assert fewer.height > sheet.height + 180


def test_no_mistakes():
    outcomes = Outcomes(('a.png', ), np.array([1]), np.array([[0.1, 0.9]]))
    assert summarize_mistakes(outcomes, 48) == 'None of 1 pictures is misclassified'
    sheet = draw_mistakes(outcomes, ('a', 'b'))
    assert sheet.height < 100 and (np.array(sheet) != 255).any()


def test_a_missing_picture(outcomes, tmp_path):
    (tmp_path / '3.png').unlink()
    with pytest.raises(FileNotFoundError, match=r'3\.png'):
        draw_mistakes(outcomes, CLASSES)
