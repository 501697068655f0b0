"""Layers by name, what they give, and the last map."""

import pytest
import torch
from torch import nn

from spartan_mm.analysis.look_inside.layers import (
    LayerError,
    as_map,
    describe_layers,
    find_last_map,
    find_layer,
)


@pytest.fixture(scope='module')
def backbone(make_backbone):
    return make_backbone(drop_path_rate=0.)


class Transformer(nn.Module):
    """Patches of 8 pixels and a class token, which the classes are read from."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Conv2d(3, 4, 8, 8)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(4, 1, 8, batch_first=True) for _ in range(2))
        self.norm = nn.LayerNorm(4)
        self.head = nn.Linear(4, 2)

    def forward(self, images):
        tokens = self.embed(images).flatten(2).transpose(1, 2)
        tokens = torch.cat([tokens.mean(1, keepdim=True), tokens], 1)
        for block in self.blocks:
            tokens = block(tokens)
        return self.head(self.norm(tokens)[:, 0])


class TestFindLayer:

    def test_every_name(self, backbone):
        for name, layer in backbone.named_modules():
            if name:
                assert find_layer(backbone, name) is layer

    def test_unknown(self, backbone):
        """The closest names come first, then those that hold the most; the others are counted."""
        with pytest.raises(LayerError) as error:
            find_layer(backbone, 'stages.7')
        message = str(error.value)
        assert message.startswith("SpaRTAN has no layer 'stages.7'; it has: stages.")
        total = len(list(backbone.named_modules())) - 1
        assert message.endswith(f', and {total - 12} more')
        assert {f'stages.{i}' for i in range(4)} | {'stem'} <= set(
            message.partition('it has: ')[2].split(', '))

    @pytest.mark.parametrize('name', ['', 'stages.0.'])
    def test_the_model_itself_is_none(self, backbone, name):
        with pytest.raises(LayerError):
            find_layer(backbone, name)


class TestAsMap:

    def test_tokens(self):
        tokens = torch.rand(2, 1 + 3 * 5, 4)
        found = as_map(tokens, (48, 80))
        torch.testing.assert_close(found, tokens[:, 1:].mT.reshape(2, 4, 3, 5))

    def test_channels_last(self):
        maps = torch.rand(1, 7, 7, 64)
        torch.testing.assert_close(as_map(maps, (224, 224)), maps.permute(0, 3, 1, 2))

    @pytest.mark.parametrize('shape', [(1, 64, 7, 7), (1, 8, 56, 56), (1, 32, 1, 1), (1, 4, 9, 5)])
    def test_channels_first(self, shape):
        assert as_map(torch.rand(shape), (224, 224)).shape == shape

    @pytest.mark.parametrize('output, what', [
        ((torch.rand(1, 4, 8, 8), ), '1 results in a tuple'), (torch.rand(1, 4), r'shape \(1, 4\)'),
        (torch.rand(1, 23, 4), 'no map of an input of 64 x 64 pixels'), ({}, 'a dict')])
    def test_no_map(self, output, what):
        with pytest.raises(LayerError, match=what):
            as_map(output, (64, 64))


class TestFindLastMap:

    @pytest.mark.parametrize('size, layer', [((64, 96), 'stages.3'), ((32, 32), 'stages.2')])
    def test_more_than_one_position(self, backbone, size, layer):
        with torch.no_grad():
            assert find_last_map(backbone, lambda: backbone(torch.rand(1, 3, *size)), size) == layer

    def test_has_a_say(self):
        """After the last block the class token alone is read."""
        model, image = Transformer().eval(), torch.rand(1, 3, 32, 32, requires_grad=True)
        assert find_last_map(model, lambda: model(image)[0, 0], (32, 32)) == 'blocks.0'
        assert find_last_map(model, lambda: model(image) is None, (32, 32)) == 'norm'

    def test_none(self):
        model = nn.Sequential(nn.Flatten(), nn.Linear(12, 2))
        with pytest.raises(LayerError, match='no layer of Sequential gives a map'):
            find_last_map(model, lambda: model(torch.rand(1, 3, 2, 2)).sum(), (2, 2))


def test_describe_layers(backbone):
    lines = {line.split()[0]: line.split(maxsplit=2)[1:]
             for line in describe_layers(backbone, (64, 96))}
    assert lines['stages.3'] == ['Stage', '(1, 32, 2, 3)']
    assert lines['stem'] == ['Sequential', '(1, 8, 16, 24)']
    assert lines['stages.0.blocks.0.smixer.proj_in'] == ['Conv2d', '(1, 4, 16, 24)']
