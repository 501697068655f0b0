"""The authors' form computes what the backbone does, and is refused where there is none."""
from copy import deepcopy

import pytest
import torch
from torch.testing import assert_close

from spartan_mm.analysis.authors_form import to_authors_form
from spartan_mm.backbones import SpaRTAN

SMALL = dict(stem_channels=8, depths=(1, 2, 1, 1), channels=(8, 16, 24, 32),
             expand_ratios=(4, 4, 2, 2), conv_types=('full', 'full', 'depthwise', 'depthwise'))


def make(**options):
    """A backbone all of whose parts have a say."""
    backbone = SpaRTAN(SMALL, out_indices=(0, 1, 2, 3), **options)
    for name, parameter in backbone.named_parameters():
        if 'layer_scale' in name or 'gamma' in name:
            torch.nn.init.normal_(parameter)
    return backbone


def joined(tensors):
    """Values of the authors' form by our names."""
    ours = {}
    for name, value in tensors.items():
        if '.theta.' in name:
            ours[name.replace('theta', 'proj_in')] = torch.cat(
                [value, tensors[name.replace('theta', 'proj')]])
        elif '.proj.' not in name:
            ours[name] = value.flatten(0, -2) if 'complex_weight' in name else value
    return ours


@pytest.mark.parametrize('options', [{}, dict(with_cp=True), dict(frozen_stages=2)],
                         ids=['plain', 'with_cp', 'frozen'])
def test_same_step(options):
    ours = make(**options).double()
    authors = to_authors_form(deepcopy(ours))
    images = torch.randn(3, 3, 64, 96, dtype=torch.float64)
    outputs = []
    for backbone in (ours, authors):
        torch.manual_seed(0)  # of what drop path drops
        outputs.append(backbone.train()(images))
        sum(output.square().mean() for output in outputs[-1]).backward()
    close = dict(rtol=1e-10, atol=1e-10)
    assert_close(*outputs, **close)
    assert_close(joined(authors.state_dict()), ours.state_dict(), **close)
    gradients = [{name: parameter.grad for name, parameter in backbone.named_parameters()
                  if parameter.requires_grad} for backbone in (ours, authors)]
    assert_close(joined(gradients[1]), gradients[0], **close)


def test_mixes_under_autocast():
    ours, x = make().eval(), torch.randn(2, 8, 16, 16)
    mixers = [backbone.stages[0].blocks[0].cmixer
              for backbone in (ours, to_authors_form(deepcopy(ours)))]
    with torch.no_grad(), torch.autocast('cpu', torch.bfloat16):
        expected, found = (mixer(x) for mixer in mixers)
    assert found.dtype is expected.dtype is torch.bfloat16
    assert (found - expected).norm() < 0.01 * expected.norm()


def test_images_stay_as_they_are_laid_out():
    authors = to_authors_form(make()).eval()
    assert authors(torch.rand(2, 3, 64, 64))[0].is_contiguous()


def test_on_the_meta_device():
    authors = to_authors_form(make().to('meta'))
    output = authors(torch.empty(2, 3, 64, 64, device='meta'))[-1]
    output.sum().backward()
    assert output.shape == (2, 32, 2, 2)
    assert all(parameter.grad is not None for parameter in authors.parameters())


@pytest.mark.parametrize('options, message', [
    (dict(spatial_mixer='conv'), 'stages.0.blocks.0.smixer is ConvMixer instead of SMixer'),
    (dict(channel_mixer='mlp'), 'stages.0.blocks.0.cmixer is MLP instead of CMixer'),
    (dict(low_freq_kernel=5), 'smixer.low_freq is ConvNormAct instead of Sequential'),
    (dict(stem_act='SiLU'), 'stem.0.act is SiLU instead of GELU'),
    (dict(conv_norm='LN2d'), 'stem.0.norm is LayerNorm2d instead of BatchNorm2d'),
])
def test_other_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        to_authors_form(SpaRTAN(SMALL, **options))


def test_other_forms_are_refused():
    deployed = SpaRTAN(SMALL)
    deployed.switch_to_deploy()
    with pytest.raises(ValueError, match='stem.0.norm is Identity instead of BatchNorm2d'):
        to_authors_form(deployed)
    with pytest.raises(ValueError, match='it is AuthorsSpaRTAN instead of SpaRTAN'):
        to_authors_form(to_authors_form(SpaRTAN(SMALL)))
