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
from spartan_mm.engine.signals import SignalConsensus

pytestmark = pytest.mark.slow


def run_ranks(tmp_path, count, function):
    """Call a function in so many processes; return what each returned.

    They are new ones: after a compiled model autograd refuses to work in a fork.
    """
    for module in (sys.modules[__name__], soak):
        cloudpickle.register_pickle_by_value(module)
    (tmp_path / 'function.pkl').write_bytes(cloudpickle.dumps(function))
    code = '''
import pickle, sys
import torch
from pathlib import Path
import spartan_mm.classification, spartan_mm.detection
folder, rank, count = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
torch.distributed.init_process_group(
    'gloo', f'file://{folder}/meeting_{count}', rank=rank, world_size=count)
function = pickle.loads((folder / 'function.pkl').read_bytes())
torch.save(function(rank), folder / f'rank{rank}.pth')
torch.distributed.destroy_process_group()
'''
    arguments = [sys.executable, '-c', code, str(tmp_path)]
    processes = [subprocess.Popen([*arguments, str(rank), str(count)])
                 for rank in range(count)]
    assert [process.wait() for process in processes] == [0] * count
    return [torch.load(tmp_path / f'rank{rank}.pth') for rank in range(count)]


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


# NOTE: Shares have two images at least: from a single one, torch (2.13, on CPUs) computes wrong
# gradients of a batch norm whose output is turned into tokens.
def check_equal(tmp_path, capsys, name, make_model, batch, shares):
    """Compare the gradient of a batch with those of its shares in as many processes."""
    alone = compute_gradients(make_model(), *batch)

    def in_rank(rank):
        first = sum(shares[:rank])
        part = slice(first, first + shares[rank])
        model = MMDistributedDataParallel(make_model(), broadcast_buffers=False)
        return compute_gradients(model, batch[0][part], batch[1][part])

    largest = max(value.abs().max() for value in alone.values())
    assert largest > 5e-3
    ranks = run_ranks(tmp_path, len(shares), in_rank)
    assert all(gradients.keys() == alone.keys() for gradients in ranks)
    difference = max((gradients[key] - value).abs().max()
                     for gradients in ranks for key, value in alone.items())
    with capsys.disabled():
        print(f'\n{name}, {" + ".join(map(str, shares))} images: gradients up to {largest:.3g} '
              f'differ by at most {difference:.1e}', end='')
    assert difference < 1e-5 * max(largest, 1)


@pytest.mark.parametrize('counts, shares', [
    ((2, 0, 3, 1), (2, 2)),
    ((3, 1, 2, 0, 0), (3, 2)),  # the second process has no object, and fewer images
    ((1, 0, 0, 4, 1, 2, 3), (2, 2, 3)),
])
def test_the_detector_s_gradient_is_the_joint_batch_s(tmp_path, capsys, counts, shares):
    no_denoising = dict(num_queries=0)
    check_equal(tmp_path, capsys, 'detector', lambda: build('detection', dn_cfg=no_denoising),
                make_detection_batch(counts), shares)


def test_the_denoising_s_gradient_is_the_joint_batch_s(tmp_path, capsys):
    """Without noise, and as many objects in every image: else each process pads its own."""
    denoising = dict(num_queries=6, label_noise=0., box_noise=0.)
    check_equal(tmp_path, capsys, 'denoising', lambda: build('detection', dn_cfg=denoising),
                make_detection_batch((2, 2, 2, 2, 2)), (3, 2))


def test_the_classifier_s_gradient_is_the_joint_batch_s(tmp_path, capsys):
    check_equal(tmp_path, capsys, 'classifier', lambda: build('classification', train_cfg=None),
                make_classification_batch(6), (2, 2, 2))


def test_a_signal_is_known_to_all_one_exchange_later(tmp_path):
    def exchange(rank):
        consensus = SignalConsensus(torch.device('cpu'))
        return [consensus.exchange(15 if rank == 1 and turn == 2 else 0) for turn in range(5)]

    assert run_ranks(tmp_path, 2, exchange) == [[0, 0, 0, 15, 0]] * 2
