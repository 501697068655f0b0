"""Samples are shown as they are at each stage: picture, boxes and labels go together."""

import numpy as np
import pytest
import torch
from mmengine.config import Config
from PIL import Image

from spartan_mm.analysis.mistakes.predictions import Truth
from spartan_mm.analysis.report.browsing import STAGES, View, browse, draw_views
from spartan_mm.errors import UsageError

ORANGE = (255, 128, 0)  # the objects of the user's pictures


@pytest.fixture
def project(user_project, monkeypatch):
    monkeypatch.chdir(user_project)
    return user_project


@pytest.fixture
def detector(project):
    config = Config.fromfile('user_detector.py')
    config.model.data_preprocessor.batch_augments = [dict(type='BatchRandomResize', sizes=[128])]
    return config


@pytest.fixture
def classifier(project):
    config = Config.fromfile('user_classifier.py')
    config.model.train_cfg = dict(augments=[dict(type='Mixup', alpha=1.)])
    return config


def at(view, x, y):
    return np.array(view.image)[int(y), int(x)].tolist()


def test_boxes_stay_with_their_objects(detector):
    classes, samples = browse(detector, number=4)
    assert classes == ('square', 'disc') and list(samples) == [*STAGES]
    names = [view.name for view in samples['original']]
    assert sorted(names) == ['0.png', '1.png', '2.png', '3.png']
    for stage, views in samples.items():
        assert [view.name for view in views] == names
        for view in views:
            height = 48 + 16 * int(view.name[0])
            size = dict(original=(96, height), pipeline=(64, 64), model=(128, 128))[stage]
            assert view.image.size == size
            # Only the first picture has no object.
            assert len(view.truth.boxes) == (view.name != '0.png')
            for left, top, right, bottom in view.truth.boxes:
                assert view.truth.labels.tolist() == [0]
                scale_x, scale_y = size[0] / 96, size[1] / height
                expected = np.array([10 * scale_x, 10 * scale_y, 40 * scale_x, 40 * scale_y])
                np.testing.assert_allclose([left, top, right, bottom], expected, atol=1e-3)
                # Its colour, mapped back from what the model gets, and what is around it.
                np.testing.assert_allclose(at(view, (left + right) / 2, (top + bottom) / 2), ORANGE,
                                           atol=1)
                around = [60 * int(view.name[0])] * 3
                np.testing.assert_allclose(at(view, right + 5, bottom - 2), around, atol=1)


def test_evaluation_does_not_augment(detector):
    _, samples = browse(detector, ['model'], split='val')
    assert {view.image.size for view in samples['model']} == {(64, 64)}


def test_labels_are_mixed_as_pictures_are(classifier):
    classes, samples = browse(classifier, number=4)
    original, piped, mixed = (samples[stage] for stage in STAGES)
    assert classes == ('disc', 'square')
    for view, other in zip(original, piped, strict=True):
        [(label, share)] = view.shares
        assert (view.name in ('2.png', '3.png')) == (label == 0)
        assert share == 1 and other.shares == view.shares and other.image.size == (32, 32)
    assert any(len(view.shares) == 2 for view in mixed)
    for view in mixed:
        assert sum(share for _, share in view.shares) == pytest.approx(1)
        shares = [share for _, share in view.shares]
        assert shares == sorted(shares, reverse=True)
    # All pictures of the batch by the same share: their mean stays.
    means = [np.mean([np.array(view.image, dtype=float) for view in views], axis=0)
             for views in (piped, mixed)]
    np.testing.assert_allclose(*means, atol=1)


def test_the_seed_decides(classifier):
    classifier.train_dataloader.dataset.pipeline.insert(
        1, dict(type='RandomResizedCrop', scale=24))
    first, again, other = (browse(classifier, ['pipeline'], 2, seed)[1]['pipeline']
                           for seed in (1, 1, 2))
    assert [view.name for view in first] == [view.name for view in again]
    assert all(view.image == same.image for view, same in zip(first, again, strict=True))
    assert not all(view.image == changed.image for view, changed in zip(first, other, strict=True))


def test_colours_of_other_orders(detector):
    """Whatever order the model takes, the picture is shown as it is."""
    preprocessor = detector.model.data_preprocessor
    shown = browse(detector, ['model'])[1]['model']
    preprocessor.update(bgr_to_rgb=False, mean=[103., 116., 123.], std=[58., 57., 56.])
    for view, other in zip(shown, browse(detector, ['model'])[1]['model'], strict=True):
        np.testing.assert_allclose(np.array(view.image), np.array(other.image), atol=1)


@pytest.mark.parametrize('change, stages, message', [
    (dict(train_dataloader=None), STAGES, 'the config has no train_dataloader'),
    (dict(), ['augmented'], "there is no stage 'augmented'; choose of original, pipeline, model"),
    ({'train_dataloader.dataset.indices': 0,
      'train_dataloader.dataset.serialize_data': False}, STAGES,
     'the dataset of train_dataloader is empty'),
    ({'train_dataloader.dataset.pipeline': [dict(type='LoadImageFromFile')]}, ['pipeline'],
     'must end in PackDetInputs or PackInputs'),
])
def test_mistakes(detector, change, stages, message):
    detector.merge_from_dict(change)
    with pytest.raises(UsageError, match=message):
        browse(detector, stages)


def test_sheet():
    image = Image.fromarray(np.arange(16, dtype=np.uint8).reshape(4, 4) * 16).convert('RGB')
    truth = Truth(np.array([[1., 1, 3, 3]]), np.array([1]), np.array([False]))
    boxes = [View(image, 'a.png', truth)] * 3
    sheet = draw_views(boxes, ('cat', 'dog'), columns=2, side=100)
    assert sheet.width == 2 * 112 + 12
    labels = [View(image, 'a.png', shares=[(1, 0.6), (0, 0.4)]), View(image, 'b.png')]
    sheet = np.array(draw_views(labels, ('cat', 'dog'), columns=2, side=100))
    # Each pixel is a square.
    square = sheet[-12 - 25:-12, 12:12 + 25]
    torch.testing.assert_close(torch.from_numpy(square), torch.full((25, 25, 3), 12 * 16,
                                                                    dtype=torch.uint8))
