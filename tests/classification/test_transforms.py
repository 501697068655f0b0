"""torchvision's transforms reach the image as the recipe has them."""

import functools
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope
from mmpretrain.registry import TRANSFORMS
from torch.testing import assert_close
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from spartan_mm.classification import TorchvisionTransforms

CONFIGS = Path(__file__).parents[2] / 'configs' / 'classification'
BILINEAR = v2.InterpolationMode.BILINEAR
MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


@pytest.fixture(autouse=True)
def mmpretrain_scope():
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        yield


@functools.cache
def load(name='spartan_xt_224'):
    return Config.fromfile(CONFIGS / f'{name}.py')


def torchvisions(name='spartan_xt_224', split='train'):
    """The config's own transforms."""
    step, = [step for step in load(name)[f'{split}_pipeline']
             if step.type == 'TorchvisionTransforms']
    return TRANSFORMS.build(step)


def the(kind, name='spartan_xt_224', split='train'):
    """One of the config's transforms, as torchvision's object."""
    found, = [transform for transform in torchvisions(name, split).transforms.transforms
              if isinstance(transform, kind)]
    return found


def picture(height=300, width=400):
    """Smooth colours with some noise, BGR."""
    generator = np.random.default_rng(0)
    y, x = np.mgrid[:height, :width]
    smooth = np.stack([y * 255 / height, x * 255 / width, (x + y) * 255 / (height + width)], -1)
    return np.uint8(np.clip(smooth + generator.normal(0, 20, smooth.shape), 0, 255))


def tensor(image):
    """BGR array to RGB tensor."""
    return torch.from_numpy(image[..., ::-1].copy()).permute(2, 0, 1)


def normalized(image, name='spartan_xt_224'):
    """What the model's data preprocessor makes of a BGR array."""
    preprocessor = MODELS.build(load(name).model.data_preprocessor)
    inputs = torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))
    return preprocessor(dict(inputs=inputs[None]))['inputs'][0]


@pytest.mark.parametrize('name, size', [('spartan_xt_224', 224), ('spartan_t', 256)])
def test_training_equals_torchvisions_recipe(name, size):
    """Written out as for torchvision, the same pixels come out for the same seeds."""
    recipe = v2.Compose([
        v2.RandomResizedCrop(size, antialias=True), v2.RandomHorizontalFlip(0.5),
        v2.RandAugment(num_ops=2, magnitude=7, interpolation=BILINEAR),
        v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD), v2.RandomErasing(0.25)])
    ours = torchvisions(name)
    erased = 0
    for seed in range(16):
        torch.manual_seed(seed)
        expected = recipe(tensor(picture()))
        torch.manual_seed(seed)
        results = ours(dict(img=picture()))
        found = normalized(results['img'], name)
        assert results['img_shape'] == found.shape[1:] == (size, size)
        # Erased to the mean in whole levels, not to the mean itself.
        is_erased = (expected == 0).all(0)
        erased += bool(is_erased.any())
        assert (found[:, is_erased].abs() < 0.01).all()
        assert_close(found[:, ~is_erased], expected[:, ~is_erased], rtol=1e-5, atol=1e-5)
    assert 0 < erased < 12


@pytest.mark.parametrize('name, size', [('spartan_xt_224', 224), ('spartan_t', 256)])
@pytest.mark.parametrize('height, width', [(300, 401), (500, 333), (100, 80)])
def test_testing_equals_torchvisions_recipe(name, size, height, width):
    recipe = v2.Compose([v2.Resize(size, antialias=True), v2.CenterCrop(size)])
    found = torchvisions(name, 'test')(dict(img=picture(height, width)))['img']
    assert_close(tensor(found), recipe(tensor(picture(height, width))), rtol=0, atol=0)


def shear(horizontal, magnitude, image):
    degrees = math.degrees(math.atan(magnitude))
    return F.affine(image, angle=0., translate=[0, 0], scale=1., center=[0, 0],
                    shear=[degrees, 0.] if horizontal else [0., degrees], interpolation=BILINEAR)


def translate(x, y, image):
    return F.affine(image, angle=0., translate=[x, y], scale=1., shear=[0., 0.],
                    interpolation=BILINEAR)


@pytest.mark.parametrize('operation, expected', [
    # 7/30 of torchvision's ranges, in both directions; the images are 120 high and 200 wide.
    ('ShearX', [lambda x, s=s: shear(True, s * 0.3 * 7 / 30, x) for s in (1, -1)]),
    ('ShearY', [lambda x, s=s: shear(False, s * 0.3 * 7 / 30, x) for s in (1, -1)]),
    ('TranslateX', [lambda x, s=s: translate(s * int(150 / 331 * 200 * 7 / 30), 0, x)
                    for s in (1, -1)]),
    ('TranslateY', [lambda x, s=s: translate(0, s * int(150 / 331 * 120 * 7 / 30), x)
                    for s in (1, -1)]),
    ('Rotate', [lambda x, s=s: F.rotate(x, s * 7., BILINEAR) for s in (1, -1)]),
    ('Brightness', [lambda x, s=s: F.adjust_brightness(x, 1 + s * 0.21) for s in (1, -1)]),
    ('Color', [lambda x, s=s: F.adjust_saturation(x, 1 + s * 0.21) for s in (1, -1)]),
    ('Contrast', [lambda x, s=s: F.adjust_contrast(x, 1 + s * 0.21) for s in (1, -1)]),
    ('Sharpness', [lambda x, s=s: F.adjust_sharpness(x, 1 + s * 0.21) for s in (1, -1)]),
    ('Posterize', [lambda x: F.posterize(x, 7)]),
    ('Solarize', [lambda x: F.solarize(x, 255 * 23 / 30)]),
    ('AutoContrast', [F.autocontrast]),
    ('Equalize', [F.equalize]),
    ('Identity', [lambda x: x]),
])
def test_each_operation_has_magnitude_7_of_30(operation, expected):
    """And bilinear interpolation."""
    augment = the(v2.RandAugment)
    assert augment.num_ops == 2
    assert set(augment._AUGMENTATION_SPACE) == {
        'Identity', 'ShearX', 'ShearY', 'TranslateX', 'TranslateY', 'Rotate', 'Brightness',
        'Color', 'Contrast', 'Sharpness', 'Posterize', 'Solarize', 'AutoContrast', 'Equalize'}
    augment.num_ops = 1
    augment._AUGMENTATION_SPACE = {operation: augment._AUGMENTATION_SPACE[operation]}
    image = tensor(picture(120, 200))
    wanted = [operate(image) for operate in expected]
    seen = set()
    for _ in range(16):
        found = augment(image)
        matching = [i for i, other in enumerate(wanted)
                    if (found.int() - other.int()).abs().max() <= 1]  # rounding of the factors
        assert matching
        seen.update(matching)
    assert seen == set(range(len(expected)))


@pytest.mark.parametrize('operation', ['ShearX', 'ShearY', 'TranslateX', 'TranslateY', 'Rotate'])
def test_what_is_left_open_is_black(operation):
    augment = the(v2.RandAugment)
    augment._AUGMENTATION_SPACE = {operation: augment._AUGMENTATION_SPACE[operation]}
    found = augment(torch.full((3, 100, 100), 255, dtype=torch.uint8))
    black = (found == 0).all(0)
    while not black.any():  # the second operation may have undone the first
        black = (augment(torch.full_like(found, 255)) == 0).all(0)
    assert 0.01 < black.float().mean() < 0.3


def test_erasing():
    """A quarter of the images, from 0.02 to 0.33 of the area, sides from 0.3 to 3.3."""
    erase = the(v2.RandomErasing)
    white = torch.full((3, 100, 150), 255, dtype=torch.uint8)
    mean = torch.tensor([[124], [116], [104]], dtype=torch.uint8)
    areas, ratios = [], []
    for _ in range(600):
        found = erase(white)
        mask = (found != 255).any(0)
        if mask.any():
            height, width = int(mask.any(1).sum()), int(mask.any(0).sum())
            assert mask.sum() == height * width
            assert (found[:, mask] == mean).all()
            areas.append(height * width / 15_000)
            ratios.append(height / width)
    assert 0.19 < len(areas) / 600 < 0.31
    assert 0.015 < min(areas) < 0.06 and 0.27 < max(areas) < 0.335
    assert 0.27 < min(ratios) < 0.5 and 2. < max(ratios) < 3.6


def test_flip_and_crop():
    assert the(v2.RandomHorizontalFlip).p == 0.5
    crop = the(v2.RandomResizedCrop)
    assert (crop.scale, crop.ratio) == ((0.08, 1.0), (3 / 4, 4 / 3))
    assert crop.interpolation == BILINEAR and crop.antialias


def test_channels_come_back_in_order():
    step = TorchvisionTransforms([dict(type='RandomErasing', p=1., value=[1, 2, 3])])
    found = step(dict(img=np.full((40, 40, 3), 255, np.uint8)))['img']
    assert {tuple(colour) for colour in found.reshape(-1, 3).tolist()} == {(255,) * 3, (3, 2, 1)}
    assert found.dtype == np.uint8


@pytest.mark.parametrize('transform, message', [
    (dict(type='RandAugmnt'), "no transform 'RandAugmnt'"),
    (dict(type='functional'), "no transform 'functional'"),
    (dict(type='Resize', size=8, interpolation='linear'),
     "Resize: torchvision has no interpolation 'linear', choose one of nearest, .*bilinear"),
])
def test_unknown_names(transform, message):
    with pytest.raises(ValueError, match=message):
        TorchvisionTransforms([transform])
