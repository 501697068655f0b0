"""Class activation maps, where they are known in closed form, and of classifiers and detectors."""

import copy
import json
import re

import cv2
import numpy as np
import pytest
import torch
from matplotlib import colormaps
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope
from torch import nn

from spartan_mm.analysis.look_inside.class_activation import (
    METHODS,
    Explainer,
    Explanation,
    draw_grid,
    draw_overlay,
    explain_images,
    find_class,
    load_explained,
    overlay,
)
from spartan_mm.analysis.look_inside.layers import LayerError
from spartan_mm.errors import UsageError
from spartan_mm.inference import Classification, Classifier, Detections
from spartan_mm.weights.forms import switch_to_deploy
from spartan_mm.zoo import UnknownModelError

pytest.importorskip('pytorch_grad_cam', reason='grad-cam is not installed')

RED, GREEN = (40, 60), (200, 220)  # rows and columns of two squares' corners
SIDE = 300


class TwoColours(nn.Module):
    """Tells red from green: a channel for each, their averages, and the differences of these."""

    def __init__(self):
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(3, 2, 1, bias=False), nn.ReLU(inplace=True))
        self.head = nn.Linear(2, 2, bias=False)
        with torch.no_grad():
            # From blue, green and red.
            self.backbone[0].weight.copy_(
                torch.tensor([[0., 0., 1.], [0., 1., 0.]])[..., None, None] / 255)
            self.head.weight.copy_(torch.tensor([[2., -1.], [-1., 1.]]))
        self.requires_grad_(False)

    def data_preprocessor(self, data, training):
        return dict(inputs=torch.stack(data['inputs']).float())

    def forward(self, images, mode):
        return self.head(self.backbone(images).mean((2, 3)))


class TwoColourClassifier(Classifier):
    """A classifier without a config."""

    def __init__(self):
        self.model, self.classes = TwoColours().eval(), ('red', 'green')

    def collate(self, images):
        return dict(inputs=[torch.from_numpy(image.transpose(2, 0, 1)) for image in images])

    def classify(self, images):
        return [Classification(np.array([0, 1]), np.array([0.75, 0.25]))]


@pytest.fixture
def squares():
    """A bright red square and a green one, which is half as bright."""
    image = np.zeros((SIDE, SIDE, 3), np.uint8)
    image[RED[0]:RED[0] + 50, RED[1]:RED[1] + 50, 2] = 240
    image[GREEN[0]:GREEN[0] + 50, GREEN[1]:GREEN[1] + 50, 1] = 120
    return image


def square(corner, value=1.):
    mask = np.zeros((SIDE, SIDE), np.float32)
    mask[corner[0]:corner[0] + 50, corner[1]:corner[1] + 50] = value
    return mask


class TestClosedForm:
    """Gradients are the weights of the head, divided by the number of positions."""

    @pytest.mark.parametrize('label, expected', [(0, square(RED)), (1, square(GREEN))])
    @pytest.mark.parametrize('method', ['gradcam', 'hirescam', 'xgradcam', 'layercam'])
    def test_one_class(self, squares, method, label, expected):
        """What speaks against the class is left out, be it as bright."""
        explanation = Explainer(TwoColourClassifier(), method=method).explain(squares, label)
        torch.testing.assert_close(explanation.map, expected)
        assert (explanation.picture == squares).all()

    def test_weights(self, squares):
        """Red counts twice, by the gradient: half as bright, it is as strong."""
        squares[..., 2] //= 4
        squares[..., 1] += squares[..., 2]
        model = TwoColourClassifier()
        explanation = Explainer(model).explain(squares, 0)
        # 2 * 60 - 60 in the first square.
        torch.testing.assert_close(explanation.map, square(RED))
        model.model.head.weight[0, 1] = 0.5
        explanation = Explainer(model).explain(squares, 0)
        # 2 * 60 + 0.5 * 60 there, 0.5 * 120 in the other.
        torch.testing.assert_close(explanation.map, square(RED) + square(GREEN, 0.4))

    def test_nothing_speaks_for_it(self, squares):
        squares[..., 2] = 0
        explanation = Explainer(TwoColourClassifier()).explain(squares, 0)
        assert not explanation.map.any()
        assert explanation.caption == 'red  0.75 (nothing speaks for it)'

    def test_too_many_positions(self, squares):
        explainer = Explainer(TwoColourClassifier(), method='eigencam')
        with pytest.raises(LayerError, match='300 x 300 positions, which takes eigencam a matrix'):
            explainer.explain(squares)

    def test_prediction(self, squares):
        explanation = Explainer(TwoColourClassifier()).explain(squares)
        assert explanation.caption == 'red  0.75'
        assert explanation.record == dict(label=0, class_name='red', score=0.75,
                                          layer='backbone.1', method='gradcam')

    def test_in_place_layers(self, squares):
        """The activation after the layer changes its output; the map is of what the layer gave."""
        model = TwoColourClassifier()
        with torch.no_grad():
            model.model.backbone[0].weight[1] *= -1
        # Green is negative before the activation, and nothing after it.
        before = Explainer(model, 'backbone.0', 'hirescam').explain(squares, 1)
        after = Explainer(model, 'backbone.1', 'hirescam').explain(squares, 1)
        assert not before.map.any() and not after.map.any()
        model.model.head.weight[1, 0] = 1.
        assert Explainer(model, 'backbone.0').explain(squares, 1).map[GREEN] == 0

    def test_small_pictures_are_enlarged(self, squares):
        small = np.ascontiguousarray(squares[30:110, 50:150])
        explanation = Explainer(TwoColourClassifier()).explain(small, 0)
        assert explanation.picture.shape == (320, 400, 3)
        assert explanation.map.shape == (320, 400)


class TestLayers:

    @pytest.mark.parametrize('layer, message', [
        ('backbone.2', "no layer 'backbone.2'; it has: backbone.1, backbone.0"),
        ('head', r'layer head cannot be explained: .* shape \(1, 2\), .* no map'),
        ('twice', 'layer twice cannot be explained: it runs 2 times in one pass'),
        ('unused', 'layer unused cannot be explained: it does not run on its own'),
        ('aside', 'layer aside cannot be explained: no gradient of the score')])
    def test_bad_layers(self, squares, layer, message):
        model = TwoColourClassifier()
        network = model.model
        network.twice, network.unused, network.aside = (nn.ReLU() for _ in range(3))

        def forward(images, mode):
            maps = network.twice(network.twice(network.backbone(images)))
            network.aside(maps)
            return network.head(maps.mean((2, 3)))

        network.forward = forward
        with pytest.raises(LayerError, match=message):
            Explainer(model, layer).explain(squares)
        # No hook is left behind.
        assert not any(module._forward_hooks for module in network.modules())

    def test_single_position(self, squares):
        model = TwoColourClassifier()
        model.model.backbone.append(nn.AdaptiveAvgPool2d(1))
        with pytest.raises(LayerError, match='backbone.2 .* map has a single position'):
            Explainer(model, 'backbone.2').explain(squares)
        assert Explainer(model).explain(squares).record['layer'] == 'backbone.1'

    def test_methods(self, detector):
        assert Explainer(TwoColourClassifier()).method == 'gradcam'
        assert Explainer(detector).method == 'layercam'
        with pytest.raises(ValueError, match="method='cam' must be one of gradcam, "):
            Explainer(TwoColourClassifier(), method='cam')

    def test_no_gradient(self, squares):
        model = TwoColourClassifier()
        forward = model.model.forward
        model.model.forward = lambda images, mode: forward(images, mode).detach()
        with pytest.raises(LayerError, match='score without a gradient; take the method eigencam'):
            Explainer(model).explain(squares)


class TestFindClass:

    @pytest.mark.parametrize('name, label', [
        ('zebra', 1), ('Zebra', 1), ('2', 0), ('0', 0), ('1', 1), ('Struthio camelus', 2),
        ('ostrich, Struthio camelus', 2)])
    def test_found(self, name, label):
        model = TwoColourClassifier()
        model.classes = ('2', 'zebra', 'ostrich, Struthio camelus')
        assert find_class(model, name) == label

    @pytest.mark.parametrize('classes, name, message', [
        (('horse', 'zebra'), 'zebras', r"no class 'zebras': .* has 2 \(0 to 1\), such as zebra$"),
        (('horse', 'zebra'), '2', r"no class '2': .* has 2 \(0 to 1\), such as horse, zebra$"),
        ((), '5', r"no class '5': .* has 3 \(0 to 2\), whose names are not known$")])
    def test_unknown(self, classes, name, message):
        model = TwoColourClassifier()
        model.classes, model.model.head.num_classes = classes, 3
        with pytest.raises(UsageError, match=message):
            find_class(model, name)


@pytest.fixture(scope='module')
def detector(user_models):
    return load_explained(*user_models['detector'], 'cpu')


@pytest.fixture(scope='module')
def classifier(user_models):
    return load_explained(*user_models['classifier'], 'cpu')


@pytest.fixture
def picture(user_project):
    return cv2.imread(str(user_project / 'pictures' / '2.png'))


@pytest.mark.parametrize('method', METHODS)
def test_methods(detector, classifier, picture, method):
    for explainer, size in (
            (Explainer(detector, 'backbone.stages.3', method, score_threshold=0.), (320, 384)),
            (Explainer(classifier, 'backbone.stages.2', method), (320, 320))):
        explanation = explainer.explain(picture)
        assert explanation.map.shape == size
        assert np.isfinite(explanation.map).all()
        assert explanation.map.min() >= 0 and explanation.map.max() in (0, 1)
        assert overlay(explanation).shape == explanation.picture.shape == (*size, 3)


@pytest.mark.parametrize('task, layer, labels', [
    ('detector', 'backbone.stages.2', [None]), ('classifier', 'backbone.stages.1', [0, 1])])
def test_deploy_form(request, picture, task, layer, labels):
    model = copy.deepcopy(request.getfixturevalue(task))
    explainer = Explainer(model, layer, 'hirescam', score_threshold=0.)
    expected = [explainer.explain(picture, label).map for label in labels]
    assert max(one.max() for one in expected) == 1
    switch_to_deploy(model.model)
    assert not any(parameter.requires_grad for parameter in model.model.backbone.parameters())
    for label, one in zip(labels, expected, strict=True):
        found = explainer.explain(picture, label)
        torch.testing.assert_close(found.map, one, rtol=1e-3, atol=1e-3)


class TestDetector:

    def test_choice_of_detections(self, detector, picture):
        """Those of the class, from the threshold on, best first, at most so many."""
        every, = detector.detect([picture])
        assert set(every.labels) == {0}
        explanation = Explainer(detector, score_threshold=0., top=2).explain(picture, 0)
        record = explanation.record
        # The input is 64 x 64 pixels, whose last stage has 2 x 2 positions.
        assert record['layer'] == 'backbone.stages.3'
        assert record['class_name'] == 'square'
        assert record['detections'] == [
            dict(item, score=pytest.approx(item['score'], abs=1e-3),
                 bbox=pytest.approx(item['bbox'], abs=0.1))
            for item in every.as_records()[:2]]
        assert re.fullmatch(r'2 × square, best 0\.\d\d', explanation.caption)
        # Drawn where the picture has them, which is enlarged.
        factor = len(explanation.picture) // len(picture)
        assert factor == 4
        torch.testing.assert_close(explanation.found.boxes, factor * every.boxes[:2], atol=0.1,
                                   rtol=0)
        threshold = float(every.scores[3:5].mean())
        explanation = Explainer(detector, score_threshold=threshold).explain(picture)
        assert len(explanation.found.labels) == 4
        explanation = Explainer(detector, score_threshold=0.).explain(picture, 1)
        assert (explanation.map, explanation.caption) == (None, 'no disc')

    def test_no_detection(self, detector, picture):
        explanation = Explainer(detector, score_threshold=0.99).explain(picture)
        assert explanation.map is None
        assert re.fullmatch(r'no detection \(best 0\.\d\d\)', explanation.caption)
        assert (overlay(explanation) == explanation.picture).all()

    def test_differentiated_number(self, detector, picture):
        """The sum of the logits of the chosen detections."""
        data = detector.model.data_preprocessor(detector.collate([picture]), False)
        logits = detector.model.infer(data['inputs'])[0].detach()
        total, _ = Explainer(detector, score_threshold=0., top=3)._score_detections(
            data['data_samples'], None, data['inputs'])
        torch.testing.assert_close(total, logits.flatten().topk(3).values.sum())

    def test_dense_head_of_mmdet(self, tmp_path, picture):
        """Their `predict` detaches the scores; the head is left as it was."""
        config = tmp_path / 'retinanet.py'
        config.write_text('''
default_scope = 'mmdet'
model = dict(
    type='RetinaNet',
    data_preprocessor=dict(type='DetDataPreprocessor', pad_size_divisor=32),
    backbone=dict(type='ResNet', depth=18, base_channels=8, stem_channels=8, style='pytorch'),
    neck=dict(type='FPN', in_channels=[8, 16, 32, 64], out_channels=8, start_level=1, num_outs=4),
    bbox_head=dict(
        type='RetinaHead', num_classes=2, in_channels=8, feat_channels=8, stacked_convs=1,
        anchor_generator=dict(type='AnchorGenerator', octave_base_scale=4, scales_per_octave=1,
                              ratios=[1.0], strides=[8, 16, 32, 64]),
        bbox_coder=dict(type='DeltaXYWHBBoxCoder'),
        loss_cls=dict(type='FocalLoss', use_sigmoid=True)),
    test_cfg=dict(nms_pre=20, min_bbox_size=0, score_thr=0., max_per_img=5,
                  nms=dict(type='nms', iou_threshold=0.5)))
pipeline = [
    dict(type='LoadImageFromFile'), dict(type='Resize', scale=(96, 96), keep_ratio=True),
    dict(type='PackDetInputs',
         meta_keys=('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor'))]
test_dataloader = dict(dataset=dict(type='CocoDataset', pipeline=pipeline,
                                    metainfo=dict(classes=('square', 'disc'))))
''')
        with DefaultScope.overwrite_default_scope('mmdet'):
            model = MODELS.build(Config.fromfile(config).model)
        torch.save(model.state_dict(), tmp_path / 'retinanet.pth')
        detector = load_explained(str(config), str(tmp_path / 'retinanet.pth'), 'cpu')
        explainer = Explainer(detector, method='layercam', score_threshold=0., top=3)
        explanation = explainer.explain(picture)
        assert explainer.layer == 'backbone.layer4'
        assert explanation.map.max() == 1
        assert explanation.map.shape == explanation.picture.shape[:2]
        assert 'predict_by_feat' not in vars(detector.model.bbox_head)


class TestClassifier:

    def test_opposite_classes(self, classifier, picture):
        """Of two classes with opposite weights, what speaks for the one speaks against the other.
        """
        classifier = copy.deepcopy(classifier)
        with torch.no_grad():
            classifier.model.head.fc.weight[1] = -classifier.model.head.fc.weight[0]
        explainer = Explainer(classifier, 'backbone.stages.0', 'hirescam')
        one, other = (explainer.explain(picture, label).map for label in (0, 1))
        assert one.max() == other.max() == 1
        # Interpolation lets them overlap a little at their borders.
        assert np.minimum(one, other).max() < 0.5 and (one * other > 0).mean() < 0.5

    def test_scores(self, classifier, picture):
        found, = classifier.classify([picture])
        explainer = Explainer(classifier)
        for label in (0, 1):
            record = explainer.explain(picture, label).record
            # The input is 32 x 32 pixels, of which the last stage makes a single position.
            assert record['layer'] == 'backbone.stages.2'
            assert record['score'] == pytest.approx(float(found.scores[found.labels == label][0]),
                                                    abs=1e-4)
            assert record['class_name'] == ('square', 'disc')[label]


class TestLoadExplained:

    def test_no_weights(self, user_models):
        config, _ = user_models['classifier']
        for name in (config, 'spartan_xt_224'):
            with pytest.raises(UsageError, match=f'{name} is a model without weights.*=CHECKPOINT'):
                load_explained(name)

    def test_no_config(self):
        with pytest.raises(UsageError, match='xt has no config that says how images'):
            load_explained('xt', 'weights.pth')
        with pytest.raises(UnknownModelError, match='none.py'):
            load_explained('none.py', 'weights.pth')

    def test_no_checkpoint(self, user_models):
        with pytest.raises(FileNotFoundError, match='none.pth does not exist'):
            load_explained(user_models['classifier'][0], 'none.pth')

    def test_checkpoint_with_its_config(self, user_models, tmp_path):
        config, checkpoint = user_models['classifier']
        content = torch.load(checkpoint)
        content['meta']['cfg'] = Config.fromfile(config).pretty_text
        torch.save(content, tmp_path / 'published.pth')
        assert load_explained(str(tmp_path / 'published.pth')).classes == ('square', 'disc')


class TestDrawing:

    def test_colours(self):
        """Grey and the colours of the map, and a white frame around what is detected."""
        picture = np.full((SIDE, SIDE, 3), (0, 0, 200), np.uint8)
        boxes = Detections(np.array([[100., 100., 200., 200.]]), np.array([0]), np.array([0.9]))
        explanation = Explanation(picture, square(RED), 'red', boxes)
        drawn = overlay(explanation)
        grey = 0.299 * 200
        for place, value in ((RED, 1.), ((250, 10), 0.)):
            colour = 255 * np.array(colormaps['viridis'](value))[2::-1]
            torch.testing.assert_close(drawn[place].astype(float), 0.45 * grey + 0.55 * colour,
                                       atol=1, rtol=0)
        assert (drawn[100, 150] == 255).all() and (drawn[150, 200] == 255).all()
        assert (picture == (0, 0, 200)).all()

    def test_long_texts_fit(self):
        explanation = Explanation(np.zeros((SIDE, SIDE, 3), np.uint8), None, 'name ' * 50)
        assert draw_overlay(explanation, 'title ' * 50).width == SIDE

    def test_grid(self, tmp_path):
        items = [Explanation(np.zeros((40, 60, 3), np.uint8), None, f'{i}') for i in range(2)]
        figure = draw_grid([('first', items), ('second', items)], ['a', 'b'])
        panels = figure.axes[:6]
        assert [axes.get_title() for axes in panels[:3]] == ['input', 'a', 'b']
        assert [axes.get_xlabel() for axes in panels[3:]] == ['second', '0', '1']
        with pytest.raises(ValueError, match='rows is empty'):
            draw_grid([], ['a'])


def test_explain_images(classifier, detector, user_project, tmp_path, monkeypatch):
    monkeypatch.setattr('spartan_mm.analysis.look_inside.class_activation.write_figure',
                        lambda path, figure, **_: path.write_text(figure.axes[1].get_title()))
    folder = user_project / 'pictures'
    (tmp_path / 'broken.png').write_bytes(b'no image')
    explainers = {'a classifier': Explainer(classifier),
                  'detector': Explainer(detector, score_threshold=0.9)}
    images = [tmp_path / 'broken.png', folder / '1.png']
    failures = explain_images(explainers, images, tmp_path / 'out', ['disc', '0'])
    assert list(failures) == [str(images[0])]
    assert 'broken.png cannot be decoded as an image' in failures[str(images[0])]
    names = [f'1-{label}-{model}.png' for label in ('disc', '0')
             for model in ('a_classifier', 'detector')]
    assert {file.name for file in (tmp_path / 'out').iterdir()} == {
        *names, 'grid.png', 'results.json'}
    assert (tmp_path / 'out' / 'grid.png').read_text() == 'a classifier'
    content = json.loads((tmp_path / 'out' / 'results.json').read_text(encoding='utf-8'))
    assert content['failures'] == failures
    assert [item['overlay'] for item in content['results']] == names
    assert [item['class_name'] for item in content['results'][::2]] == ['disc', 'square']
    with pytest.raises(UsageError, match="no class 'ring'"):
        explain_images(explainers, images, tmp_path / 'out', ['ring'])
