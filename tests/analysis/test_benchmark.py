"""The benchmark measures what it says, on forms of a model that do the same."""

import json

import pytest
import torch

from spartan_mm.analysis import benchmark
from spartan_mm.analysis.benchmark import (
    Form,
    Group,
    Subject,
    Summary,
    Workload,
    run_group,
    speedup,
    table,
    throughput,
)
from spartan_mm.errors import UsageError

SMALL = ((32, 32), )
RESNET = "dict(backbone=dict(_delete_=True, type='ResNet', depth=18), head=dict(in_channels=512))"


@pytest.fixture
def detector(user_project):
    return str(user_project / 'user_detector.py')


@pytest.fixture
def classifier(user_project):
    return str(user_project / 'user_classifier.py')


@pytest.mark.slow
def test_backbone_beside_the_authors_code():
    group = Group(Workload(True, batch=2, sizes=SMALL),
                  (Form('xt'), Form('xt', channels_last=True), Form('xt', authors=True)), rounds=3,
                  warm_up=0)
    measured = json.loads(json.dumps(run_group(group)))

    assert [result['label'] for result in measured['results']] == [
        'eager', 'channels last', "authors' code"]
    for result in measured['results']:
        assert len(result['times']) == 3 and min(result['times']) > 0
        weights = 4 * sum(p.numel() for p in benchmark.SpaRTAN('xt').parameters())
        # And images, running statistics.
        assert weights < result['held_memory'] < 1.1 * weights
        # Of every weight a gradient, and activations.
        assert result['peak_memory'] > result['held_memory'] + weights
        assert result['work']['operations'] > 0
        assert 0 < result['work']['fused_seconds'] < result['work']['seconds']
    assert measured['machine']['torch'] == torch.__version__
    text = table(measured)
    assert text.count('\n') == 5
    assert "| xt | authors' code |" in text and '| 1.00 (1.00–1.00) | 100 |' in text


@pytest.mark.parametrize('form', [dict(authors=True), dict(fused=True)])
def test_forms_of_a_backbone_compute_the_same(form):
    workload = Workload(batch=2, sizes=SMALL)
    plain, other = (Subject(Form('xt', **options), workload) for options in ({}, form))
    images = plain.inputs[0][0]
    torch.testing.assert_close(images, other.inputs[0][0])
    with torch.no_grad():
        torch.testing.assert_close(other.model(images), plain.model(images), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('form, block', [(dict(authors=True), 'AuthorsBlock'),
                                         (dict(fused=True), 'FusedBlock')])
def test_forms_of_the_backbone_in_a_detector(form, block, detector):
    subject = Subject(Form(detector, **form), Workload(True, batch=2, sizes=SMALL))
    assert type(subject.model.backbone.stages[0].blocks[0]).__name__ == block
    subject.step()
    assert all(parameter.grad is not None for parameter in subject.model.backbone.parameters())


def test_work_grows_with_the_batch(classifier):
    one, two = (run_group(Group(Workload(True, batch=batch, sizes=((64, 64), )),
                                (Form(classifier), ), rounds=1, warm_up=0))['results'][0]
                for batch in (4, 8))
    assert two['work']['operations'] == 2 * one['work']['operations']
    activations = [result['peak_memory'] - result['held_memory'] for result in (one, two)]
    assert 1.6 < activations[1] / activations[0] < 2


@pytest.mark.slow
@pytest.mark.parametrize('amp', [None, 'bfloat16'])
def test_parts_of_a_training_step(detector, amp):
    group = Group(Workload(True, amp=amp), (Form(detector), ), rounds=2, warm_up=1, parts=True)
    result, = run_group(group)['results']
    assert result['batch'] == 2 and result['sizes'] == ((64, 64), )  # as the config has it
    parts = result['parts']
    assert parts.keys() == {'backbone', 'neck', 'decoder', 'head and losses', 'matching',
                            'rest of the forward pass', 'backward', 'optimizer'}
    assert min(parts.values()) > 0
    # The step without the optimiser's, measured in another way.
    without = sum(parts.values()) - parts['optimizer']
    assert 0.3 < without / Summary.of(result['times']).median < 3


def test_classifier(classifier):
    group = Group(Workload(True), (Form(classifier), ), rounds=1, warm_up=0, parts=True)
    result, = run_group(group)['results']
    assert result['batch'] == 4 and result['sizes'] == ((32, 32), )
    assert {'backbone', 'neck', 'head'} < result['parts'].keys()
    inference, = run_group(Group(Workload(), (Form(classifier), ), rounds=1))['results']
    assert inference['batch'] == 1


def test_multi_scale(user_project, detector):
    path = user_project / 'multi_scale.py'
    path.write_text(
        f"_base_ = {detector!r}\nmodel = dict(data_preprocessor=dict(\n"
        "    batch_augments=[dict(type='BatchRandomResize', sizes=(32, 64))]))\n")
    group = Group(Workload(True, multi_scale=True), (Form(str(path)), ), rounds=3, warm_up=0)
    result, = run_group(group)['results']
    assert result['sizes'] == ((32, 32), (64, 64))
    assert len(result['times']) == 4  # both sizes as often
    subject = Subject(Form(str(path)), Workload(True, multi_scale=True))
    assert [len(images) for images, _ in subject.inputs] == [2, 2]
    assert subject.inputs[1][1][0].batch_input_shape == (64, 64)


def test_forms_take_turns(monkeypatch):
    order = []

    class Fake:
        sizes, device = SMALL, torch.device('cpu')

        def __init__(self, name):
            self.name = name

        def step(self):
            order.append(self.name)

    group = Group(Workload(), (Form('a'), Form('b')), rounds=3)
    times = dict(benchmark._take_turns([Fake('a'), Fake('b')], group, lambda text: None))
    assert order == ['a', 'b'] * 3
    assert [len(values) for values in times.values()] == [3, 3]


class TestNumbers:

    def test_speedup_is_of_pairs(self):
        """A slow moment that hits both of a pair changes nothing."""
        ours, reference = dict(times=[1., 10., 2.]), dict(times=[3., 30., 6.])
        assert speedup(ours, reference) == Summary(3., 3., 3.)

    def test_summary(self):
        assert Summary.of([5., 1., 2., 3., 4.]) == Summary(3., 2., 4.)
        assert Summary.of([2.]).write(1e3) == '2000.0 (2000.0–2000.0)'

    def test_throughput(self):
        assert throughput(dict(times=[1., 2., 100.], batch=4, sizes=[(8, 8)])) == 2.
        # Of several sizes, each belongs to it.
        assert throughput(dict(times=[1., 3.], batch=4, sizes=[(8, 8), (16, 16)])) == 2.


class TestMistakes:

    @pytest.mark.parametrize('options, message', [
        (dict(batch=0), 'batch 0 must be at least 1'),
        (dict(amp='float64'), "amp 'float64' must be one of float16, bfloat16"),
        (dict(sizes=((0, 8), )), 'must be pairs of positive numbers'),
        (dict(sizes=SMALL, multi_scale=True), 'choose one of the two'),
        (dict(device='tpu'), "device 'tpu' must be cpu or cuda"),
    ])
    def test_workload(self, options, message):
        with pytest.raises(UsageError, match=message):
            Workload(**options)

    @pytest.mark.parametrize('workload, options, message', [
        (dict(train=True), dict(deploy=True), 'the deploy form cannot be trained'),
        (dict(), dict(deploy=True, authors=True), 'has neither a deploy form nor a fused one'),
        (dict(device='cuda'), dict(fused=True), 'the fused form is for a CPU'),
    ])
    def test_group(self, workload, options, message):
        with pytest.raises(UsageError, match=message):
            Group(Workload(**workload), (Form('xt', **options), ))

    def test_parts(self):
        with pytest.raises(UsageError, match='parts are those of a training step'):
            Group(Workload(), (Form('xt'), ), parts=True)
        with pytest.raises(UsageError, match='xt has no config'):
            run_group(Group(Workload(True, batch=2, sizes=SMALL), (Form('xt'), ), rounds=1,
                            warm_up=0, parts=True))

    @pytest.mark.parametrize('change, form, workload, message', [
        ('test_dataloader = dict(_delete_=True)', {}, {}, 'does not say .* how large'),
        ('', {}, dict(multi_scale=True), 'does not train at several scales'),
        (f'model = {RESNET}', dict(authors=True), {}, 'has no SpaRTAN backbone'),
        (f'model = {RESNET}', dict(fused=True), {}, 'has no SpaRTAN backbone'),
        ("model = dict(backbone=dict(spatial_mixer='conv'))", dict(authors=True), {},
         'smixer is ConvMixer instead of SMixer'),
    ])
    def test_subject(self, change, form, workload, message, tmp_path, classifier):
        path = tmp_path / 'config.py'
        path.write_text(f'_base_ = {classifier!r}\n{change}\n')
        with pytest.raises(UsageError, match=message):
            Subject(Form(str(path), **form), Workload(**workload))

    @pytest.mark.parametrize('device, message', [
        ('meta', 'nothing is computed that could be timed'),
        pytest.param('cuda', 'torch finds no GPU', marks=pytest.mark.skipif(
            torch.cuda.is_available(), reason='there is a GPU'))])
    def test_device(self, device, message):
        with pytest.raises(UsageError, match=message):
            run_group(Group(Workload(device=device), (Form('xt'), )))
