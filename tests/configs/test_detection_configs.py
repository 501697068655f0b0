"""Every detection config: sizes, parameter groups, recipe, and one training step."""
import copy
import math
import re
from functools import cache
from pathlib import Path

import pytest
import torch
from mmcv.transforms import Compose
from mmdet.registry import DATASETS, MODELS
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmengine.registry import init_default_scope
from mmengine.structures import InstanceData
from torch.testing import assert_close

import spartan_mm.detection  # noqa: F401
from spartan_mm.datasets import make_digits
from spartan_mm.detection.hybrid_encoder import RepVGGBlock
from spartan_mm.engine.optim import NORM_LAYERS

CONFIGS = Path(__file__).parents[2] / 'configs' / 'detection'
# Parameters (official denoising table of 81 rows, frozen BatchNorms counted), backbone's of these.
SIZES = {'rtdetr_r18vd': (20_184_464, 11_199_968), 'rtdetr_r34vd': (31_441_668, 21_308_128),
         'rtdetr_r50vd': (42_891_372 + 53_248, 23_474_016 + 53_248),
         'rtdetr_r101vd': (76_556_268 + 105_472, 42_413_920 + 105_472),
         'rtdetr_spartan_t': (22_177_836, 3_820_296 - 257_000),
         'rtdetr_spartan_xt': (20_619_756, 2_222_792 - 193_000)}
COCO = sorted(SIZES)
# Newer recipes: epochs, first epochs of the stages, learning rates of the backbone and of all else.
RECIPES = {
    'rtdetrv2_spartan_t': (120, [117], 5e-5, 1e-4), 'rtdetrv2_spartan_xt': (120, [117], 5e-5, 1e-4),
    'rtdetrv2_r18vd': (120, [117], 1e-4, 1e-4), 'rtdetrv2_r34vd': (120, [117], 5e-5, 1e-4),
    'rtdetrv2_r50vd_m': (84, [81], 1e-5, 1e-4), 'rtdetrv2_r50vd': (72, [71], 1e-5, 1e-4),
    'deim_rtdetr_spartan_t': (74, [36, 72], 1e-4, 2e-4),
    'deim_rtdetr_spartan_xt': (74, [36, 72], 1e-4, 2e-4),
    'deim_rtdetr_r18vd': (120, [4, 64, 117], 2e-4, 2e-4),
    'deim_rtdetr_r34vd': (120, [4, 64, 117], 1e-4, 2e-4),
    'deim_rtdetr_r50vd_m': (60, [4, 34, 58], 2e-5, 2e-4),
    'deim_rtdetr_r50vd': (60, [4, 34, 58], 2e-5, 2e-4),
    'deim_rtdetr_r101vd': (60, [4, 34, 58], 2e-6, 2e-4)}

# D-FINE's: parameters, backbone's of these, epochs, stages, learning rates as above.
DFINE = {
    'dfine_n': (3_782_691, 1_850_396, 160, [148], 4e-4, 8e-4),
    'dfine_s': (10_321_875, 1_850_396, 132, [120], 1e-4, 2e-4),
    'dfine_m': (19_590_062, 6_026_626, 132, [120], 2e-5, 2e-4),
    'dfine_l': (31_289_846, 13_553_376, 80, [72], 1.25e-5, 2.5e-4),
    'dfine_x': (62_715_478, 33_325_760, 80, [72], 2.5e-6, 2.5e-4),
    'deim_dfine_n': (3_782_691, 1_850_396, 160, [4, 78, 148], 4e-4, 8e-4),
    'deim_dfine_s': (10_321_875, 1_850_396, 132, [4, 64, 120], 2e-4, 4e-4),
    'deim_dfine_m': (19_590_062, 6_026_626, 102, [4, 49, 90], 4e-5, 4e-4),
    'deim_dfine_l': (31_289_846, 13_553_376, 58, [4, 29, 50], 2.5e-5, 5e-4),
    'deim_dfine_x': (62_715_478, 33_325_760, 58, [4, 29, 50], 5e-6, 5e-4),
    'dfine_spartan_t': (20_496_950, 3_563_296, 74, [36, 72], 1e-4, 2e-4),
    'dfine_spartan_xt': (18_938_870, 2_029_792, 74, [36, 72], 1e-4, 2e-4),
    'rtdetr_r18vd_fdr': (20_419_991, 11_199_968, 72, [], 1e-5, 1e-4)}


@pytest.fixture(autouse=True)
def mmdet_scope():
    init_default_scope('mmdet')
    torch.manual_seed(0)


def load(name):
    return Config.fromfile(CONFIGS / f'{name}.py')


@cache
def build(name):
    """The model of a config, for tests that only look at it."""
    return MODELS.build(load(name).model)


def test_every_config_is_tested():
    assert {path.stem for path in CONFIGS.glob('*.py')} == {
        *COCO, *RECIPES, *DFINE, 'rtdetr_spartan_t_finetune', 'rtdetr_spartan_xt_digits',
        'rtdetr_spartan_t_distill_r50vd', 'rtdetr_spartan_t_distill_vit', 'rtdetr_timm',
        'retinanet_spartan_t'}
    for path in CONFIGS.glob('*.py'):
        assert len(path.read_text().splitlines()) <= 25, path.name


@pytest.mark.parametrize('name', COCO)
def test_number_of_parameters(name):
    model = build(name)
    total, backbone = SIZES[name]
    assert sum(p.numel() for p in model.parameters()) == total
    assert sum(p.numel() for p in model.backbone.parameters()) == backbone
    layers = {'rtdetr_r18vd': 3, 'rtdetr_r34vd': 4}.get(name, 6)
    assert (model.decoder.num_layers, model.decoder.eval_idx) == (layers, layers - 1)


def expected_group(name, kind):
    """Learning rate and weight decay of a parameter by the official rules.

    kind: Whether the parameter is a normalization's, which the official names of backbones show.
    """
    if name.startswith('backbone.'):
        return 1e-5, 0. if kind else 1e-4
    # Official names: encoder.input_proj.i.1 and decoder.enc_output.1, neither norm nor bias.
    if re.fullmatch(r'neck\.input_projs\.\d\.norm\.weight|memory_trans_norm\.weight', name):
        return 1e-4, 1e-4
    return 1e-4, 0. if 'norm' in name or 'bias' in name else 1e-4


@pytest.mark.parametrize('name', COCO)
def test_parameter_groups(name):
    config, model = load(name), build(name)
    optimizer = build_optim_wrapper(model, config.optim_wrapper).optimizer
    names = {parameter: name for name, parameter in model.named_parameters()}
    found = {names[parameter]: (group['lr'], group['weight_decay'])
             for group in optimizer.param_groups for parameter in group['params']
             if parameter in names}  # mmengine adds a group that only carries the base rate
    norms = {f'{module_name}.{leaf}' for module_name, module in model.named_modules()
             for leaf, _ in module.named_parameters(recurse=False)
             if 'Norm' in type(module).__name__}

    expected = {}
    for parameter_name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        group = expected_group(parameter_name, parameter_name in norms)
        if name == 'rtdetr_r101vd':
            group = (1e-6 if parameter_name.startswith('backbone.') else 1e-4), 1e-4
        expected[parameter_name] = group
    assert found.keys() == expected.keys()
    for parameter_name, group in expected.items():
        assert found[parameter_name] == pytest.approx(group), parameter_name
    assert optimizer.defaults['betas'] == (0.9, 0.999)


@pytest.mark.parametrize('name, spot_checks', [
    ('rtdetr_r18vd', {
        'backbone.stem.1.weight': (1e-5, 0.), 'backbone.layer1.0.downsample.1.bias': (1e-5, 0.),
        'backbone.layer2.0.conv1.weight': (1e-5, 1e-4),
        'neck.input_projs.0.norm.weight': (1e-4, 1e-4), 'neck.input_projs.0.norm.bias': (1e-4, 0.),
        'neck.aifi.self_attn.in_proj_bias': (1e-4, 0.), 'decoder.layers.0.norm2.weight': (1e-4, 0.),
        'decoder.layers.0.cross_attn.sampling_offsets.bias': (1e-4, 0.),
        'memory_trans_norm.weight': (1e-4, 1e-4), 'bbox_head.cls_branches.0.bias': (1e-4, 0.),
        'dn_query_generator.label_embedding.weight': (1e-4, 1e-4)}),
    ('rtdetr_spartan_t', {
        'backbone.stages.0.blocks.0.norm1.weight': (1e-5, 0.),
        'backbone.stages.0.blocks.0.layer_scale1': (1e-5, 1e-4),
        'backbone.stages.0.blocks.0.cmixer.complex_weight': (1e-5, 1e-4)}),
    ('rtdetr_spartan_t_finetune', {
        'backbone.stages.0.blocks.0.norm1.weight': (5e-5, 0.),
        'backbone.stages.0.blocks.0.layer_scale1': (5e-5, 1e-4),
        'neck.input_projs.0.norm.weight': (1e-4, 0.), 'bbox_head.cls_branches.0.bias': (1e-4, 0.),
        'dn_query_generator.label_embedding.weight': (1e-4, 1e-4)}),
])
def test_parameter_groups_by_hand(name, spot_checks):
    config, model = load(name), build(name)
    groups = build_optim_wrapper(model, config.optim_wrapper).optimizer.param_groups
    for parameter_name, expected in spot_checks.items():
        parameter = model.get_parameter(parameter_name)
        group, = [g for g in groups if any(p is parameter for p in g['params'])]
        assert (group['lr'], group['weight_decay']) == pytest.approx(expected), parameter_name


@pytest.mark.parametrize('name', COCO)
def test_recipe(name):
    config = load(name)
    assert config.train_cfg.max_epochs == (70 if 'spartan' in name else 72)
    assert config.train_dataloader.batch_size * 4 == 16 == config.auto_scale_lr.base_batch_size
    assert config.optim_wrapper.clip_grad.max_norm == 0.1
    assert config.sync_bn == 'torch'
    ema, = [hook for hook in config.custom_hooks if hook.type == 'EMAHook']
    assert (ema.momentum, ema.gamma, ema.update_buffers) == (1e-4, 2000, True)
    assert config.val_evaluator.proposal_nums == (1, 10, 100)
    assert config.model.test_cfg.max_per_img == 300
    assert config.train_dataloader.dataset.filter_cfg.filter_empty_gt is False
    assert config.train_dataloader.drop_last
    assert 'batch_sampler' not in config.train_dataloader
    assert [step.type for step in config.train_dataloader.dataset.pipeline] == [
        'LoadImageFromFile', 'LoadAnnotations', 'RandomPhotometricDistort', 'RandomZoomOut',
        'RandomIoUCrop', 'FilterSmallBoxes', 'RandomFlip', 'AntialiasedResize', 'FilterSmallBoxes',
        'PackDetInputs']
    sizes = build(name).data_preprocessor.batch_augments[0].sizes
    assert [height for height, _ in sizes] == [480, 512, 544, 576, 608, 640, 640, 640, 672, 704,
                                               736, 768, 800]


@pytest.mark.parametrize('name', RECIPES)
def test_newer_recipe(name):
    """Its stages and what they change at the same time, its model's groups of parameters."""
    config, (epochs, stages, backbone_lr, lr) = load(name), RECIPES[name]
    assert config.train_cfg.max_epochs == epochs
    hooks = [hook for hook in config.custom_hooks if 'Switch' in hook.type]
    assert [hook.switch_epoch for hook in hooks] == stages
    for pipeline in (config.train_dataloader.dataset.pipeline,
                     *(hook.switch_pipeline for hook in hooks)):
        Compose(pipeline)
    augments = config.model.data_preprocessor.batch_augments or []
    deim = name.startswith('deim')
    half = stages[-2] if deim else None
    assert {augment.type: augment.get('stop_epoch') for augment in augments} == (
        {} if name == 'rtdetrv2_r18vd' else
        dict(BatchMixUp=half) if deim and 'spartan' in name else
        dict(BatchMixUp=half, BatchRandomResize=stages[-1]) if deim else
        dict(BatchRandomResize=stages[-1]))
    schedule, = config.param_scheduler
    assert schedule.type == ('FlatCosineLR' if deim else 'LinearLR')
    assert not deim or (schedule.flat, schedule.tail) == (half, epochs - stages[-1])

    config.model.backbone.init_cfg = None
    model = MODELS.build(config.model)
    assert type(model.bbox_head.loss_cls).__name__ == (
        'MatchabilityAwareLoss' if deim else 'IoUAwareVarifocalLoss')
    groups = build_optim_wrapper(model, config.optim_wrapper).optimizer.param_groups
    found = {parameter: (group['lr'], group['weight_decay'])
             for group in groups for parameter in group['params']}
    biases_decay = deim or 'r18' in name or 'r50' in name
    for owner_name, owner in model.named_modules():
        for leaf, parameter in owner.named_parameters(owner_name, recurse=False):
            norm, backbone = isinstance(owner, NORM_LAYERS), leaf.startswith('backbone.')
            if parameter.requires_grad:
                plain = norm or 'bias' in leaf and not biases_decay and not backbone
                assert found[parameter] == pytest.approx((
                    backbone_lr if backbone and not (norm and deim) else lr,
                    0. if plain else 1e-4)), leaf


@pytest.mark.slow
@pytest.mark.parametrize('name', [*COCO, 'deim_rtdetr_r18vd', 'rtdetr_spartan_xt_digits'])
def test_takes_a_training_step(name):
    """Through the data preprocessor with its batch resize, and the optimizer."""
    from mmdet.structures import DetDataSample
    config = load(name)
    if config.model.data_preprocessor.get('batch_augments'):
        config.model.data_preprocessor.batch_augments[-1].sizes = (96, )
    config.model.backbone.init_cfg = None  # no downloads
    model = MODELS.build(config.model).train()
    model.init_weights()
    optim_wrapper = build_optim_wrapper(model, config.optim_wrapper)
    sample = DetDataSample(
        gt_instances=InstanceData(bboxes=torch.tensor([[10., 10., 50., 60.]]),
                                  labels=torch.tensor([1])),
        metainfo=dict(img_shape=(64, 64), ori_shape=(64, 64), scale_factor=(1., 1.)))
    before = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    data = dict(inputs=[torch.randint(0, 256, (3, 64, 64), dtype=torch.uint8)] * 2,
                data_samples=[sample, sample.clone()])
    for _ in range(3):  # what starts at zero with zeros behind it moves later than the rest
        logs = model.train_step(data, optim_wrapper)
        assert all(value.isfinite() for value in logs.values())
    layers = model.decoder.num_layers
    assert sum('loss_' in key for key in logs) == 3 * (layers + 1 + layers)
    unchanged = {n for n, p in model.named_parameters()
                 if n in before and torch.equal(p, before[n])}
    if name in ('rtdetr_r50vd', 'rtdetr_r101vd'):
        # Without pretrained weights the residual branches end in frozen scales of zero.
        unchanged = {n for n in unchanged if not n.startswith('backbone.')}
    # The coarsest map is a few pixels here: queries may lie wholly elsewhere. All else has moved.
    assert len(unchanged) <= 0.02 * len(before), sorted(unchanged)


@pytest.mark.parametrize('name', DFINE)
def test_dfine(name):
    """Its size, its stages, and its model's groups of parameters."""
    config, (size, of_backbone, epochs, stages, backbone_lr, lr) = load(name), DFINE[name]
    model = build(name)
    assert sum(p.numel() for p in model.parameters()) == size
    assert sum(p.numel() for p in model.backbone.parameters()) == of_backbone
    assert config.train_cfg.max_epochs == epochs
    assert [hook.switch_epoch for hook in config.custom_hooks if 'Switch' in hook.type] == stages
    deim = 'deim' in name or 'spartan' in name
    assert config.param_scheduler[0].type == ('FlatCosineLR' if deim else 'LinearLR')
    assert type(model.bbox_head.loss_cls).__name__ == (
        'MatchabilityAwareLoss' if deim else 'IoUAwareVarifocalLoss')
    silu = any(isinstance(part, torch.nn.SiLU) for part in model.decoder.modules())
    assert silu == ('deim' in name)

    groups = build_optim_wrapper(model, config.optim_wrapper).optimizer.param_groups
    found = {p: (group['lr'], group['weight_decay']) for group in groups for p in group['params']}
    for parameter_name, parameter in model.named_parameters():
        if parameter_name.endswith('.conv.weight') and parameter.requires_grad:
            expected = backbone_lr if parameter_name.startswith('backbone.') else lr
            assert found[parameter][0] == pytest.approx(expected), parameter_name
            assert found[parameter][1] == config.optim_wrapper.optimizer.weight_decay
    assert found[model.decoder.layers[0].norm1.weight] == pytest.approx((lr, 0.))
    biases_decay = deim and 'spartan' in name or name[-1] in 'lx'
    assert (found[model.bbox_head.base_branch[0].bias][1] > 0) == biases_decay
    frozen = {p for p in model.backbone.parameters() if not p.requires_grad}
    assert bool(frozen) == (name[-2:] in ('_l', '_x'))


@pytest.mark.slow
def test_dfine_takes_a_training_step():
    from mmdet.structures import DetDataSample
    config = load('dfine_n')
    config.model.backbone.pretrained = False
    model = MODELS.build(config.model).train()
    model.init_weights()
    sample = DetDataSample(
        gt_instances=InstanceData(bboxes=torch.tensor([[10., 10., 50., 60.]]),
                                  labels=torch.tensor([1])),
        metainfo=dict(img_shape=(64, 64), ori_shape=(64, 64), scale_factor=(1., 1.)))
    data = dict(inputs=[torch.randint(0, 256, (3, 64, 64), dtype=torch.uint8)] * 2,
                data_samples=[sample, sample.clone()])
    logs = model.train_step(data, build_optim_wrapper(model, config.optim_wrapper))
    assert all(value.isfinite() for value in logs.values())
    assert {'loss_fgl', 'd0.loss_ddf', 'pre_loss_bbox', 'd1.dn_loss_ddf', 'pre_dn_loss_cls'} <= {
        *logs}


def test_ema_decay_follows_the_official_curve():
    from mmengine.hooks import EMAHook
    from mmengine.registry import HOOKS
    settings, = [hook for hook in load('rtdetr_r18vd').custom_hooks if hook.type == 'EMAHook']
    settings.pop('priority')  # read by the runner
    hook = HOOKS.build(settings)
    assert isinstance(hook, EMAHook)
    averaged = MODELS.build(hook.ema_cfg, default_args=dict(model=torch.nn.Linear(1, 1)))
    for step in (1, 2, 100, 2000, 100_000):
        weight = torch.zeros(1)
        averaged.avg_func(weight, torch.ones(1), step)
        decay = 0.9999 * (1 - math.exp(-(step + 1) / 2000))
        assert_close(weight.item(), 1 - decay, rtol=1e-3, atol=1e-6)


def test_users_own_config_needs_only_custom_imports(tmp_path):
    (tmp_path / 'own.py').write_text(
        "custom_imports = dict(imports=['spartan_mm.detection'])\n"
        "_base_ = 'mmdet::retinanet/retinanet_r50_fpn_1x_coco.py'\n"
        "model = dict(backbone=dict(_delete_=True, type='SpaRTAN', arch='t',\n"
        '                           out_indices=(0, 1, 2, 3)),\n'
        '             neck=dict(in_channels=[32, 64, 128, 256]))\n')
    model = MODELS.build(Config.fromfile(tmp_path / 'own.py').model)
    assert [tuple(x.shape[1:]) for x in model.extract_feat(torch.rand(1, 3, 64, 64))] == [
        (256, size, size) for size in (8, 4, 2, 1, 1)]


@pytest.fixture(scope='module')
def digits(tmp_path_factory):
    return make_digits(tmp_path_factory.mktemp('data') / 'digits', 12, 4, progress=False).root


@pytest.mark.parametrize('name, size', [('rtdetr_r50vd', 640), ('rtdetr_spartan_xt_digits', 160)])
def test_pipelines_on_real_files(name, size, digits):
    config = load(name)
    for split, loader in (('train', config.train_dataloader), ('val', config.val_dataloader)):
        loader.dataset.update(data_root=str(digits), ann_file=f'annotations/{split}.json',
                              data_prefix=dict(img=split))
        dataset = DATASETS.build(loader.dataset)
        assert len(dataset) == dict(train=12, val=4)[split]  # pictures without objects included
        for sample in dataset:
            assert sample['inputs'].shape == (3, size, size)
            assert sample['inputs'].dtype == torch.uint8
            boxes = sample['data_samples'].gt_instances.bboxes.tensor
            height, width = sample['data_samples'].ori_shape
            limit = torch.tensor([size, size] * 2 if split == 'train' else [width, height] * 2)
            assert (boxes >= 0).all() and (boxes <= limit).all()


def test_mmdets_inferencer_takes_the_configs():
    from mmdet.apis import DetInferencer
    config = load('rtdetr_spartan_xt_digits')
    config.val_dataloader.dataset.metainfo = config.test_dataloader.dataset.metainfo = dict(
        classes=tuple('0123456789'))
    inferencer = DetInferencer(config, device='cpu', show_progress=False)
    picture = (torch.rand(60, 90, 3) * 255).byte().numpy()
    result, = inferencer(picture, return_datasamples=True, no_save_vis=True)['predictions']
    assert len(result.pred_instances) == 300


def test_classifier_initializes_the_backbone(tmp_path):
    from spartan_mm.backbones import SpaRTAN
    classifier = SpaRTAN('t')
    torch.save(dict(state_dict={f'backbone.{name}': tensor + 1
                                for name, tensor in classifier.state_dict().items()}),
               tmp_path / 'classifier.pth')
    config = load('rtdetr_spartan_t')
    config.merge_from_dict({  # as --cfg-options does
        'model.backbone.init_cfg.checkpoint': str(tmp_path / 'classifier.pth')})
    model = MODELS.build(config.model)
    model.init_weights()
    assert_close(dict(model.backbone.state_dict()),
                 {name: tensor + 1 for name, tensor in classifier.state_dict().items()})


def test_missing_classifier_is_an_error_with_the_remedy(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=r'init_cfg\.checkpoint=FILE'):
        MODELS.build(load('rtdetr_spartan_t').model).init_weights()


@pytest.mark.parametrize('name, fused', [('rtdetr_spartan_t', 21.38), ('rtdetr_spartan_xt', 19.82)])
def test_number_of_parameters_with_fused_blocks(name, fused):
    model = copy.deepcopy(build(name))
    for module in model.modules():
        if isinstance(module, RepVGGBlock):
            module.switch_to_deploy()
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    assert millions == pytest.approx(fused, abs=0.005)
