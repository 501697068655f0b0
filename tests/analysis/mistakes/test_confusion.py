"""Predictions of a classifier are counted right, and drawn."""

import numpy as np
import pytest
from PIL import Image

from spartan_mm.analysis.mistakes import pictures
from spartan_mm.analysis.mistakes.confusion import Confusions, count_confusions, measure_tops
from spartan_mm.analysis.mistakes.errors import (
    describe_mistake,
    find_mistakes,
    summarize_mistakes,
)
from spartan_mm.analysis.mistakes.predictions import ClassifierResults

CLASSES = ('cat', 'dog', 'a long name, with a second one')
# The class that is predicted, how sure, and the class that it is.
CASES = [(0, 0.9, 0), (1, 0.8, 0), (1, 0.6, 1), (2, 0.95, 1), (0, 0.5, 2), (1, 0.7, 1)]


@pytest.fixture
def results(tmp_path):
    scores = []
    for index, (predicted, score, _) in enumerate(CASES):
        Image.new('RGB', (8, 8), (40 * index, 0, 0)).save(tmp_path / f'{index}.png')
        scores.append([score if label == predicted else (1 - score) / 2 for label in range(3)])
    return ClassifierResults(tuple(str(tmp_path / f'{index}.png') for index in range(len(CASES))),
                             np.array([truth for *_, truth in CASES]), np.array(scores), CLASSES)


def test_counts_and_matrix(results):
    found = count_confusions(results)
    assert found.counts.tolist() == [[1, 1, 0], [0, 2, 1], [1, 0, 0]]
    axes = found.draw().axes[0]
    assert axes.get_title(loc='left') == '3 of 6 right (50.00 %)'
    shares = np.array(axes.images[0].get_array())
    np.testing.assert_allclose(shares, [[1 / 2, 1 / 2, 0], [0, 2 / 3, 1 / 3], [1, 0, 0]])
    written = {text.get_position()[::-1]: int(text.get_text()) for text in axes.texts}
    assert written == {place: count for place, count in np.ndenumerate(found.counts) if count}
    assert [label.get_text() for label in axes.get_yticklabels()] == [
        'cat (2)', 'dog (3)', 'a long name, with a second one (1)']


@pytest.mark.parametrize('num_classes, written, named', [
    (30, True, True), (31, False, True), (101, False, False)])
def test_matrix_of_many_classes(num_classes, written, named):
    names = tuple(map(str, range(num_classes)))
    axes = Confusions(np.eye(num_classes, dtype=int), names).draw().axes[0]
    assert bool(axes.texts) == written
    assert bool(axes.get_xticklabels()) == bool(axes.get_yticklabels()) == named


def test_a_class_without_pictures():
    figure = Confusions(np.array([[0, 0], [1, 2]]), ('a', 'b')).draw()
    assert np.isfinite(np.array(figure.axes[0].images[0].get_array())).all()


def test_top_5():
    scores = np.array([[0.1, 0.2, 0.3, 0.4, 0.5, 0.6], [0.5] * 6])
    # Of equal scores, the class with the lower index comes first.
    for truths, expected in (((5, 0), (1., 1.)), ((1, 1), (0., 1.)), ((0, 5), (0., 0.))):
        results = ClassifierResults(('a', 'b'), np.array(truths), scores, tuple('abcdef'))
        assert measure_tops(results) == dict(zip(('top-1', 'top-5'), expected, strict=True))


def test_mistakes_are_sorted_by_confidence(results):
    assert find_mistakes(results).tolist() == [3, 1, 4]
    assert [describe_mistake(results, index) for index in (3, 1, 4)] == [
        ('is dog (0.03)', 'taken for a long name (0.95)'),
        ('is cat (0.10)', 'taken for dog (0.80)'),
        ('is a long name (0.25)', 'taken for cat (0.50)')]


@pytest.mark.parametrize('limit, order', [(48, 'the most confident first'),
                                          (3, 'the most confident first'),
                                          (2, 'the 2 most confident')])
def test_summary(results, limit, order):
    assert summarize_mistakes(results, limit) == f'3 of 6 misclassified, {order}'


def reds(sheet):
    """The pictures on a sheet, left to right and down, by their colour."""
    pixels = np.array(sheet)
    rows, columns = np.nonzero((pixels[..., 0] % 40 == 0) & (pixels[..., 1:] == 0).all(-1))
    return list(dict.fromkeys(pixels[rows, columns, 0].tolist()))


def test_sheet(results, monkeypatch):
    sheet = pictures.draw_mistakes(results)
    # Each pixel of the small pictures is a square, all of one colour.
    assert reds(sheet) == [120, 40, 160]
    assert (np.array(sheet)[..., 0] == 120).sum() >= 180 * 180
    monkeypatch.setattr(pictures, '_COLUMNS', 1)
    fewer = pictures.draw_mistakes(results, limit=2)
    assert reds(fewer) == [120, 40]
    assert fewer.height > sheet.height + 180


def test_no_mistakes():
    results = ClassifierResults(('a.png', ), np.array([1]), np.array([[0.1, 0.9]]), ('a', 'b'))
    assert summarize_mistakes(results, 48) == 'None of 1 pictures is misclassified'
    sheet = pictures.draw_mistakes(results)
    assert sheet.height < 100 and (np.array(sheet) != 255).any()


def test_a_missing_picture(results, tmp_path):
    (tmp_path / '3.png').unlink()
    with pytest.raises(FileNotFoundError, match=r'3\.png'):
        pictures.draw_mistakes(results)
