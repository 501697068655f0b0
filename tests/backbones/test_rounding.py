"""What rounding does to the argmax of the channel mixers, in our forms and in the authors'.

The strongest channel of a position jumps where two are nearly equal. How often it is another one
than in exact arithmetic is a matter of how well a form computes the gap between these two.

Measured once, 50 images with 710,500 argmaxes, one thread of an AMD EPYC: others than in float64
are 6 in our training form, all in one image, none in our deploy form and none in the authors' form;
of 150 images, 7 in two of them, 1 in one and 99 in two. That is too rare to tell forms apart by as
many images as a test can afford, so that the error of the gaps is compared besides.
"""
import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from spartan_mm.analysis.authors_form import to_authors_form
from spartan_mm.backbones import SpaRTAN
from spartan_mm.backbones.spartan import CMixer

IMAGES = 4  # float64 takes a second for each
pytestmark = pytest.mark.slow


def record_strengths(model):
    """A function from an image to the input of each channel mixer, of which it takes the argmax."""
    found = []
    for module in model.modules():
        if isinstance(module, CMixer):
            module.register_forward_pre_hook(lambda module, inputs: found.append(inputs[0]))

    @torch.no_grad()
    def run(x):
        found.clear()
        model(x)
        return [strength.double() for strength in found]
    return run


@pytest.fixture(scope='module')
def measured():
    """Of each form: by image the argmaxes that differ; by image and mixer the gaps' mean error."""
    torch.manual_seed(0)
    backbone = SpaRTAN('t').eval()
    for name, parameter in backbone.named_parameters():
        if 'layer_scale' in name:
            nn.init.constant_(parameter, 0.3)
    deployed = copy.deepcopy(backbone)
    deployed.switch_to_deploy()
    exact = record_strengths(copy.deepcopy(backbone).double())
    forms = {'authors': record_strengths(to_authors_form(copy.deepcopy(backbone))),
             'training form': record_strengths(backbone),
             'deploy form': record_strengths(deployed)}

    results = {form: SimpleNamespace(differing=[], errors=[]) for form in forms}
    total = 0
    for seed in range(IMAGES):
        image = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(seed))
        tops = [strength.topk(2, 1) for strength in exact(image.double())]
        total += sum(top.indices[:, 0].numel() for top in tops)
        for form, run in forms.items():
            differing, errors = 0, []
            for (values, channels), strength in zip(tops, run(image), strict=True):
                differing += (strength.argmax(1) != channels[:, 0]).sum().item()
                gap_error = (strength.gather(1, channels) - values).diff(dim=1)
                errors.append(gap_error.abs().mean())
            results[form].differing.append(differing)
            results[form].errors.append(torch.stack(errors))
    for form, result in results.items():
        result.differing = torch.tensor(result.differing)
        result.errors = torch.stack(result.errors)  # (images, mixers)
        print(f'{form}: {result.differing.sum()} of {total} argmaxes differ, '
              f'in {result.differing.count_nonzero()} of {IMAGES} images; '
              f'mean error of gaps {result.errors.mean():.2e}')
    return results


@pytest.mark.parametrize('form', ['training form', 'deploy form'])
def test_the_strongest_channel_differs_no_more_often_than_in_the_authors_form(measured, form):
    # Images, not positions: one that differs makes others after it differ. Two standard deviations
    # of the difference of two counts.
    ours, authors = (measured[name].differing.count_nonzero().item() for name in (form, 'authors'))
    assert ours - authors <= 2 * (ours + authors) ** 0.5


@pytest.mark.parametrize('form', ['training form', 'deploy form'])
def test_gaps_of_the_two_strongest_are_about_as_exact_as_in_the_authors_form(measured, form):
    # NOTE: the median is 1.15. PyTorch's group norm, which is less exact where the channels are
    # last, is all of it: with the authors' layout in that norm alone the ratio is 0.98.
    ratios = measured[form].errors / measured['authors'].errors
    assert ratios.median() < 1.3
