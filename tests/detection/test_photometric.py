"""Colours are distorted as by torchvision's class of the official recipe."""

import numpy as np
import pytest
import torch
import torchvision.transforms.v2 as tv
from PIL import Image

from spartan_mm.detection import RandomPhotometricDistort


@pytest.fixture(autouse=True)
def seeded():
    np.random.seed(0)


def make_image(size=(120, 160)):
    return np.random.randint(0, 256, (*size, 3), dtype=np.uint8)


def assert_step_equals_torchvision_s(name, factor, rgb):
    """Compare with what the official code does, which has PIL images there."""
    distort = RandomPhotometricDistort()
    distort._draw = lambda: ([(name, factor)], None)
    found = distort.transform(dict(img=rgb[..., ::-1]))['img'][..., ::-1]
    expected = getattr(tv.functional, f'adjust_{name}')(Image.fromarray(rgb), factor)
    np.testing.assert_array_equal(found, np.asarray(expected))


@pytest.mark.parametrize('seed', range(20))
def test_equals_torchvision_for_the_same_draws(seed):
    np.random.seed(seed)
    results = dict(img=make_image())
    rgb = Image.fromarray(results['img'][..., ::-1])
    ours = RandomPhotometricDistort()
    steps, permutation = ours._draw()
    ours._draw = lambda: (steps, permutation)
    names = [name for name, _ in steps]

    params = {f'{name}_factor': None for name in ours.ranges}
    params.update({f'{name}_factor': factor for name, factor in steps})
    params['contrast_before'] = 'contrast' in names and names.index('contrast') == names.count(
        'brightness'
    )
    params['channel_permutation'] = None if permutation is None else torch.tensor(permutation)
    expected = tv.RandomPhotometricDistort().transform(rgb, params)

    distorted = ours.transform(results)['img']
    assert distorted.dtype == np.uint8
    np.testing.assert_array_equal(distorted[..., ::-1], np.asarray(expected))


@pytest.mark.parametrize('factor', [0.0, 0.6, 1.0, 1.4, 3.0])
@pytest.mark.parametrize('name', ['brightness', 'contrast', 'saturation'])
def test_step_equals_torchvision_s(name, factor):
    assert_step_equals_torchvision_s(name, factor, make_image((37, 53)))


@pytest.mark.parametrize('factor', [0.5, 1 / 255, 0.0, -0.001, -0.05, -0.5])
def test_hue_equals_torchvision_s(factor):
    rgb = make_image((256, 256))
    assert_step_equals_torchvision_s('hue', factor, rgb)


def test_hue_equals_torchvision_s_for_every_green_and_blue():
    green, blue = np.mgrid[:256, :256].astype(np.uint8)
    for red in range(0, 256, 5):
        rgb = np.dstack([np.full_like(green, red), green, blue])
        assert_step_equals_torchvision_s('hue', 0.03, rgb)


def test_each_step_has_a_chance_of_its_own():
    transform = RandomPhotometricDistort()
    draws = [transform._draw() for _ in range(2000)]
    for name, (low, high) in transform.ranges.items():
        factors = np.array([dict(steps)[name] for steps, _ in draws if name in dict(steps)])
        assert 0.45 < len(factors) / len(draws) < 0.55
        assert low <= factors.min() and factors.max() <= high
        assert factors.max() - factors.min() > 0.98 * (high - low)
    assert 0.45 < sum(permutation is not None for _, permutation in draws) / 2000 < 0.55
    names = [[name for name, _ in steps] for steps, _ in draws]
    both = [n for n in names if {'contrast', 'hue'} <= {*n}]
    first = sum(n.index('contrast') < n.index('hue') for n in both)
    assert 0.4 < first / len(both) < 0.6


def test_defaults_are_torchvision_s():
    ours, theirs = RandomPhotometricDistort(), tv.RandomPhotometricDistort()
    assert ours.prob == theirs.p
    assert ours.ranges == {name: getattr(theirs, name) for name in ours.ranges}


def test_hue_beyond_half_a_turn_is_refused():
    with pytest.raises(ValueError, match='hue=.-0.6, 0.1. must be .* -0.5 <= low'):
        RandomPhotometricDistort(hue=(-0.6, 0.1))


def test_float_image_is_refused_by_name():
    results = dict(img=make_image().astype(np.float32), img_path='photo.jpg')
    with pytest.raises(TypeError, match='photo.jpg.*float32'):
        RandomPhotometricDistort()(results)
