"""What is exported: the same results as the model's own, with everything inside."""
import pytest
import torch
from mmengine.config import Config
from torch.testing import assert_close

import spartan_mm
from spartan_mm.errors import UsageError
from spartan_mm.export.form import export_form
from spartan_mm.export.graph import Normalize, make_graph

from .conftest import enliven


def predict(model, images, samples=None):
    """What the model makes of images in RGB order, as its test pipeline gives them: in BGR."""
    data = dict(inputs=[image.flip(0) for image in images], data_samples=samples)
    return model.test_step(data)


@pytest.fixture
def images():
    return torch.randint(0, 256, (2, 3, 64, 96), dtype=torch.uint8)


@pytest.mark.parametrize('settings', [
    dict(mean=[0] * 3, std=[255] * 3, bgr_to_rgb=True),
    dict(mean=[10, 20, 30], std=[50, 60, 70], bgr_to_rgb=True),
    dict(mean=[10, 20, 30], std=[50, 60, 70]),
    dict(),
], ids=['rt-detr', 'imagenet', 'bgr', 'none'])
@pytest.mark.parametrize('scope', ['mmdet', 'mmpretrain'])
def test_normalizes_as_the_preprocessor_does(settings, scope, images):
    from mmdet.models import DetDataPreprocessor
    from mmpretrain.models import ClsDataPreprocessor
    if scope == 'mmpretrain':
        settings = {name.replace('bgr_to_rgb', 'to_rgb'): value
                    for name, value in settings.items()}
    preprocessor = (DetDataPreprocessor if scope == 'mmdet' else ClsDataPreprocessor)(**settings)
    inputs = [image.flip(0) for image in images]
    expected = preprocessor(dict(inputs=inputs, data_samples=None))['inputs'].float()
    assert_close(Normalize(preprocessor)(images), expected)


@torch.no_grad()
def test_a_detector_gives_its_predictions(user_project, images):
    from mmdet.structures import DetDataSample
    model = enliven(spartan_mm.get_model(Config.fromfile(user_project / 'user_detector.py')))
    model.bbox_head.reg_branches[1][-1].bias[2:] = 3.  # large boxes, beyond the borders
    sizes = torch.tensor([[192, 32], [48, 64]])
    samples = [DetDataSample(metainfo=dict(
        img_shape=(64, 96), ori_shape=(height, width), scale_factor=(96 / width, 64 / height)))
        for width, height in sizes.tolist()]
    with export_form(model):
        labels, boxes, scores = make_graph(model)(images, sizes)
    assert boxes.min() == 0 and boxes[1].amax(0)[2:].tolist() == [48, 64]
    for index, sample in enumerate(predict(model, images, samples)):
        assert_close(labels[index], sample.pred_instances.labels)
        assert_close(boxes[index], sample.pred_instances.bboxes, rtol=1e-4, atol=1e-3)
        assert_close(scores[index], sample.pred_instances.scores)


@pytest.mark.parametrize('head', ['LinearClsHead', 'MultiLabelLinearClsHead'])
@torch.no_grad()
def test_a_classifier_gives_its_scores(user_project, images, head):
    config = Config.fromfile(user_project / 'user_classifier.py')
    config.model.head = dict(type=head, num_classes=2, in_channels=32)
    model = enliven(spartan_mm.get_model(config))
    expected = torch.stack([sample.pred_score for sample in predict(model, images)])
    assert_close(make_graph(model)(images), expected)


@torch.no_grad()
def test_raw_outputs_are_those_of_all_queries(user_project, images):
    model = enliven(spartan_mm.get_model(Config.fromfile(user_project / 'user_detector.py')))
    logits, boxes = make_graph(model, raw=True)(images)
    expected = model.infer(images / 255)
    assert_close((logits, boxes), expected)
    assert logits.shape == (2, 20, 2)


def test_form_ends_with_its_context(user_project):
    model = spartan_mm.get_model(Config.fromfile(user_project / 'user_detector.py'))
    attentions = [module for module in model.modules() if hasattr(module, 'form')]
    mixers = [module for module in model.modules() if hasattr(module, 'separate')]
    assert len(attentions) == 2 and len(mixers) == 4
    with pytest.raises(KeyError), export_form(model):
        assert {module.form for module in attentions} == {'gather'}
        assert all(mixer.separate for mixer in mixers)
        raise KeyError
    assert {module.form for module in attentions} == {'bags'}
    assert not any(mixer.separate for mixer in mixers)
    with export_form(model, 'bags'):
        assert not any(mixer.separate for mixer in mixers)


def test_other_detectors_are_refused():
    with pytest.raises(UsageError, match=r'RetinaNet cannot be exported: .* RTDETR can; .*NMS'):
        make_graph(spartan_mm.get_model('retinanet_spartan_t'))
