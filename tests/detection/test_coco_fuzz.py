"""Damaged annotation files: an error that names the entry, or exactly what the file says."""

import copy
import json
import math
import re
from contextlib import redirect_stdout

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from spartan_mm.datasets.check import check_dataset
from spartan_mm.datasets.data_errors import DataError
from spartan_mm.detection import CheckedCocoDataset, CheckedCocoMetric

CONTENT = dict(
    info=dict(description='three pictures'),
    images=[dict(id=7, file_name='cat.jpg', width=64, height=48),
            dict(id=3, file_name='dog.jpg', width=48, height=64),
            dict(id=9, file_name='none.jpg', width=40, height=40)],
    annotations=[
        dict(id=1, image_id=7, category_id=30, bbox=[1, 2, 30, 20], area=600, iscrowd=0),
        dict(id=2, image_id=3, category_id=5, bbox=[0, 0, 48, 64], area=100.5, iscrowd=1),
        dict(id=3, image_id=7, category_id=8, bbox=[5.5, 6, 10, 10], area=100, iscrowd=0,
             segmentation=[[5, 6, 15, 6, 15, 16]]),
        dict(id=4, image_id=3, category_id=5, bbox=[10, 10, 60, 20], area=760, iscrowd=0),
        dict(id=5, image_id=3, category_id=30, bbox=[2, 40, 0.5, 9], area=4.5, iscrowd=0,
             ignore=0)],
    categories=[dict(id=5, name='dog'), dict(id=30, name='cat'), dict(id=8, name='bird')])

STRANGE = (None, True, False, 0, 1, -1, 7, 30, 1.5, -0.5, 1e300, float('inf'), float('nan'),
           2**63, 10**400, '', 'x', '7', 'cat.jpg', 'dog', 'a\0b', [], {}, [1], [1, 2, 3, 4],
           [0, 0, -5, 5], {'id': 1}, [[]])


def find_paths(value, path=()):
    """All places in nested dicts and lists."""
    if path:
        yield path
    items = (value.items() if isinstance(value, dict) else
             enumerate(value) if isinstance(value, list) else ())
    for key, item in items:
        yield from find_paths(item, (*path, key))


@st.composite
def damaged(draw):
    """An annotation file with a few faults, as text."""
    content = copy.deepcopy(CONTENT)
    for _ in range(draw(st.integers(1, 3))):
        path = draw(st.sampled_from(list(find_paths(content)) or [()]))
        if not path:
            break
        *above, key = path
        parent = content
        for step in above:
            parent = parent[step]
        action = draw(st.sampled_from(['replace', 'replace', 'replace', 'delete', 'double']))
        if action == 'replace':
            parent[key] = copy.deepcopy(draw(st.sampled_from(STRANGE)))
        elif action == 'delete':
            del parent[key]
        elif isinstance(parent, list):
            parent.append(copy.deepcopy(parent[key]))
    text = json.dumps(content)
    cut = draw(st.sampled_from([None] * 19 + [0.3]))
    return text if cut is None else text[:int(cut * len(text))]


def read_plainly(content):
    """What a legal file says, in the simplest words: boxes, label and whether a crowd."""
    labels = {category['id']: label for label, category in enumerate(content['categories'])}
    images = []
    for image in content['images']:
        objects = []
        for item in content.get('annotations', []):
            if item['image_id'] != image['id'] or item.get('ignore', 0):
                continue
            x, y, width, height = item['bbox']
            if not all(map(math.isfinite, (x, y, width, height, x + width, y + height,
                                           item['area']))):
                continue
            left, right = (min(max(value, 0), image['width']) for value in (x, x + width))
            top, bottom = (min(max(value, 0), image['height']) for value in (y, y + height))
            if right - left < 1 or bottom - top < 1 or width < 0 or height < 0 or not (
                    item['area'] > 0):
                continue
            objects.append(([left, top, right, bottom], labels[item['category_id']],
                            int(item.get('iscrowd', 0))))
        images.append((image['id'], objects))
    return images


def detect(content):
    """Detections: some right, some a little beside, one wrong."""
    predictions = []
    for image in content['images']:
        boxes, labels = [[1., 1., 5., 5.]], [0]
        for number, item in enumerate(content.get('annotations', [])):
            if item['image_id'] == image['id']:
                x, y, width, height = item['bbox']
                boxes.append([x + number, y, x + width + number, y + height])
                labels.append(number % len(content['categories']))
        predictions.append(dict(
            img_id=image['id'], ori_shape=(image['height'], image['width']),
            pred_instances=dict(bboxes=torch.tensor(boxes, dtype=torch.float64),
                                labels=torch.tensor(labels),
                                scores=torch.linspace(0.9, 0.1, len(boxes)))))
    return predictions


def evaluate_plainly(content):
    """COCO's own code on the file, its annotations numbered from 1."""
    def index(annotations):
        api = COCO()
        api.dataset = dict(content, annotations=[dict(item, id=number) for number, item
                                                 in enumerate(annotations, 1)])
        api.createIndex()
        return api

    found = []
    for sample in detect(content):
        objects = sample['pred_instances']
        for box, label, score in zip(objects['bboxes'].tolist(), objects['labels'].tolist(),
                                     objects['scores'].tolist(), strict=True):
            width, height = box[2] - box[0], box[3] - box[1]
            found.append(dict(image_id=sample['img_id'], bbox=[*box[:2], width, height],
                              area=width * height, score=score, iscrowd=0,
                              category_id=content['categories'][label]['id']))
    with redirect_stdout(None):
        evaluation = COCOeval(index(content.get('annotations', [])), index(found), 'bbox')
        evaluation.params.maxDets = [1, 10, 100]
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation.stats


NAMES_AN_ENTRY = re.compile(r'(image|annotation|category) (number \d+ \(from 0\)|\S+)'
                            r'|has no |holds a |is a .*, but must be a list|is empty: no '
                            r'|not a JSON file|there is no annotation|none of the ')

FEW = settings(max_examples=250, derandomize=True, deadline=None, database=None,
               suppress_health_check=list(HealthCheck))


@pytest.fixture(scope='module')
def path(tmp_path_factory):
    return tmp_path_factory.mktemp('fuzz') / 'set.json'


def check_message(error, path):
    message = str(error)
    assert message.startswith(f'{path}: ') and '\n' not in message and len(message) < 2000
    assert NAMES_AN_ENTRY.search(message.removeprefix(str(path))), message


@pytest.mark.slow
@FEW
@given(text=damaged(), invalid_boxes=st.sampled_from(['error', 'drop']))
def test_dataset_and_check(path, text, invalid_boxes):
    path.write_text(text)
    config = dict(type='CheckedCocoDataset', ann_file=str(path), invalid_boxes=invalid_boxes)
    report = check_dataset(config, 'train')
    refused = {finding.kind for finding in report.findings if finding.level == 'error'}
    try:
        dataset = CheckedCocoDataset(ann_file=str(path), invalid_boxes=invalid_boxes,
                                     serialize_data=False)
    except DataError as error:
        check_message(error, path)
        assert any(str(error) == finding.message for finding in report.findings)
        return
    # The images are not there; nothing else is wrong.
    assert refused == {'missing images'}
    expected = read_plainly(json.loads(text))
    assert [info['img_id'] for info in dataset.data_list] == [image for image, _ in expected]
    for info, (_, objects) in zip(dataset.data_list, expected, strict=True):
        found = [(item['bbox'], item['bbox_label'], item['ignore_flag'])
                 for item in info['instances']]
        assert [item[1:] for item in found] == [item[1:] for item in objects]
        for (box, *_), (expected_box, *_) in zip(found, objects, strict=True):
            np.testing.assert_allclose(box, expected_box)


@pytest.mark.slow
@settings(FEW, max_examples=150)
@given(text=damaged())
def test_evaluation(path, text):
    path.write_text(text)
    try:
        metric = CheckedCocoMetric(ann_file=str(path), proposal_nums=(1, 10, 100))
    except DataError as error:
        check_message(error, path)
        return
    content = json.loads(text)
    metric.dataset_meta = dict(classes=[category['name'] for category in content['categories']])
    metric.process({}, detect(content))
    with redirect_stdout(None):
        found = metric.evaluate(len(content['images']))
    if not content.get('annotations'):
        return
    names = ('mAP', 'mAP_50', 'mAP_75', 'mAP_s', 'mAP_m', 'mAP_l')
    stats = evaluate_plainly(content)
    np.testing.assert_allclose([found[f'coco/bbox_{name}'] for name in names],
                               stats[:6].round(3), atol=1e-9)


def test_the_files_that_are_damaged_start_whole(path):
    path.write_text(json.dumps(CONTENT))
    dataset = CheckedCocoDataset(ann_file=str(path), serialize_data=False)
    assert sum(len(info['instances']) for info in dataset.data_list) == 4
    assert evaluate_plainly(CONTENT)[0] > 0.05
