"""What several processes compute together is what one computes alone."""

import subprocess
import sys

import cloudpickle
import pytest
import soak
import torch
from mmdet.structures import DetDataSample
from mmengine.config import Config
from mmengine.model import MMDistributedDataParallel
from mmengine.registry import DefaultScope
from mmengine.structures import InstanceData
from mmpretrain.structures import DataSample
from torch import nn

import spartan_mm.classification  # noqa: F401
import spartan_mm.detection  # noqa: F401
from spartan_mm.detection import DistillationWeightHook
from spartan_mm.engine.signals import SignalConsensus

pytestmark = pytest.mark.slow


def run_ranks(folder, count, functions):
    """Call functions in so many processes; return what each returned there, by their names.

    They are new processes: after a compiled model autograd refuses to work in a fork.
    """
    for module in (sys.modules[__name__], soak):
        cloudpickle.register_pickle_by_value(module)
    (folder / 'functions.pkl').write_bytes(cloudpickle.dumps(functions))
    code = '''
import pickle, sys
import torch
from pathlib import Path
import spartan_mm.classification, spartan_mm.detection
folder, rank, count = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
torch.distributed.init_process_group(
    'gloo', f'file://{folder}/meeting_{count}', rank=rank, world_size=count)
functions = pickle.loads((folder / 'functions.pkl').read_bytes())
torch.save({name: function(rank) for name, function in functions.items()},
           folder / f'rank{rank}.pth')
torch.distributed.destroy_process_group()
'''
    arguments = [sys.executable, '-c', code, str(folder)]
    processes = [subprocess.Popen([*arguments, str(rank), str(count)])
                 for rank in range(count)]
    assert [process.wait() for process in processes] == [0] * count
    ranks = [torch.load(folder / f'rank{rank}.pth') for rank in range(count)]
    return {name: [returned[name] for returned in ranks] for name in functions}


def build(task, **changes):
    """Build a small model in double precision, without anything random or of the whole batch."""
    from mmdet.registry import MODELS as DETECTORS
    from mmpretrain.registry import MODELS as CLASSIFIERS
    text = soak.CONFIGS[task].format(root='', workers=0, metric='', ema='', epochs=1)
    model = Config.fromstring(text, '.py').model
    model.backbone.drop_path_rate = 0.
    model.update(changes)
    with DefaultScope.overwrite_default_scope(
            'mmdet' if task == 'detection' else 'mmpretrain'):
        torch.manual_seed(1)
        model = (DETECTORS if task == 'detection' else CLASSIFIERS).build(model)
        model.init_weights()
    # Away from the start, at which the regression of boxes has no gradient.
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
    model.double().train()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()
    return model


def make_detection_batch(counts):
    generator = torch.Generator().manual_seed(2)
    samples = []
    for count in counts:
        corners = torch.rand(count, 2, 2, generator=generator).sort(1).values.flatten(1) * 60
        corners[:, 2:] += 4
        samples.append(DetDataSample(
            gt_instances=InstanceData(
                bboxes=corners, labels=torch.randint(0, 2, (count,), generator=generator)),
            metainfo=dict(img_shape=(64, 64), batch_input_shape=(64, 64))))
    return torch.rand(len(counts), 3, 64, 64, generator=generator).double(), samples


def make_classification_batch(count):
    generator = torch.Generator().manual_seed(2)
    images = torch.rand(count, 3, 64, 64, generator=generator).double()
    return images, [DataSample().set_gt_label(index % 2) for index in range(count)]


def compute_gradients(model, images, samples):
    """Gradients of the joint loss, in a wrapper where there are several processes."""
    own = model.module if hasattr(model, 'module') else model
    losses, _ = own.parse_losses(model(images, samples, mode='loss'))
    losses.backward()
    return {name: parameter.grad for name, parameter in own.named_parameters()
            if parameter.requires_grad}


def in_shares(make_model, batch, shares):
    """A function of the rank: the gradient of its share of a batch."""
    def compute(rank):
        first = sum(shares[:rank])
        part = slice(first, first + shares[rank])
        model = MMDistributedDataParallel(make_model(), broadcast_buffers=False)
        return compute_gradients(model, batch[0][part], batch[1][part])
    return compute


def exchange(rank):
    consensus = SignalConsensus(torch.device('cpu'))
    return [consensus.exchange(15 if rank == 1 and turn == 2 else 0) for turn in range(5)]


def make_detector():
    return build('detection', dn_cfg=dict(num_queries=0))


def make_denoiser():
    """Without noise, and with as many objects in every image: else each process pads its own."""
    return build('detection', dn_cfg=dict(num_queries=6, label_noise=0., box_noise=0.))


def make_dfine():
    """Its distillation compares means of each process' own queries, not sums of all."""
    return build('detection', **DFINE, dn_cfg=dict(num_queries=0))


def make_dfine_with_all():
    """Its denoising differs with the process, too."""
    return build('detection', **(DFINE | dict(
        bbox_head=dict(type='DFINEHead', num_classes=2, embed_dims=32))),
        dn_cfg=dict(num_queries=6))


def make_taught():
    """By a detector that is sure of something in every picture."""
    model = build('detection', dn_cfg=dict(num_queries=0), distillation=dict(
        type='DetectorDistillation', teacher=dict(checkpoint='none')))
    teacher = build('detection', dn_cfg=dict(num_queries=3)).eval().requires_grad_(False)
    for branch in teacher.bbox_head.cls_branches:
        branch.bias.add_(4)
    model.distillation.teacher._module = teacher
    return model


def adapt_weight(rank):
    """The weight of a distillation, where each process measured another share."""
    hook = DistillationWeightHook(share=0.11, tolerance=0.01)
    hook._weight, hook._total, hook._steps = 5., torch.tensor(0.02 + 0.06 * rank), 1
    hook.after_train_epoch(None)
    return hook._weight


def make_classifier():
    return build('classification', train_cfg=None)


DFINE = dict(
    decoder=dict(type='DFINEDecoder', in_channels=[32] * 3, embed_dims=32, num_layers=2,
                 num_heads=4, num_points=[2, 4, 1], ffn_dims=32),
    bbox_head=dict(type='DFINEHead', num_classes=2, embed_dims=32, ddf_weight=0.))

# NOTE: Shares have two images at least: from a single one, torch (2.13, on CPUs) computes wrong
# gradients of a batch norm whose output is turned into tokens.
CASES = {
    'detector': (make_detector, make_detection_batch((2, 0, 3, 1)), (2, 2)),
    'detector with a process without objects, and with fewer images':
        (make_detector, make_detection_batch((3, 1, 2, 0, 0)), (3, 2)),
    'detector in three': (make_detector, make_detection_batch((1, 0, 0, 4, 1, 2, 3)), (2, 2, 3)),
    'denoising': (make_denoiser, make_detection_batch((2, 2, 2, 2, 2)), (3, 2)),
    'D-FINE with a process without objects':
        (make_dfine, make_detection_batch((3, 1, 2, 0, 0)), (3, 2)),
    'taught by another detector':
        (make_taught, make_detection_batch((3, 1, 2, 0, 0)), (3, 2)),
    'classifier': (make_classifier, make_classification_batch(6), (2, 2, 2)),
}


@pytest.fixture(scope='module')
def returned(tmp_path_factory):
    """What two processes returned, and three, by name."""
    found = {}
    for count in (2, 3):
        functions = {name: in_shares(*case) for name, case in CASES.items()
                     if len(case[-1]) == count} | dict(
                         exchange=exchange, adapt_weight=adapt_weight)
        if count == 2:
            functions['all of D-FINE'] = in_shares(
                make_dfine_with_all, make_detection_batch((3, 0, 0, 0)), (2, 2))
        found |= run_ranks(tmp_path_factory.mktemp('ranks'), count, functions)
    return found


@pytest.mark.parametrize('name', CASES)
def test_the_gradient_is_the_joint_batch_s(returned, capsys, name):
    make_model, batch, shares = CASES[name]
    alone = compute_gradients(make_model(), *batch)
    largest = max(value.abs().max() for value in alone.values())
    assert largest > 5e-3
    ranks = returned[name]
    assert all(gradients.keys() == alone.keys() for gradients in ranks)
    difference = max((gradients[key] - value).abs().max()
                     for gradients in ranks for key, value in alone.items())
    with capsys.disabled():
        print(f'\n{name}, {" + ".join(map(str, shares))} images: gradients up to {largest:.3g} '
              f'differ by at most {difference:.1e}', end='')
    assert difference < 1e-5 * max(largest, 1)


def test_processes_with_and_without_objects_have_the_same_graph(returned):
    first, second, *_ = returned['all of D-FINE']
    assert all(gradient is not None for gradient in first.values())
    assert all(torch.equal(gradient, second[name]) for name, gradient in first.items())
    assert any(gradient.any() for gradient in first.values())


def test_a_signal_is_known_to_all_one_exchange_later(returned):
    assert returned['exchange'] == [[0, 0, 0, 15, 0]] * 3


def test_a_teacher_has_the_same_weight_in_all(returned):
    """That of the mean share, 0.08 of three."""
    assert returned['adapt_weight'] == [pytest.approx(5 * 0.1 * 0.92 / (0.08 * 0.9))] * 3
    assert len({*returned['adapt_weight']}) == 1
