import copy

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.testing import assert_close

from spartan_mm.detection.shape_cache import MAX_SHAPES, cached_by_shape


@pytest.fixture
def made():
    """A cached function and the list of sizes that it was really called with."""
    calls = []

    @cached_by_shape
    def ramp(size, device=None):
        calls.append(size)
        return torch.arange(float(size), device=device)

    ramp.calls = calls
    return ramp


def test_a_shape_is_made_once(made):
    assert made(3) is made(3) and made(4) is not made(3)
    assert made.calls == [3, 4]
    assert_close(made(3), torch.tensor([0., 1., 2.]))


def test_number_of_shapes_is_bounded(made):
    for size in range(MAX_SHAPES + 1):
        made(size)
    made(MAX_SHAPES)
    made(0)
    assert made.calls[MAX_SHAPES:] == [MAX_SHAPES, 0]


def test_devices_have_their_own(made):
    assert made(3, device=torch.device('meta')).is_meta
    assert not made(3, device=torch.device('cpu')).is_meta


def test_made_in_inference_mode_serves_a_training(made):
    with torch.inference_mode():
        first = made(3)
    assert not first.is_inference()
    factor = torch.ones(3, requires_grad=True)
    (factor * made(3)).sum().backward()
    assert_close(factor.grad, made(3))


def test_nothing_without_values_is_kept(made):
    with FakeTensorMode():
        made(3)
    assert type(made(3)) is torch.Tensor


def test_compiled_code_has_no_look_up(made):
    compiled = torch.compile(lambda x: x + made(x.shape[0]), backend='eager', fullgraph=True)
    assert_close(compiled(torch.ones(3)), torch.tensor([1., 2., 3.]))
    made.calls.clear()
    made(3)
    assert made.calls == [3]


def test_models_hold_none_of_it(build):
    model = build().eval()
    names = set(model.state_dict())
    with torch.inference_mode():
        model.infer(torch.rand(1, 3, 64, 64))
    assert set(model.state_dict()) == names
    twin = copy.deepcopy(model).train()
    maps = twin.neck(twin.backbone(torch.rand(2, 3, 64, 64)))
    sum(x.sum() for x in maps).backward()
