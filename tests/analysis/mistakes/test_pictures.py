"""Pictures show annotations and predictions where they are, and what they are."""

import numpy as np
import pytest
from PIL import Image

from spartan_mm import drawing
from spartan_mm.analysis.mistakes import pictures as module
from spartan_mm.analysis.mistakes.pictures import draw_found, draw_pair, draw_truth
from spartan_mm.analysis.mistakes.predictions import DetectorResults, Truth, read_truth
from spartan_mm.datasets import make_digits
from spartan_mm.detection import CheckedCocoDataset

from .results import make_found, make_results

CLASSES = ('cat', 'dog')
GREY = (90, 90, 90)


def make_image(width=80, height=60, colour=GREY):
    return Image.new('RGB', (width, height), colour)


def test_boxes_are_drawn_in_place_and_in_the_colour_of_their_class():
    truth = Truth(np.array([[10., 20, 40, 50], [50, 30, 75, 55]]), np.arange(2), np.zeros(2, bool))
    pixels = np.array(draw_truth(make_image(), truth, CLASSES, longer_side=160))
    assert pixels.shape == (120, 160, 3)
    for (x1, y1, x2, y2), label in ((2 * truth.boxes[0], 0), (2 * truth.boxes[1], 1)):
        middle = int((x1 + x2) / 2), int((y1 + y2) / 2)
        for x, y in ((x1, middle[1]), (x2, middle[1]), (middle[0], y2)):
            assert tuple(pixels[int(y), int(x)]) == drawing.class_colour(label)
        assert tuple(pixels[middle[::-1]]) == GREY
    assert tuple(pixels[-1, 0]) == GREY


def test_a_class_has_the_same_colour_on_both_sides():
    box = (10, 25, 40, 50)
    truth = Truth(np.array([box]), np.array([1]), np.array([False]))
    truth = draw_truth(make_image(), truth, CLASSES, 160)
    found = draw_found(make_image(), make_found((1, box, 0.9)), CLASSES, 160)
    where = slice(60, 101), slice(20, 81)  # beside the labels, which say different things
    assert np.array_equal(np.array(truth)[where], np.array(found)[where])


def test_crowds_are_hatched_in_grey():
    truth = Truth(np.array([[20., 30, 60, 50]]), np.array([0]), np.array([True]))
    pixels = np.array(draw_truth(make_image(colour=(0, 200, 0)), truth, CLASSES, 160))
    hatched = (pixels == module._CROWD).all(-1)
    assert 0.2 < hatched[60:100, 40:120].mean() < 0.5
    untouched = (pixels == (0, 200, 0)).all(-1)
    assert untouched[102:].all()
    # Below the label.
    assert untouched[62:, :38].all() and untouched[62:, 122:].all()


def test_labels_avoid_each_other():
    boxes = np.array([[50., 60, 150, 160]] * 4)
    size, labels = np.array([60., 18]), []
    for box in boxes:
        labels.append(drawing._place_label(box, size, np.array([300, 300]), labels, boxes))
    shared = drawing.common_areas(np.array(labels), np.array(labels))
    assert (shared == np.diag(np.diag(shared))).all()


@pytest.mark.parametrize('box', [(0, 0, 10, 10), (290, 290, 300, 300), (-20, -30, 500, 400)])
def test_labels_stay_inside(box):
    tag = drawing._place_label(np.array(box), np.array([60, 18]), np.array([300, 300]), [],
                             np.array([box]))
    assert (tag >= 0).all() and (tag <= 300).all()
    assert tag[2:].tolist() == (tag[:2] + [60, 18]).tolist()


CAT = 0, (10, 20, 40, 50)


@pytest.fixture
def draw(tmp_path):
    """Draws pairs of three pictures: a cat and a crowd, nothing, a cat in a large one."""
    for index, image in enumerate([make_image(), make_image(60, 80, (200, 30, 30)),
                                   make_image(2000, 1000, (30, 30, 200))]):
        image.save(tmp_path / f'{index}.png')
    objects = [CAT, (1, (20, 10, 70, 30), True)], [], [CAT]

    def draw(index, *found, threshold=0.3):
        return draw_pair(make_results(objects, found, tmp_path), index, threshold, 160)
    return draw


def colours_of(image):
    return {colour for _, colour in image.getcolors(1 << 24)}


@pytest.mark.parametrize('index, background, size, captions, classes', [
    (0, GREY, (160, 120), ('1 object, 1 crowd', '1 object'), [0, 0]),
    (1, (200, 30, 30), (120, 160), ('0 objects', '0 objects'), [None, None]),
    (2, (30, 30, 200), (160, 80), ('1 object', '1 object'), [0, 1]),
])
def test_pairs(index, background, size, captions, classes, draw):
    name, panels = draw(index, [(*CAT, 0.9), (0, (0, 0, 5, 5), 0.1)], [],
                        [(1, (10, 20, 1900, 950), 0.9)])
    assert name == f'{index}.png'
    for (image, caption), verb, said, label in zip(
            panels, ('annotated', 'detected'), captions, classes, strict=True):
        assert (image.mode, image.size, caption) == ('RGB', size, f'{verb}: {said}')
        colours = colours_of(image)
        assert background in colours
        assert label is None or drawing.class_colour(label) in colours


def test_the_threshold_decides_what_is_drawn(draw):
    for threshold, drawn in ((0.3, True), (0.5, False)):
        _, (_, (image, _)) = draw(1, [], [(*CAT, 0.4)], threshold=threshold)
        assert (drawing.class_colour(0) in colours_of(image)) == drawn


def test_a_picture_is_turned_as_its_camera_says(draw, tmp_path):
    turned = Image.Exif()
    turned[0x0112] = 6
    make_image(60, 80).save(tmp_path / '0.png', exif=turned)
    _, panels = draw(0, [])
    assert {image.size for image, _ in panels} == {(160, 120)}


def test_errors_name_the_culprit(draw):
    with pytest.raises(ValueError, match='no prediction for image 1 .*1.png'):
        draw(1, [])


def test_a_dataset_of_mmdet(tmp_path):
    paths = make_digits(tmp_path / 'digits', 1, 3, image_size=(160, 128), progress=False)
    dataset = CheckedCocoDataset(ann_file=str(paths.val_annotations), test_mode=True,
                                 data_prefix=dict(img=str(paths.val_images)), pipeline=[])
    infos = [dataset.get_data_info(i) for i in range(len(dataset))]
    truths = [read_truth(info) for info in infos]
    assert sum(len(truth.boxes) for truth in truths) > 3
    results = DetectorResults(dataset, {
        info['img_id']: make_found(*((0, box, 0.9) for box in truth.boxes))
        for info, truth in zip(infos, truths, strict=True)})
    name, panels = draw_pair(results, 0, 0.3, 160)
    assert name.endswith('.jpg') and {max(image.size) for image, _ in panels} == {160}
