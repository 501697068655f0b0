"""Classes of a checkpoint are those of the data, or are put in their order by name."""

import json
import shutil
from functools import partial

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.model import BaseModel
from mmengine.registry import MODELS
from torch import nn
from torch.testing import assert_close

from spartan_mm import get_model
from spartan_mm.cli import main
from spartan_mm.detection import DetInferencer
from spartan_mm.engine.class_order import put_in_order, same_classes
from spartan_mm.errors import CheckpointError
from spartan_mm.inference import Classifier, Detector
from spartan_mm.weights.forms import switch_to_deploy


@MODELS.register_module()
class OrderHead(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.num_classes = num_classes
        self.fc = nn.Linear(4, num_classes)


@MODELS.register_module()
class OrderModel(BaseModel):
    def __init__(self, head):
        super().__init__()
        self.head = MODELS.build(head)

    def forward(self, inputs, mode='tensor'):
        return self.head.fc(inputs)


def make(count):
    config = dict(type='OrderModel', head=dict(type='OrderHead', num_classes=count))
    return MODELS.build(config), config


def order(theirs, ours, match, count=None):
    """Load a checkpoint with classes for data with others; outputs before and after, and names."""
    before, _ = make(count or len(theirs))
    model, config = make(len(ours or theirs))
    checkpoint = dict(state_dict=before.state_dict(), meta=dict(dataset_meta=dict(classes=theirs)))
    checkpoint = put_in_order(model, config, checkpoint, 'a.pth', ours, 'the test data', match)
    model.load_state_dict(checkpoint['state_dict'])
    inputs = torch.rand(3, 4)
    return before(inputs), model(inputs), checkpoint['meta']['dataset_meta']['classes']


@pytest.mark.parametrize('ours, indices', [
    (('bar', 'square', 'disc'), [2, 1, 0]), (('bar', 'disc'), [2, 0]),
    (('Square', 'DISC', 'bar'), [1, 0, 2]), (('disc', 'square', 'bar'), [0, 1, 2])])
def test_outputs_follow_the_names(ours, indices):
    before, after, names = order(('disc', 'square', 'bar'), ours, 'name')
    assert_close(after, before[:, indices], rtol=0, atol=0)
    assert names == ours


def test_repeated_names_keep_their_order():
    before, after, _ = order(('crane', 'cat', 'crane'), ('cat', 'crane', 'crane'), 'name')
    assert_close(after, before[:, [1, 0, 2]], rtol=0, atol=0)


@pytest.mark.parametrize('theirs, ours, match', [
    (('disc', 'bar'), None, None), (('disc', 'bar'), ('Disc', 'BAR'), None),
    (('traffic light', 't-shirt'), ('traffic_light', 't shirt'), None),
    (('n01440764', 'n01443537'), ('tench', 'goldfish'), 'number')])
def test_outputs_stay(theirs, ours, match):
    before, after, names = order(theirs, ours, match)
    assert_close(after, before, rtol=0, atol=0)
    assert names == theirs


@pytest.mark.parametrize('theirs, ours, match, words', [
    (('a', 'b', 'c'), ('a', 'c', 'b'), None,
     r'3 classes \(a, b, c\).* has 3 \(a, c, b\), and class 1 .*--match-classes name'),
    ([*map(str, range(91))], [*map(str, range(80))], None, r'91 classes .* and class 80'),
    (('a', 'b'), ('a', 'x'), 'name', "does not know 'x'"),
    (('a', 'b'), None, 'name', 'no names in the test data'),
])
def test_other_classes_are_refused(theirs, ours, match, words):
    with pytest.raises(CheckpointError, match=words):
        order(theirs, ours, match)


def test_names_that_do_not_fit_the_outputs_match_nothing():
    with pytest.raises(CheckpointError, match='by name, for it has 3 outputs'):
        order(('a', 'b'), ('b', 'a'), 'name', count=3)


def test_a_model_with_the_classes_of_the_checkpoint_cannot_follow_fewer():
    model, config = make(3)
    checkpoint = dict(state_dict=model.state_dict(), meta=dict(CLASSES=('a', 'b', 'c')))
    with pytest.raises(CheckpointError, match=r'set model\.head\.num_classes=2'):
        put_in_order(model, config, checkpoint, 'a.pth', ('c', 'a'), 'the test data', 'name')


def test_without_names_all_are_the_same():
    assert same_classes(None, ('a', )) and same_classes(('a', ), None)


@pytest.fixture(scope='module')
def project(user_project, tmp_path_factory):
    """A detector and a classifier, the classes of their pictures also in reversed order."""
    root = tmp_path_factory.mktemp('class order') / 'project'
    shutil.copytree(user_project, root)
    content = json.loads((root / 'pictures/annotations.json').read_text())
    for task, names in (('detector', ('square', 'disc')), ('classifier', ('disc', 'square'))):
        torch.manual_seed(1)
        model = get_model(Config.fromfile(root / f'user_{task}.py'))
        torch.save(dict(meta=dict(dataset_meta=dict(classes=names)), state_dict=model.state_dict()),
                   root / f'{task}.pth')
    # What the detector finds is what there is.
    detector = Detector(str(root / 'user_detector.py'), str(root / 'detector.pth'))
    content['annotations'] = []
    for image in content['images']:
        found, = detector.detect([detector.read(root / 'pictures' / image['file_name'])])
        for box, label in zip(found.boxes.tolist(), found.labels, strict=True):
            left, top, right, bottom = box
            content['annotations'].append(dict(
                id=len(content['annotations']) + 1, image_id=image['id'], iscrowd=0,
                category_id=(3, 7)[label], bbox=[left, top, right - left, bottom - top],
                area=(right - left) * (bottom - top)))
    for name in ('annotations', 'reversed'):
        (root / f'pictures/{name}.json').write_text(json.dumps(content))
        content['categories'].reverse()
    return root


def evaluate(capfd, folder, *flags):
    status = main(['test', *map(str, flags), '--work-dir', str(folder)])
    metrics, = folder.glob('*/*.json')
    assert status == 0
    return {name: value for name, value in json.loads(metrics.read_text()).items()
            if 'time' not in name}


@pytest.mark.slow
def test_detector_on_reversed_categories(project, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(project)
    command = ['user_detector.py', 'detector.pth']
    other = [*command, '--cfg-options', 'test_evaluator.ann_file=pictures/reversed.json',
             'test_dataloader.dataset.ann_file=reversed.json',
             "test_dataloader.dataset.metainfo.classes=('disc','square')"]
    expected = evaluate(capfd, tmp_path / '0', *command)
    with pytest.raises(SystemExit, match=r'error: the classes of checkpoint detector\.pth .*2 '
                                         r'classes \(square, disc\).* 2 \(disc, square\).*--match'):
        main(['test', *other])
    assert evaluate(capfd, tmp_path / '1', *other, '--match-classes', 'name') == expected
    wrong = evaluate(capfd, tmp_path / '2', *other, '--match-classes', 'number')
    assert expected['coco/bbox_mAP'] > 0.9 > wrong['coco/bbox_mAP'] + 0.3


@pytest.mark.slow
def test_classifier_of_reversed_outputs(project, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(project)
    checkpoint = torch.load('classifier.pth')
    checkpoint['meta']['dataset_meta']['classes'] = ('square', 'disc')
    for name in ('head.fc.weight', 'head.fc.bias'):
        checkpoint['state_dict'][name] = checkpoint['state_dict'][name].flip(0)
    torch.save(checkpoint, tmp_path / 'reversed.pth')
    expected = evaluate(capfd, tmp_path / '0', 'user_classifier.py', 'classifier.pth')
    other = ['user_classifier.py', str(tmp_path / 'reversed.pth')]
    with pytest.raises(SystemExit, match=r'\(square, disc\).* 2 \(disc, square\)'):
        main(['test', *other])
    assert evaluate(capfd, tmp_path / '1', *other, '--match-classes', 'name') == expected


@pytest.mark.slow
def test_inference(project, tmp_path, monkeypatch):
    monkeypatch.chdir(project)
    image = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    config = Config.fromfile('user_detector.py')
    other = Config.fromfile('user_detector.py')
    other.merge_from_dict({'test_dataloader.dataset.metainfo.classes': ('disc', 'square')})

    def name(classes, labels):
        return [classes[label] for label in labels]

    expected = Detector(config, 'detector.pth')
    found, = expected.detect([image])
    for kind in (Detector, get_model, partial(DetInferencer, device='cpu')):
        with pytest.raises(CheckpointError, match=r"config's test dataset has 2 \(disc, square"):
            kind(other, 'detector.pth')
        ordered = kind(other, 'detector.pth', match_classes='name')
        inner = ordered if hasattr(ordered, 'dataset_meta') else ordered.model
        classes = getattr(ordered, 'classes', None) or inner.dataset_meta['classes']
        assert tuple(classes) == ('disc', 'square')
        for key, value in expected.model.state_dict().items():
            if 'cls_branches' in key:
                value = value.flip(0)
            elif 'label_embedding' in key:
                value = value[[1, 0, 2]]
            assert_close(inner.state_dict()[key], value, rtol=0, atol=0)

    deployed = switch_to_deploy(get_model(config, 'detector.pth'))
    torch.save(dict(meta=dict(deploy=True, dataset_meta=deployed.dataset_meta),
                    state_dict=deployed.state_dict()), 'deployed.pth')
    for path in ('detector.pth', 'deployed.pth'):
        matched = Detector(other, path, match_classes='name')
        again, = matched.detect([image])
        assert name(matched.classes, again.labels) == name(expected.classes, found.labels)
    # The names stay the checkpoint's, which are true to its outputs.
    assert Detector(other, 'detector.pth', match_classes='number').classes == ('square', 'disc')

    config = Config.fromfile('user_classifier.py')
    config.merge_from_dict({'test_dataloader.dataset.metainfo': dict(classes=['square', 'disc'])})
    with pytest.raises(CheckpointError, match=r'2 classes \(disc, square\)'):
        Classifier(config, 'classifier.pth')
    scores = [{model.classes[label]: score for label, score in zip(found.labels, found.scores,
                                                                  strict=True)}
              for model in (Classifier('user_classifier.py', 'classifier.pth'),
                            Classifier(config, 'classifier.pth', match_classes='name'))
              for found in model.classify([image])]
    assert_close(*scores)
