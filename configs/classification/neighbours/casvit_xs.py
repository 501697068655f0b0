# CAS-ViT-XS, ImageNet-1k at 224 x 224: 78.3 % top-1 (paper).
# The authors': batch, learning rate, decay, epochs, warm-up, moving average. Ours: all else; one
# size in place of several, and no teacher for the second head.
_base_ = [
    '../_base_/spartan.py', '../_base_/imagenet_224.py', '../_base_/schedule_300e.py'
]

model = dict(
    backbone=dict(_delete_=True, type='CASViT', arch='xs'),
    neck=dict(_delete_=True, type='PoolingNeck', in_channels=220),
    head=dict(type='AveragedClsHead', in_channels=220, num_branches=2))

optim_wrapper = dict(optimizer=dict(lr=6e-3, weight_decay=0.05))
custom_hooks = [*_base_.custom_hooks, dict(type='EMAHook', momentum=5e-4, update_buffers=True)]
