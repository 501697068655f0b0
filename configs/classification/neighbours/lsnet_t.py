# LSNet-T, ImageNet-1k at 224 x 224: 74.9 % top-1 (paper).
# The authors': batch, learning rate, decay, Mixup, CutMix, erasing, moving average, biases of
# attention that do not decay. Ours: all else; no adaptive clipping of gradients.
_base_ = [
    '../_base_/spartan.py', '../_base_/imagenet_224.py', '../_base_/schedule_300e.py'
]

model = dict(
    backbone=dict(_delete_=True, type='LSNet', arch='t'),
    head=dict(type='AveragedClsHead', in_channels=384, norm='BN'),
    train_cfg=dict(augments=[dict(type='CutMix', alpha=1.0), dict(type='Mixup', alpha=0.8)]))

optim_wrapper = dict(
    optimizer=dict(lr=1e-3, weight_decay=0.025),
    paramwise_cfg=dict(rules=[
        dict(norm=True, decay_mult=0.),
        dict(pattern=r'\.bias$|\.biases$', decay_mult=0.),
    ]))
custom_hooks = [*_base_.custom_hooks, dict(type='EMAHook', momentum=4e-5, update_buffers=True)]
