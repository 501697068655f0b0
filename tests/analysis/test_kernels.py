"""Kernels of what is known by hand, and the bars that SpaRTAN's numbers must stay below."""
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from spartan_mm.analysis.authors_form import to_authors_form
from spartan_mm.analysis.benchmark import Form, Group, Workload, count_group
from spartan_mm.analysis.kernels import count_step, kernels_table
from spartan_mm.backbones import SpaRTAN
from spartan_mm.errors import UsageError


def empty(*shape, **options):
    return torch.empty(shape, device='meta', **options)


@pytest.mark.parametrize('step, expected', [
    (lambda: empty(2, 3) + empty(2, 3), {'add': (1, 3 * 24)}),
    (lambda: empty(2, 3).add_(empty(3)), {'add_': (1, 24 + 12)}),
    (lambda: torch.mul(empty(4), empty(4), out=empty(4)), {'mul': (1, 3 * 16)}),
    (lambda: empty(4).square(), {'pow': (1, 2 * 16)}),
    (lambda: empty(1, 3).expand(5, 3).exp(), {'exp': (1, 2 * 60)}),
    (lambda: empty(2, 3).t().reshape(3, 2).view(3, 2)[0].detach(), {}),
    (lambda: torch.ones(3) + torch.ones(3), {}),  # on another device
    (lambda: torch.ones(3).to('meta'), {'_to_copy': (1, 12)}),
], ids=['out of place', 'in place', 'out', 'one input', 'expanded', 'views', 'host', 'copy'])
def test_kernels_of_a_step(step, expected):
    found = count_step(step)
    assert found.by_operation == expected
    assert found.kernels == len(expected)
    assert found.bytes == sum(size for _, size in expected.values())


def test_what_is_read_is_zero():
    values = []
    found = count_step(lambda: values.extend([
        empty(2).cpu(), empty().item(), bool(empty() > 1), empty(1, dtype=torch.int64).item()]))
    torch.testing.assert_close(values, [torch.zeros(2), 0., False, 0])
    assert found.by_operation == {'_to_copy': (1, 8), '_local_scalar_dense': (3, 4 + 1 + 8),
                                  'gt': (1, 4 + 1)}


def test_attention_is_one_kernel():
    query = empty(2, 4, 8, 16, requires_grad=True)
    found = count_step(lambda: F.scaled_dot_product_attention(query, query, query, empty(8, 8)))
    # Query, key and value are one tensor; output, and the logarithms of sums for the gradient.
    assert found.bytes == 4 * (2 * 2 * 4 * 8 * 16 + 8 * 8 + 2 * 4 * 8)
    assert found.kernels == 1


def test_a_convolution():
    convolution = nn.Conv2d(3, 8, 1, device='meta')
    with torch.no_grad():
        found = count_step(lambda: convolution(empty(2, 3, 4, 4)))
    assert found.by_operation == {'convolution': (1, 4 * (2 * 3 * 16 + 24 + 8 + 2 * 8 * 16))}


@pytest.fixture
def backbone():
    with torch.device('meta'):
        return SpaRTAN('t')


def count(backbone, train):
    """The kernels of a batch of 256 images; in training, of a loss of the last map."""
    images = empty(256, 3, 224, 224)
    with torch.set_grad_enabled(train):
        backbone.train(train)
        return count_step(lambda: backbone(images)[-1].sum().backward() if train
                          else backbone(images))


@pytest.mark.parametrize('form, train, kernels, gigabytes', [
    ('training', True, 2950, 260), ('training', False, 1000, 85), ('deploy', False, 900, 75)])
def test_spartan_stays_below(form, train, kernels, gigabytes, backbone):
    if form == 'deploy':
        backbone.switch_to_deploy()
    found = count(backbone, train)
    assert found.kernels <= kernels and found.bytes <= 1e9 * gigabytes


def test_authors_code_has_more(backbone):
    found = count(to_authors_form(backbone), train=True)
    assert found.kernels == pytest.approx(2934, rel=0.01)
    assert found.bytes == pytest.approx(306e9, rel=0.01)


@pytest.mark.slow
def test_a_detector_stays_below():
    found, = count_group(Group(Workload(True, batch=16, sizes=((640, 640), )),
                               (Form('rtdetr_spartan_t'), ))).values()
    assert found.kernels <= 5050 and found.bytes <= 195e9


@pytest.mark.slow
def test_training_step_of_a_detector(user_project):
    """With the matching, which reads numbers."""
    detector = str(user_project / 'user_detector.py')
    group = Group(Workload(True, batch=2, sizes=((64, 64), )),
                  (Form(detector), Form(detector, authors=True)))
    counts = count_group(group)
    assert list(counts) == ['user_detector, eager', "user_detector, authors' code"]
    plain, authors = counts.values()
    assert plain.by_operation['_cdist_forward'][0] == 1  # of the matching
    attention = '_scaled_dot_product_flash_attention_for_cpu'
    assert plain.by_operation[attention][0] == plain.by_operation[f'{attention}_backward'][0] > 0
    assert 'scatter_add_' in plain.by_operation and 'scatter_add_' not in authors.by_operation

    lines = kernels_table(counts, most=3).splitlines()
    assert len(lines) == 6
    assert lines[2].startswith(f'| total | {plain.kernels} | {plain.bytes / 1e9:.2f} | ')


@pytest.mark.parametrize('workload, form', [(dict(amp='float16'), {}),
                                            ({}, dict(compile='default'))])
def test_what_is_not_counted(workload, form):
    with pytest.raises(UsageError, match='kernels are counted in float32'):
        count_group(Group(Workload(**workload), (Form('xt', **form), )))
