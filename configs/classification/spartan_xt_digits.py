# SpaRTAN-XT that learns handwritten digits from scratch in minutes on two CPU cores.
_base_ = ['./_base_/spartan.py', './_base_/digits.py', './_base_/schedule_300e.py']

model = dict(
    # As the detector of digits has it, which can start from this backbone.
    data_preprocessor=dict(num_classes=10, mean=[0, 0, 0], std=[255, 255, 255]),
    backbone=dict(drop_path_rate=0.),
    head=dict(num_classes=10, loss=dict(_delete_=True, type='CrossEntropyLoss')),
    train_cfg=dict(_delete_=True))

train_cfg = dict(max_epochs=12)  # of 1438 // 32 = 44 steps
optim_wrapper = dict(optimizer=dict(lr=2e-3))
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=40),
    dict(type='CosineAnnealingLR', by_epoch=True, begin=0, end=12, eta_min=1e-5,
         convert_to_iter_based=True),
]
custom_hooks = [dict(type='ClassCountCheckHook'), dict(type='FiniteNumbersHook')]
default_hooks = dict(
    logger=dict(interval=10),
    checkpoint=dict(_delete_=True, type='CheckpointHook', interval=1, max_keep_ckpts=1))
auto_scale_lr = dict(base_batch_size=32)
randomness = dict(seed=0)
