"""Every classification config: sizes, parameter groups, recipe, and one training step."""

import math
import re
from functools import cache
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmengine.registry import DATASETS, MODELS, PARAM_SCHEDULERS, init_default_scope
from mmengine.runner import Runner
from mmpretrain.datasets.categories import IMAGENET_CATEGORIES
from torch import nn
from torch.testing import assert_close

import spartan_mm.classification  # noqa: F401
from spartan_mm.backbones.layers import GroupNorm1
from spartan_mm.backbones.spartan import Block, SMixer

CONFIGS = Path(__file__).parents[2] / 'configs' / 'classification'
MAIN = {  # size of the images, parameters
    'spartan_xt': (256, 2_222_792), 'spartan_xt_224': (224, 2_222_792),
    'spartan_t': (256, 3_820_296), 'spartan_t_224': (224, 3_820_296)}
ABLATIONS = [f'ablations/{name}' for name in (
    'table4_conv_mlp', 'table4_smixer_mlp', 'table4_smixer_mlp_se', 'table4_conv_mlp_se',
    'table4_conv_cmixer', 'table4_smixer_cmixer', 'table5_3x3', 'table5_5x5',
    'table6_gelu_gelu', 'table6_gelu_silu', 'table6_silu_gelu', 'table6_silu_silu',
    'table7_bn_bn', 'table7_bn_ln', 'table7_ln_bn', 'table7_ln_ln',
    'table8_full', 'table8_depthwise', 'table8_hybrid')]
EXTRA = ['spartan_xt_ema', 'spartan_xt_bce']
PAPER = [*MAIN, *ABLATIONS]
ALL = [*PAPER, *EXTRA]


@pytest.fixture(autouse=True)
def mmpretrain_scope():
    init_default_scope('mmpretrain')
    torch.manual_seed(0)
    np.random.seed(0)


def load(name):
    return Config.fromfile(CONFIGS / f'{name}.py')


@cache
def build(name):
    """The model of a config, for tests that only look at it."""
    return MODELS.build(load(name).model)


def test_every_config_is_tested():
    found = {path.relative_to(CONFIGS).with_suffix('').as_posix() for path in CONFIGS.rglob('*.py')
             if path.parent.name != 'neighbours'}
    assert {name for name in found if '_base_' not in name and 'digits' not in name
            and 'spark' not in name} == set(ALL)
    for name in found:
        short = len((CONFIGS / f'{name}.py').read_text().splitlines()) <= 25
        assert short or '_base_' in name, name


@pytest.mark.parametrize('name', MAIN)
def test_number_of_parameters(name):
    assert sum(p.numel() for p in build(name).parameters()) == MAIN[name][1]


# ---- ablations -----------------------------------------------------------------------------------


def kinds(modules):
    return {type(module).__name__ for module in modules}


def describe(backbone):
    """What the paper's tables vary: mixers, low-frequency kernel, activations, norms, groups."""
    blocks = [module for module in backbone.modules() if isinstance(module, Block)]
    assert len(blocks) == 18
    inside = [module for block in blocks for module in block.modules()]
    named = dict(backbone.named_modules())
    refines = [block.cmixer.refine.conv for block in blocks if hasattr(block.cmixer, 'refine')]
    return dict(
        spatial=kinds(block.smixer for block in blocks),
        channel=kinds(block.cmixer for block in blocks),
        gated=kinds(block.cmixer.se for block in blocks) == {'SqueezeExcitation'},
        kernels={module.kernel_size[0] for block in blocks
                 if isinstance(block.smixer, SMixer) for module in block.smixer.low_freq.modules()
                 if isinstance(module, nn.Conv2d)},
        patch=kinds([*(layer.act for layer in backbone.stem),
                     *(stage.embedding.act for stage in [*backbone.stages][1:])]),
        block=kinds(module for module in inside if isinstance(module, nn.GELU | nn.SiLU)),
        before=kinds(module for name, module in named.items()
                     if re.search(r'\.norm[12]$', name)),
        after=kinds(module for name, module in named.items() if name.endswith('.norm')),
        # Of the groups of a stage's convolutions: one, one for each channel, or in between.
        full=[stage.blocks[0].smixer.high_freq.conv.groups == 1 for stage in backbone.stages
              if isinstance(stage.blocks[0].smixer, SMixer)],
        depthwise=[conv.groups == conv.in_channels for conv in refines])


HYBRID = [True, True, False, False]
DEPTHWISE = [True] * 6 + [False] * 12
SHOWN = dict(
    spatial={'SMixer'}, channel={'CMixer'}, gated=True, kernels={3}, patch={'GELU', 'SiLU'},
    block={'GELU'}, before={'GroupNorm1'}, after={'BatchNorm2d'}, full=HYBRID, depthwise=DEPTHWISE)
CONV, MLP = dict(spatial={'ConvMixer'}, kernels=set(), full=[]), dict(channel={'MLP'}, depthwise=[])
GELU, SILU = {'GELU'}, {'SiLU'}
BN, LN = {'BatchNorm2d'}, {'GroupNorm1'}


@pytest.mark.parametrize('name, changes', [
    ('table4_conv_mlp', CONV | MLP | dict(gated=False)), ('table4_conv_mlp_se', CONV | MLP),
    ('table4_smixer_mlp', MLP | dict(gated=False)), ('table4_smixer_mlp_se', MLP),
    ('table4_conv_cmixer', CONV), ('table4_smixer_cmixer', {}),
    ('table5_3x3', {}), ('table5_5x5', dict(kernels={5})),
    ('table6_gelu_gelu', dict(patch=GELU)), ('table6_gelu_silu', dict(patch=GELU, block=SILU)),
    ('table6_silu_gelu', dict(patch=SILU)), ('table6_silu_silu', dict(patch=SILU, block=SILU)),
    ('table7_bn_bn', dict(before=BN)), ('table7_bn_ln', {}),
    ('table7_ln_bn', dict(before=BN, after=LN)), ('table7_ln_ln', dict(after=LN)),
    ('table8_full', dict(full=[True] * 4, depthwise=[True] * 18)),
    ('table8_depthwise', dict(full=[False] * 4, depthwise=[False] * 18)), ('table8_hybrid', {})])
def test_ablations_differ_in_what_the_tables_say_alone(name, changes):
    assert describe(build(f'ablations/{name}').backbone) == SHOWN | changes


def test_backbone_of_the_recipe():
    assert describe(build('spartan_xt').backbone) == SHOWN


# ---- recipe --------------------------------------------------------------------------------------


def groups(model, config):
    """Learning rate and weight decay of each parameter, by name."""
    optimizer = build_optim_wrapper(model, config.optim_wrapper).optimizer
    names = {parameter: name for name, parameter in model.named_parameters()}
    return {names[parameter]: (group['lr'], group['weight_decay'])
            for group in optimizer.param_groups for parameter in group['params']
            if parameter in names}


@pytest.mark.parametrize('name', ALL)
def test_parameter_groups(name):
    """One-dimensional parameters, biases, norms and gamma do not decay, all others do."""
    config, model = load(name), build(name)
    norms = (nn.modules.batchnorm._BatchNorm, GroupNorm1, nn.LayerNorm)
    expected = {}
    for module_name, module in model.named_modules():
        for leaf, parameter in module.named_parameters(recurse=False):
            spared = (parameter.ndim == 1 or leaf in ('bias', 'gamma') or isinstance(module, norms))
            expected[f'{module_name}.{leaf}'] = (2.5e-3, 0. if spared else 0.03)
    assert groups(model, config) == expected


def test_parameter_groups_by_hand():
    config, model = load('spartan_t'), build('spartan_t')
    found = groups(model, config)
    block = 'backbone.stages.2.blocks.11.'
    for name, decay in {
            'backbone.stem.0.conv.weight': 0.03, 'backbone.stem.0.norm.weight': 0.,
            'backbone.stages.3.embedding.norm.bias': 0., f'{block}norm1.weight': 0.,
            f'{block}layer_scale1': 0.03, f'{block}layer_scale2': 0.03,
            f'{block}smixer.gamma': 0., f'{block}smixer.proj_in.weight': 0.03,
            f'{block}smixer.proj_in.bias': 0., f'{block}smixer.high_se.squeeze.bias': 0.,
            f'{block}cmixer.complex_weight': 0.03, f'{block}cmixer.refine.norm.weight': 0.,
            'head.fc.weight': 0.03, 'head.fc.bias': 0.}.items():
        assert found[name] == (2.5e-3, decay), name
    optimizer = build_optim_wrapper(model, config.optim_wrapper).optimizer
    assert type(optimizer) is torch.optim.AdamW
    assert optimizer.defaults['betas'] == (0.9, 0.999)
    assert sorted({group['weight_decay'] for group in optimizer.param_groups}) == [0., 0.03]


@pytest.mark.parametrize('name', ['spartan_xt', 'ablations/table8_full'])
def test_learning_rate_of_each_epoch(name):
    config = load(name)
    optim_wrapper = build_optim_wrapper(nn.BatchNorm1d(1), config.optim_wrapper | dict(
        constructor='DefaultOptimWrapperConstructor', paramwise_cfg=None))
    scheduler = PARAM_SCHEDULERS.build(
        config.param_scheduler, default_args=dict(optimizer=optim_wrapper, epoch_length=625))
    assert scheduler.by_epoch
    rates = []
    for _ in range(config.train_cfg.max_epochs):
        rates.append(optim_wrapper.param_groups[0]['lr'])
        optim_wrapper.optimizer.step()
        scheduler.step()
    for epoch, expected in {0: 1e-4, 1: 2.2e-4, 10: 1.3e-3, 19: 2.38e-3, 20: 2.4726954e-3,
                            150: 1.2505e-3, 299: 1.0685109e-6}.items():
        assert rates[epoch] == pytest.approx(expected, rel=1e-7), epoch
    assert len(rates) == 300
    assert rates[20:] == sorted(rates[20:], reverse=True)


@pytest.mark.parametrize('name, depth', [('spartan_xt', 18), ('spartan_t', 20)])
def test_drop_path_rate_of_each_block(name, depth):
    rates = [module.drop_path.rate for module in build(name).modules() if isinstance(module, Block)]
    assert_close(rates, [0.1 * i / depth for i in range(depth)])


@pytest.mark.parametrize('name', PAPER)
def test_recipe(name):
    config = load(name)
    assert config.train_dataloader.batch_size * 8 == 2048 == config.auto_scale_lr.base_batch_size
    assert config.train_dataloader.drop_last
    assert config.train_cfg.max_epochs == 300
    assert 'clip_grad' not in config.optim_wrapper
    assert 'sync_bn' not in config
    assert [hook.type for hook in config.custom_hooks] == [
        'ClassCountCheckHook', 'FiniteNumbersHook', 'AverageStatisticsHook']
    assert config.val_evaluator.topk == (1, 5)

    size = MAIN[name][0] if name in MAIN else 224
    for split, loader in (('train', config.train_dataloader), ('test', config.val_dataloader),
                          ('test', config.test_dataloader)):
        pipeline = loader.dataset.pipeline
        assert pipeline == config[f'{split}_pipeline']
        sizes = [step.size for step in pipeline[1].transforms if 'size' in step]
        assert set(sizes) == {size}
    assert config.model.train_cfg.augments == [
        dict(type='CutMix', alpha=1.0), dict(type='Mixup', alpha=0.2)]


def test_initialization_of_the_head():
    model = MODELS.build(load('spartan_xt').model)
    model.init_weights()
    assert model.head.fc.weight.std().item() == pytest.approx(0.02, rel=0.02)
    assert not model.head.fc.bias.any()


def test_variations():
    for name in EXTRA:
        assert load(name).train_pipeline[1].transforms[0].size == 256
    ema = load('spartan_xt_ema').custom_hooks
    assert [hook.type for hook in ema] == [
        'ClassCountCheckHook', 'FiniteNumbersHook', 'AverageStatisticsHook', 'EMAHook']
    loss = MODELS.build(load('spartan_xt_bce').model.head.loss)
    scores, labels = torch.randn(2, 1000), torch.rand(2, 1000)
    assert_close(loss(scores, labels, avg_factor=2),
                 nn.functional.binary_cross_entropy_with_logits(scores, labels))


# ---- training ------------------------------------------------------------------------------------


@pytest.fixture(scope='module')
def imagenet(tmp_path_factory):
    """Pictures without class folders, labelled by lists; images of four sizes, one of them grey."""
    root = tmp_path_factory.mktemp('imagenet')
    generator = np.random.default_rng(0)
    (root / 'meta').mkdir()
    for split in ('train', 'val'):
        (root / split).mkdir()
        lines = []
        for i, (height, width) in enumerate([(80, 120), (300, 200), (256, 256), (90, 70)]):
            picture = generator.integers(0, 256, (height // 10, width // 10, 3), np.uint8)
            picture = cv2.resize(picture, (width, height))
            cv2.imwrite(str(root / split / f'{i}.JPEG'), picture if i else picture[..., 0])
            lines.append(f'{i}.JPEG {333 * i}\n')
        (root / 'meta' / f'{split}.txt').write_text(''.join(lines))
    return root


def loader(settings, root, batch_size=4):
    settings.update(num_workers=0, persistent_workers=False, pin_memory=False,
                    batch_size=batch_size)
    settings.dataset.data_root = str(root)
    return Runner.build_dataloader(settings, seed=0)


@pytest.mark.slow
@pytest.mark.parametrize('name', ALL)
def test_takes_a_training_step(name, imagenet):
    """From the files through the pipeline, mixing, the loss and the optimizer."""
    config = load(name)
    crop = config.train_dataloader.dataset.pipeline[1].transforms[0]
    # The configs that are not in the table are variations of these.
    size = crop.size = MAIN[name][0] if name in MAIN else 96
    batch = next(iter(loader(config.train_dataloader, imagenet)))
    assert batch['inputs'].shape == (4, 3, size, size)
    assert batch['inputs'].dtype == torch.uint8
    assert {int(sample.gt_label) for sample in batch['data_samples']} <= {0, 333, 666, 999}

    model = MODELS.build(config.model).train()
    model.init_weights()
    optim_wrapper = build_optim_wrapper(model, config.optim_wrapper)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    logs = model.train_step(batch, optim_wrapper)
    expected = math.log(2) if name == 'spartan_xt_bce' else math.log(1000)
    assert logs['loss'].item() == pytest.approx(expected, rel=0.1)
    after = dict(model.named_parameters())
    assert all(parameter.isfinite().all() for parameter in after.values())
    # All units of a small squeeze may happen to be off.
    assert not [name for name in after if torch.equal(after[name], before[name])
                and not name.endswith('se.squeeze.bias')]


@pytest.mark.parametrize('name', ['spartan_xt_224', 'spartan_t'])
def test_evaluates(name, imagenet):
    config, model = load(name), MODELS.build(load(name).model).eval()
    batch = next(iter(loader(config.val_dataloader, imagenet)))
    assert batch['inputs'].shape == (4, 3, MAIN[name][0], MAIN[name][0])
    with torch.no_grad():
        results = model.val_step(batch)
    assert [int(result.gt_label) for result in results] == [0, 333, 666, 999]
    for result in results:
        assert_close(result.pred_score.sum(), torch.tensor(1.))


def test_class_folders(tmp_path, imagenet):
    """A folder for each class, no lists; the classes have mmpretrain's names."""
    for label in range(1000):
        folder = tmp_path / 'train' / f'n{label:08}'
        folder.mkdir(parents=True)
        (folder / 'x.JPEG').symlink_to(imagenet / 'train' / '0.JPEG')
    settings = load('spartan_xt_224').train_dataloader.dataset
    settings.data_root = str(tmp_path)
    dataset = DATASETS.build(settings)
    assert len(dataset) == 1000
    assert dataset.metainfo['classes'] == IMAGENET_CATEGORIES
    assert int(dataset[207]['data_samples'].gt_label) == 207
