# SpaRTAN's schedule: 300 epochs of AdamW with 2048 images a step, no gradient clipping.
_base_ = 'mmpretrain::_base_/default_runtime.py'

train_cfg = dict(by_epoch=True, max_epochs=300, val_interval=1)
val_cfg = dict()
test_cfg = dict()

optim_wrapper = dict(
    # The recipe is float16: train with `--amp`, which is a switch because it takes a GPU to pay.
    type='OptimWrapper',
    # 1 step for 2048 images: 8 GPUs x 256. On N GPUs set this to 8 / N, on any other number of
    # images let `--auto-scale-lr` scale the learning rate (it does not know of accumulation).
    accumulative_counts=1,
    constructor='RuleOptimWrapperConstructor',
    optimizer=dict(type='AdamW', lr=2.5e-3, betas=(0.9, 0.999), weight_decay=0.03),
    # These are all one-dimensional parameters, and gamma of the SMixers. What else has more than
    # one dimension decays, layer scales and complex weights included.
    paramwise_cfg=dict(rules=[
        dict(norm=True, decay_mult=0.),
        dict(pattern=r'\.bias$|\.gamma$', decay_mult=0.),
        # Where low_freq_kernel is 'dcls' or 'dcls_gaussian'; as its authors have it.
        dict(pattern=r'\.positions$', lr_mult=5., decay_mult=0., optional=True),
        dict(pattern=r'\.widths$', decay_mult=0., optional=True),
    ]))
# For each whole epoch e: from 1e-4 up to 2.5e-3, and 1e-6 + 2.499e-3 (1 + cos(pi e / 300)) / 2
# from e = 20 on. NOTE: The authors' loop sets an epoch's rate one epoch late, by a slip.
param_scheduler = dict(
    type='WarmupCosineLR', warmup=20, start_factor=1e-4 / 2.5e-3, eta_min=1e-6, end=300)

custom_hooks = [dict(type='ClassCountCheckHook'), dict(type='FiniteNumbersHook'),
                dict(type='AverageStatisticsHook')]
default_hooks = dict(
    checkpoint=dict(type='CheckpointHook', interval=1, max_keep_ckpts=3,
                    save_best='accuracy/top1'))

auto_scale_lr = dict(enable=False, base_batch_size=2048)
