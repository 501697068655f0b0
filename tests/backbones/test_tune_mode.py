"""Batch norms in evaluation mode are trained within their convolutions: the same, in less."""
import copy
from contextlib import contextmanager

import pytest
import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook
from torch.testing import assert_close

from spartan_mm.backbones.layers import FoldingSequential, call_in_turn
from spartan_mm.detection import ResNetVd

from .test_neighbours import TINY
from .toy import images, make, randomise, step

BACKBONES = {kind.__name__: lambda kind=kind, **options: kind(TINY[kind], **options)
             for kind in TINY}
BACKBONES['SpaRTAN'] = lambda **options: make(**options)
BACKBONES |= {f'ResNetVd-{depth}': lambda depth=depth, **options: ResNetVd(
    depth=depth, base_channels=8, stem_channels=8, **options) for depth in (18, 50)}


def build(name, **options):
    torch.manual_seed(0)
    model = BACKBONES[name](norm_eval=True, **options).double()
    if name == 'AFFNet':  # computes these in float32
        for unit in (part for part in model.modules() if hasattr(part, 'filter')):
            unit.filter = nn.Identity()
    return randomise(model).train()


@contextmanager
def plainly():
    """Everything is called as it stands while somebody looks on."""
    handle = register_module_forward_hook(lambda *call: None)
    try:
        yield
    finally:
        handle.remove()


def count_saved(model, x):
    """Bytes of maps that a forward pass keeps for the backward pass."""
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if len(x) in tensor.shape[:1]:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        maps = model(x)
    del maps
    return sum(kept.values())


@pytest.mark.parametrize('options', [
    dict(), dict(frozen_stages=1, with_cp=True)], ids=str)
@pytest.mark.parametrize('name', BACKBONES)
def test_a_step_is_that_of_frozen_statistics(name, options):
    model, x = build(name, **options), images(2, 3, 64, 64)
    values = step(model, x)
    with plainly():
        expected = step(model, x)
    for key, value in expected.items():
        assert_close(values[key], value, rtol=1e-10, atol=1e-10 * (
            1 if value is None else value.abs().max().item()), msg=key)


@pytest.mark.parametrize('name', BACKBONES)
def test_less_is_kept(name):
    model, x = build(name), images(5, 3, 64, 64)
    folded = count_saved(model, x)
    with plainly():
        assert folded < count_saved(model, x)


class TestPairs:

    @pytest.fixture(params=['conv, norm', 'norm, conv'])
    def pair(self, request):
        torch.manual_seed(0)
        conv = nn.Conv2d(4, 4, 1)
        norm = nn.BatchNorm2d(4)
        modules = (conv, norm) if request.param == 'conv, norm' else (norm, conv)
        return randomise(FoldingSequential(*modules)).double().eval()

    @staticmethod
    def calls(pair, x):
        """Which modules are called in their own right, by a mode that sees functions."""
        seen = []

        class Watch(torch.overrides.TorchFunctionMode):
            def __torch_function__(self, function, types, args=(), kwargs=None):
                seen.append(function.__name__)
                return function(*args, **kwargs or {})

        with Watch():
            pair(x)
        return 'batch_norm' in seen

    def test_gradients(self, pair):
        x = images(2, 4, 3, 5).requires_grad_()
        inputs = [x, *pair.parameters()]
        assert not self.calls(pair, x)
        assert torch.autograd.gradcheck(
            lambda x, *parameters: torch.func.functional_call(
                pair, dict(zip(dict(pair.named_parameters()), parameters, strict=True)), (x, )),
            inputs)

    @pytest.mark.parametrize('change', [
        lambda pair: pair[0].register_forward_hook(lambda *call: None),
        lambda pair: pair[1].register_full_backward_hook(lambda *call: None),
        lambda pair: pair[1].register_forward_pre_hook(lambda *call: None),
        lambda pair: setattr(pair[0], 'forward', pair[0].forward),
        lambda pair: pair.train(),
        lambda pair: nn.utils.parametrizations.weight_norm(
            next(module for module in pair if isinstance(module, nn.Conv2d))),
    ])
    def test_called_as_they_are(self, pair, change):
        change(pair)
        assert self.calls(pair, images(2, 4, 3, 5))

    def test_without_gradients(self, pair):
        with torch.no_grad():
            assert self.calls(pair, images(2, 4, 3, 5))

    def test_norm_without_affine(self):
        conv, norm = nn.Conv2d(4, 6, 3, 2, 1, groups=2).double(), nn.BatchNorm2d(6, affine=False)
        randomise(norm.double()).eval()
        x = images(2, 4, 7, 7)
        assert_close(call_in_turn([conv, norm], x), norm(conv(x)), rtol=1e-12, atol=1e-12)

    def test_a_wider_convolution_does_not_take_the_norm_before_it(self):
        pair = FoldingSequential(nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3, padding=1)).double().eval()
        assert self.calls(pair, images(2, 4, 3, 5))

    def test_autocast(self, pair):
        pair, x = pair.float(), images(2, 4, 3, 5, dtype=torch.float32)
        with torch.autocast('cpu', torch.bfloat16):
            folded = pair(x)
            with torch.no_grad():
                plain = copy.deepcopy(pair)(x)
        assert_close(folded, plain, rtol=0.02, atol=0.02, check_dtype=True)
