"""Work is counted as it can be worked out by hand."""

import pytest
import torch
import torch.nn.functional as F

from spartan_mm.analysis.roofline import Limits, count_work, measure_limits

# As many seconds as operations, and as bytes.
LIMITS = Limits(bandwidth=1., rate=1.)


@pytest.mark.parametrize('groups', [1, 2, 8])
def test_convolution(groups):
    x, weight = torch.rand(2, 8, 6, 5), torch.rand(16, 8 // groups, 3, 3)
    work = count_work(lambda: F.conv2d(x, weight, padding=1, groups=groups), LIMITS)
    assert work.operations == 2 * (2 * 16 * 6 * 5) * (8 // groups) * 9
    assert work.bytes == 4 * (x.numel() + weight.numel() + 2 * 16 * 6 * 5)


@pytest.mark.parametrize('groups', [1, 8])
def test_backward_pass_takes_twice_the_operations(groups):
    x = torch.rand(2, 8, 6, 5, requires_grad=True)
    weight = torch.rand(16, 8 // groups, 3, 3, requires_grad=True)

    def convolve():
        return F.conv2d(x, weight, padding=1, groups=groups)

    forward = count_work(convolve, LIMITS).operations
    both = count_work(lambda: convolve().backward(torch.ones(2, 16, 6, 5)), LIMITS).operations
    assert both == 3 * forward
    x.requires_grad_(False)
    both = count_work(lambda: convolve().backward(torch.ones(2, 16, 6, 5)), LIMITS).operations
    assert both == 2 * forward


def test_products_and_attention():
    a, b = torch.rand(3, 4), torch.rand(4, 5)
    assert count_work(lambda: a @ b, LIMITS).operations == 2 * 3 * 4 * 5
    query = torch.rand(1, 2, 6, 8)
    work = count_work(lambda: F.scaled_dot_product_attention(query, query, query), LIMITS)
    assert work.operations == 2 * (2 * 2 * 6 * 6 * 8)


def test_everything_between_has_bytes_and_no_operations():
    x = torch.rand(10, 10)
    work = count_work(lambda: (x + 1).view(-1).relu_(), LIMITS)
    # The sum has two tensors, the activation one; the view does nothing.
    assert (work.operations, work.bytes, work.fused_seconds) == (0, 3 * 400, 0)


def test_time_is_of_bytes_or_operations_whichever_take_longer():
    (a, b), (c, d) = torch.rand(2, 100, 100), torch.rand(2, 100)

    def step():
        a @ b  # 2 million operations, 120,000 bytes
        c + d  # 1,200 bytes
    work = count_work(step, Limits(bandwidth=1e3, rate=1e6))
    assert work.fused_seconds == pytest.approx(120.)
    assert work.seconds == pytest.approx(121.2)
    assert count_work(step, Limits(bandwidth=1e6, rate=1e4)).fused_seconds == pytest.approx(200.)


def test_average_of_steps():
    sizes = iter([10, 30])
    work = count_work(lambda: torch.rand(2, 2) @ torch.rand(2, next(sizes)), LIMITS, steps=2)
    assert work.operations == 2 * 2 * 2 * 20


def test_limits():
    given = torch.device('cpu'), torch.float32, torch.get_num_threads()
    limits = measure_limits(*given)
    assert 1e8 < limits.bandwidth < 1e13
    assert 1e8 < limits.rate < 1e15
    assert measure_limits(*given) is limits
