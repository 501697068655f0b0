# UniRepLKNet-A, ImageNet-1k at 224 x 224: 77.0 % top-1 (paper).
# The authors': batch, learning rate, Mixup, CutMix, no drop path. Ours: all else.
_base_ = [
    '../_base_/spartan.py', '../_base_/imagenet_224.py', '../_base_/schedule_300e.py'
]

model = dict(
    backbone=dict(_delete_=True, type='UniRepLKNet', arch='a'),
    head=dict(type='AveragedClsHead', in_channels=320, norm='LN'),
    train_cfg=dict(augments=[dict(type='CutMix', alpha=0.3), dict(type='Mixup', alpha=0.3)]))

train_dataloader = dict(batch_size=512)  # 8 GPUs: 4096 a step
optim_wrapper = dict(optimizer=dict(lr=4e-3))
auto_scale_lr = dict(base_batch_size=4096)
