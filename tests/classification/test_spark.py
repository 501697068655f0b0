"""Pre-training by SparK: its configs, its loss, a training, and what starts from it."""
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS, init_default_scope
from torch.testing import assert_close

from spartan_mm import cli
from spartan_mm.engine.settings import check_run
from spartan_mm.errors import UsageError
from spartan_mm.zoo import get_config

ARCH = dict(stem_channels=8, depths=(1, 1, 1, 1), channels=(8, 16, 24, 40),
            expand_ratios=(2, 2, 2, 2), conv_types=('full', 'full', 'depthwise', 'depthwise'))


def build(config, **changes):
    """The model of a config."""
    init_default_scope('mmpretrain')
    return MODELS.build({**config.model, **changes})


@pytest.fixture
def small():
    """The config of XT with a small backbone and decoder."""
    config = get_config('spark_spartan_xt')
    config.model.backbone.arch = ARCH
    config.model.neck.feature_dim = 32
    return config


@pytest.mark.slow
@pytest.mark.parametrize('name, widths', [('spark_spartan_xt', (192, 96, 64, 32)),
                                          ('spark_spartan_t', (256, 128, 64, 32))])
def test_configs(name, widths):
    """Widths, a gradient for every parameter, and the groups of the recipe."""
    config = get_config(name)
    model = build(config).train()
    assert tuple(token.shape[1] for token in model.mask_tokens) == widths
    assert [model.neck.feature_dim // 2**i for i in range(4)] == [256, 128, 64, 32]
    model.loss(torch.randn(2, 3, 64, 64))['loss'].backward()
    assert not [name for name, parameter in model.named_parameters()
                if parameter.grad is None or not parameter.grad.isfinite().all()]
    assert all(token.grad.any() for token in model.mask_tokens)

    optimizer = build_optim_wrapper(model, config.optim_wrapper).optimizer
    names = {parameter: name for name, parameter in model.named_parameters()}
    decays = {names[parameter]: group['weight_decay'] for group in optimizer.param_groups
              for parameter in group['params']}
    assert type(optimizer).__name__ == 'Lamb' and optimizer.defaults['lr'] == 2e-4 * 4096 / 512
    assert {name for name, decay in decays.items() if decay == 0} == {
        name for name, parameter in model.named_parameters()
        if parameter.ndim == 1 or name.endswith('.gamma') or 'mask_tokens' in name}
    assert {*decays.values()} == {0., 0.04}
    assert config.param_scheduler[2].eta_min == 0.2
    assert config.optim_wrapper.clip_grad.max_norm == 5


def test_mask_of_the_recipe(small):
    visible = build(small).draw_mask(torch.empty(8, 3, 224, 224))
    assert visible.shape == (8, 1, 7, 7)
    assert set(visible.sum((1, 2, 3)).tolist()) == {20}
    assert len({tuple(each.flatten().tolist()) for each in visible}) == 8


def test_the_loss_is_that_of_hidden_squares(small, monkeypatch):
    model = build(small).eval()
    images = torch.randn(2, 3, 64, 96)
    visible = torch.tensor([[1, 0, 0, 1, 1, 0], [0, 1, 1, 0, 0, 1]]).view(2, 1, 2, 3).bool()
    monkeypatch.setattr(model, 'draw_mask', lambda images: visible)
    drawn, errors = model.reconstruct(images, visible), []
    for sample, row, column in (~visible[:, 0]).nonzero().tolist():
        square = (sample, slice(None), slice(32 * row, 32 * row + 32),
                  slice(32 * column, 32 * column + 32))
        target = images[square]
        target = (target - target.mean()) / (target.var() + 1e-6).sqrt()
        errors.append((drawn[square] - target).square().mean())
    assert_close(model.loss(images)['loss'], torch.stack(errors).mean())


@pytest.mark.parametrize('size, message', [
    ((32, 32), 'images of 32 x 32 pixels have 1 square of 32 x 32, too few to hide 60% and'),
    ((64, 100), 'squares of 32 x 32 pixels, and images of 100 x 64 are no whole number of them')])
def test_images_of_other_sizes(small, size, message):
    with pytest.raises(UsageError, match=message):
        build(small).loss(torch.rand(2, 3, *size))


@pytest.mark.parametrize('changes, message', [
    (dict(mask_ratio=1.), r'mask_ratio=1.0 is not in \(0, 1\)'),
    (dict(head=dict(type='SparKPretrainHead', patch_size=16, loss=dict(
        type='PixelReconstructionLoss', criterion='L2'))), 'patch_size=16 and neck.* be 32'),
    (dict(backbone=dict(type='MaskedSpaRTAN', arch=ARCH, out_indices=(0, 3))),
     r'strides \(4, 32\), must be')])
def test_parts_that_do_not_fit(small, changes, message):
    with pytest.raises(UsageError, match=message):
        build(small, **changes)


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    """A folder with pictures, the config of a training of two epochs, and a run of both."""
    root = tmp_path_factory.mktemp('spark')
    for index in range(8):
        picture = np.random.default_rng(index).integers(0, 256, (90, 70, 3), np.uint8)
        (root / 'pictures').mkdir(exist_ok=True)
        cv2.imwrite(str(root / 'pictures' / f'{index}.png'), picture)
    config = get_config('spark_spartan_xt')
    config.model.backbone.arch = ARCH
    config.model.neck.feature_dim = 32
    config.train_dataloader.update(batch_size=4, num_workers=0, persistent_workers=False)
    dataset = config.train_dataloader.dataset
    dataset.update(type='CheckedImageFolder', data_root=str(root / 'pictures'), split='')
    dataset.pipeline[1].transforms[0].size = 96
    config.train_cfg.max_epochs = 2
    config.default_hooks.checkpoint.interval = 1
    config.custom_hooks += [dict(type='EMAHook', update_buffers=True)]
    config.randomness = dict(seed=0)
    config.dump(root / 'config.py')
    assert train(root, 'whole') == 0
    return root


def train(root, name, *flags):
    return cli.main(['train', str(root / 'config.py'), '--work-dir', str(root / name), *flags])


def weights_of(path):
    return torch.load(path, weights_only=False)['state_dict']


@pytest.mark.slow
def test_resumes(trained):
    """With a moving average; what was lost is the second epoch."""
    assert train(trained, 'resumed', '--resume', str(trained / 'whole' / 'epoch_1.pth')) == 0
    assert_close(weights_of(trained / 'resumed' / 'epoch_2.pth'),
                 weights_of(trained / 'whole' / 'epoch_2.pth'), rtol=0, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize('name, changes', [
    ('spartan_xt', {}), ('rtdetr_spartan_xt', dict(out_indices=(1, 2, 3)))])
def test_models_start_from_its_backbone(trained, name, changes):
    file = trained / 'whole' / 'epoch_2.pth'
    config = get_config(name)
    config.model.backbone = dict(
        type='SpaRTAN', arch=ARCH, **changes,
        init_cfg=dict(type='CheckedPretrained', prefix='backbone.', checkpoint=str(file)))
    if name == 'spartan_xt':
        config.model.head.in_channels = 40
    else:
        config.model.neck.in_channels = [16, 24, 40]
    init_default_scope(config.default_scope)
    model = MODELS.build(config.model)
    model.init_weights()
    weights = weights_of(file)
    assert_close(model.backbone.state_dict(), {
        key.removeprefix('backbone.'): value for key, value in weights.items()
        if key.startswith('backbone.')}, rtol=0, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize('words', [
    'infer {pictures} {config} {checkpoint}', 'test {config} {checkpoint}', 'flops spark_spartan_t',
    'deploy {config} {checkpoint} {out}', 'train {classes} --model spark_spartan_t'])
def test_what_needs_predictions_says_so(trained, words, capsys, user_project):
    places = dict(pictures=trained / 'pictures', config=trained / 'config.py',
                  classes=user_project / 'classes',
                  checkpoint=trained / 'whole' / 'epoch_2.pth', out=trained / 'deployed.pth')
    assert cli.main([str(places.get(word.strip('{}'), word)) for word in words.split()]) == 2
    message = capsys.readouterr().err
    assert 'pre-trains a backbone and predicts nothing: start a classifier or detector' in message
    assert not Path(places['out']).exists()


def test_config_without_a_file():
    with pytest.raises(UsageError, match='the config pre-trains a backbone'):
        check_run(Config(dict(model=dict(type='PyramidSparK'))), 'test')
