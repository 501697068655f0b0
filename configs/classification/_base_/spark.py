# SparK (arXiv 2301.03580): 800 epochs on the pictures of ImageNet-1k, without labels.
_base_ = 'mmpretrain::_base_/default_runtime.py'
custom_imports = dict(imports=['spartan_mm.classification'], allow_failed_imports=False)

model = dict(
    type='PyramidSparK',
    data_preprocessor=dict(
        type='SelfSupDataPreprocessor',
        mean=[123.675, 116.28, 103.53],
        std=[58.395, 57.12, 57.375],
        to_rgb=True),
    mask_ratio=0.6,  # 29 of 7 x 7 squares
    backbone=dict(type='MaskedSpaRTAN', arch='xt', out_indices=(0, 1, 2, 3), drop_path_rate=0.),
    # Half the width of mmpretrain's for a ResNet-50, whose last stage has eight times as many
    # channels as SpaRTAN-T's.
    neck=dict(type='SparKLightDecoder', feature_dim=256, upsample_ratio=32,
              norm_cfg=dict(type='BN')),
    head=dict(type='SparKPretrainHead', patch_size=32, norm_pix=True,
              loss=dict(type='PixelReconstructionLoss', criterion='L2')))

data_root = 'data/imagenet/'
crop = dict(type='RandomResizedCrop', size=224, scale=(0.2, 1.0), interpolation='bicubic',
            antialias=True)
train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='TorchvisionTransforms',
         transforms=[crop, dict(type='RandomHorizontalFlip', p=0.5)]),
    dict(type='PackInputs'),
]
train_dataloader = dict(
    batch_size=512,  # per GPU; with 8 of them 4096
    num_workers=8,
    persistent_workers=True,
    pin_memory=True,
    drop_last=True,
    collate_fn=dict(type='default_collate'),
    sampler=dict(type='DefaultSampler', shuffle=True),
    dataset=dict(type='CheckedImageNet', data_root=data_root, split='train', with_label=False,
                 pipeline=train_pipeline))

train_cfg = dict(by_epoch=True, max_epochs=800)
optim_wrapper = dict(
    # Train with `--amp` on a GPU.
    type='OptimWrapper',
    constructor='RuleOptimWrapperConstructor',
    # 2e-4 for 512 images. NOTE: by default mmpretrain's LAMB clips at 1 besides.
    optimizer=dict(type='Lamb', lr=1.6e-3, betas=(0.9, 0.95), weight_decay=0.04,
                   max_grad_norm=5.0),
    clip_grad=dict(max_norm=5.0),
    # As in the recipe with labels; tokens don't decay, either.
    paramwise_cfg=dict(rules=[
        dict(norm=True, decay_mult=0.),
        dict(pattern=r'\.bias$|\.gamma$|^mask_tokens\.', decay_mult=0.),
    ]))
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-4, by_epoch=True, begin=0, end=40,
         convert_to_iter_based=True),
    dict(type='CosineAnnealingLR', by_epoch=True, begin=40, end=800, T_max=760,
         convert_to_iter_based=True),
    dict(type='CosineAnnealingWeightDecay', by_epoch=True, begin=0, end=800, T_max=800,
         eta_min=0.2, convert_to_iter_based=True),
]

custom_hooks = [dict(type='FiniteNumbersHook'), dict(type='AverageStatisticsHook')]
default_hooks = dict(checkpoint=dict(type='CheckpointHook', interval=10, max_keep_ckpts=2))
auto_scale_lr = dict(enable=False, base_batch_size=4096)
