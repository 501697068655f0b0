"""Pictures show annotations and predictions where they are, and what they are."""

import numpy as np
import pytest
from PIL import Image

from spartan_mm import drawing
from spartan_mm.analysis.mistakes import pictures as module
from spartan_mm.analysis.mistakes.pictures import draw_found, draw_gallery, draw_truth
from spartan_mm.analysis.mistakes.predictions import Truth, read_truth, spread
from spartan_mm.datasets import make_digits
from spartan_mm.detection import CheckedCocoDataset
from spartan_mm.inference import Detections

CLASSES = ('cat', 'dog')
GREY = (90, 90, 90)


def make_image(width=80, height=60, colour=GREY):
    return Image.new('RGB', (width, height), colour)


def make_found(*boxes, labels=None, scores=None):
    return Detections(np.array(boxes, dtype=np.float32).reshape(-1, 4),
                      np.array(labels or [0] * len(boxes), dtype=int),
                      np.array(scores or [0.9] * len(boxes), dtype=np.float32))


class Pictures:
    """A dataset of files."""

    metainfo = dict(classes=CLASSES)

    def __init__(self, folder, images):
        self.infos = []
        for i, (image, instances) in enumerate(images):
            path = folder / f'{i}.png'
            image.save(path)
            self.infos.append(dict(img_id=10 + i, img_path=str(path), instances=instances))

    def __len__(self):
        return len(self.infos)

    def get_data_info(self, idx):
        return self.infos[idx]


def test_boxes_are_drawn_in_place_and_in_the_colour_of_their_class():
    truth = Truth(np.array([[10., 20, 40, 50], [50, 30, 75, 55]]), np.array([0, 1]))
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
    truth = draw_truth(make_image(), Truth(np.array([box]), np.array([1])), CLASSES, 160)
    found = draw_found(make_image(), make_found(box, labels=[1]), CLASSES, 160)
    where = slice(60, 101), slice(20, 81)  # beside the labels, which say different things
    assert np.array_equal(np.array(truth)[where], np.array(found)[where])


def test_crowds_are_hatched_in_grey():
    mask = np.zeros((60, 80), dtype=bool)
    mask[30:50, 20:60] = True
    truth = Truth(np.zeros((0, 4)), np.zeros(0, dtype=int), [(0, mask)])
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


@pytest.fixture
def pictures(tmp_path):
    crowd = dict(bbox=[20, 10, 70, 30], bbox_label=1, ignore_flag=1)
    cat = dict(bbox=[10, 20, 40, 50], bbox_label=0, ignore_flag=0)
    return Pictures(tmp_path, [(make_image(), [cat, crowd]),
                               (make_image(60, 80, (200, 30, 30)), []),
                               (make_image(2000, 1000, (30, 30, 200)), [cat])])


def test_sheet(pictures):
    predictions = {10: make_found((10, 20, 40, 50), (0, 0, 5, 5), scores=[0.9, 0.1]),
                   11: make_found(), 12: make_found((10, 20, 1900, 950), labels=[1])}
    one = draw_gallery(pictures, predictions, [0], longer_side=160)
    assert one.mode == 'RGB' and one.width > 2 * 160
    three = draw_gallery(pictures, predictions, [0, 1, 2], longer_side=160)
    assert three.width > 2 * one.width - 50 and three.height > one.height
    colours = {colour for _, colour in three.getcolors(1 << 24)}
    assert {GREY, (200, 30, 30), (30, 30, 200)} <= colours
    assert drawing.class_colour(0) in colours and drawing.class_colour(1) in colours


def test_the_threshold_decides_what_is_drawn(pictures):
    predictions = {11: make_found((10, 20, 40, 50), scores=[0.4])}
    for threshold, drawn in ((0.3, True), (0.5, False)):
        sheet = draw_gallery(pictures, predictions, [1], threshold, longer_side=160)
        colours = {colour for _, colour in sheet.getcolors(1 << 24)}
        assert (drawing.class_colour(0) in colours) == drawn


def test_a_picture_is_turned_as_its_camera_says(pictures):
    path = pictures.infos[0]['img_path']
    turned = Image.Exif()
    turned[0x0112] = 6
    make_image(60, 80).save(path, exif=turned)
    sheet = draw_gallery(pictures, {10: make_found()}, [0], longer_side=160)
    rows = (np.array(sheet) == GREY).all(-1).any(1).sum()
    assert rows == 120


def test_errors_name_the_culprit(pictures):
    with pytest.raises(ValueError, match='no prediction for image 10 .*0.png'):
        draw_gallery(pictures, {11: make_found()}, [1, 0])
    with pytest.raises(ValueError, match='indices is empty'):
        draw_gallery(pictures, {}, [])


def test_a_dataset_of_mmdet(tmp_path):
    paths = make_digits(tmp_path / 'digits', 1, 12, image_size=(160, 128), progress=False)
    dataset = CheckedCocoDataset(ann_file=str(paths.val_annotations), test_mode=True,
                                 data_prefix=dict(img=str(paths.val_images)), pipeline=[])
    truths = [read_truth(dataset.get_data_info(i), (128, 160)) for i in range(len(dataset))]
    assert sum(len(truth.boxes) for truth in truths) > 12
    predictions = {dataset.get_data_info(i)['img_id']: make_found(*truth.boxes)
                   for i, truth in enumerate(truths)}
    sheet = draw_gallery(dataset, predictions, spread(len(dataset), 3), longer_side=160)
    assert sheet.width > 4 * 128
