"""The effective receptive field, where it is known in closed form and of the backbone."""

from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
from torch import nn

from spartan_mm.analysis.look_inside.inputs import GivenModel
from spartan_mm.analysis.look_inside.layers import LayerError
from spartan_mm.analysis.look_inside.receptive_field import (
    choose_layer,
    draw_fields,
    find_square,
    measure_field,
    read_square,
)


def convolutions(*kernels, dilation=1):
    """Convolutions whose taps are all 1."""
    layers = [nn.Conv2d(3 if i == 0 else 2, 2, kernel, padding=dilation * (kernel // 2),
                        dilation=dilation, bias=False) for i, kernel in enumerate(kernels)]
    for layer in layers:
        nn.init.ones_(layer.weight)
    return nn.Sequential(*layers)


@pytest.fixture
def images():
    return [torch.rand(2, 3, 21, 25), torch.rand(1, 3, 21, 25)]


def square_side(field, share):
    return find_square(field, share)[2]


class TestMeasureField:

    @pytest.mark.parametrize('kernels, dilation, profile', [
        ((5, ), 1, [1, 1, 1, 1, 1]),
        ((3, 3), 1, [1, 2, 3, 2, 1]),
        ((3, 3, 3), 1, [1, 3, 6, 7, 6, 3, 1]),
        ((3, ), 2, [1, 0, 1, 0, 1]),
        ((3, 3), 2, [1, 0, 2, 0, 3, 0, 2, 0, 1])])
    def test_closed_form(self, images, kernels, dilation, profile):
        """The field of ones is the kernel convolved with itself, around the central position."""
        field = measure_field(convolutions(*kernels, dilation=dilation), images,
                              str(len(kernels) - 1))
        # Each kernel after the first sums two channels, and the result has two channels, too, of
        # which each sees three colours.
        factor = 3 * 2 ** len(kernels)
        expected, half = np.zeros((21, 25)), len(profile) // 2
        expected[10 - half:11 + half, 12 - half:13 + half] = factor * np.outer(profile, profile)
        torch.testing.assert_close(field, expected)

    def test_inner_layer(self, images):
        """What follows the layer has no part in it, be it wrong."""
        model = nn.Sequential(*convolutions(3, 3), nn.Linear(1, 1))
        assert square_side(measure_field(model, images, '0'), 1.) == 3
        assert square_side(measure_field(model, images, '1'), 1.) == 5

    def test_stride(self, images):
        """Position 5 of 11 looks at rows 9 to 11."""
        model = nn.Sequential(nn.Conv2d(3, 1, 3, stride=2, padding=1))
        nn.init.ones_(model[0].weight)
        rows, columns = measure_field(model, images, '0').nonzero()
        assert sorted(set(rows)) == [9, 10, 11]
        assert sorted(set(columns)) == [11, 12, 13]

    def test_only_positive_contributions_count(self, images):
        model = convolutions(3)
        with torch.no_grad():
            model[0].weight[:, :, 0] = -0.1
        assert measure_field(model, images, '0')[9].max() == 0

    def test_average(self, images):
        model = convolutions(3)
        once, twice = (measure_field(model, images[1:] * count, '0') for count in (1, 2))
        torch.testing.assert_close(once, twice)

    @pytest.mark.parametrize('deploy', [False, True])
    def test_spartan(self, make_backbone, deploy):
        """The stem's two convolutions of stride 2 see 7 pixels, the last stage many more."""
        backbone = make_backbone()
        if deploy:
            backbone.switch_to_deploy()
        image = torch.rand(1, 3, 64, 64)
        assert choose_layer(backbone, image) == 'stages.3'
        assert square_side(measure_field(backbone, [image], 'stem'), 1.) <= 7
        field = measure_field(backbone, [image], 'stages.3')
        assert field.shape == (64, 64)
        assert np.isfinite(field).all() and (field >= 0).all()
        assert square_side(field, 0.9) > 7

    def test_bad_layers(self, images):
        model = nn.Sequential(nn.Conv2d(3, 2, 1), nn.Flatten())
        with pytest.raises(LayerError, match="no layer '7'; it has: 0, 1"):
            measure_field(model, images, '7')
        with pytest.raises(LayerError, match='layer 1 has no receptive field: .* which is no map'):
            measure_field(model, images, '1')
        model.append(nn.Conv2d(2, 2, 1))
        model.forward = lambda x: model[0](x)
        with pytest.raises(LayerError, match='layer 2 does not run on its own'):
            measure_field(model, images, '2')
        nn.init.constant_(model[0].weight, -1.)
        with pytest.raises(LayerError, match='no pixel contributes .* may all be negative'):
            measure_field(model, [image + 1 for image in images], '0')

    def test_no_images(self):
        with pytest.raises(ValueError, match='images is empty'):
            measure_field(convolutions(3), [], '0')


def test_squares():
    """Of [1, 2, 3, 2, 1] times itself, 81 in sum: 9, 25, 49, 64 and 81 in the best squares."""
    field = np.zeros((40, 30))
    field[20:25, 3:8] = np.outer([1, 2, 3, 2, 1], [1, 2, 3, 2, 1])
    assert [square_side(field, share) for share in (0.1, 0.2, 0.3, 0.5, 0.7, 0.99)] == [
        1, 2, 2, 3, 4, 5]
    assert find_square(field, 0.5) == (21, 4, 3)
    # Up to the longer side.
    assert [square_side(np.ones((5, 9)), share) for share in (0., 1.)] == [1, 9]
    assert [square_side(np.ones((10, 10)), share) for share in (0.25, 0.26, 0.99)] == [5, 6, 10]


class TestImages:

    def test_read_square(self, tmp_path):
        picture = np.zeros((40, 100, 3), np.uint8)
        picture[:, 30:70] = 200
        cv2.imwrite(str(tmp_path / 'wide.png'), picture)
        square = read_square(tmp_path / 'wide.png', 20)
        assert square.shape == (20, 20, 3)
        assert (square == 200).all()

    def test_normalize(self):
        """Blue, green, red in; red, green, blue out, with ImageNet's or the model's own numbers."""
        named = SimpleNamespace(model=nn.Conv2d(3, 1, 1), source='spartan_mm', config=None)
        image = np.full((4, 6, 3), (103.53, 116.28, 255)).astype(np.uint8)
        found = GivenModel('title', named, {}).normalize(image)
        assert found.shape == (1, 3, 4, 6)
        torch.testing.assert_close(found[0, :, 0, 0], torch.tensor([2.2489, 0., 0.]), atol=0.02,
                                   rtol=0)
        named.source = 'timm'
        named.model.pretrained_cfg = dict(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
        found = GivenModel('title', named, {}).normalize(image)
        torch.testing.assert_close(found[0, 0, 0, 0], torch.tensor(1.))


def test_draw_fields():
    fields = {name: np.random.default_rng(0).random((32, 32)) for name in ('one', 'two (random)')}
    figure = draw_fields(fields)
    one, two, _ = figure.axes
    assert (one.get_title(), two.get_title()) == ('one', 'two\n(random)')
    side = find_square(fields['one'], 0.5)[2]
    assert f'\n50 %: {side} px   99 %: ' in one.get_xlabel()
    assert len(one.patches) == 2 * 4
    assert one.patches[4].get_width() == side
    with pytest.raises(ValueError, match='fields is empty'):
        draw_fields({})
