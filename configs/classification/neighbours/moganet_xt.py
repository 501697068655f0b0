# MogaNet-XT, ImageNet-1k at 224 x 224: 76.5 % top-1 (paper).
# The authors': batch, learning rate, decay, drop path, Mixup, crop at test. Ours: all else.
_base_ = [
    '../_base_/spartan.py', '../_base_/imagenet_224.py', '../_base_/schedule_300e.py'
]

model = dict(
    backbone=dict(_delete_=True, type='MogaNet', arch='xt', drop_path_rate=0.05),
    train_cfg=dict(augments=[dict(type='CutMix', alpha=1.0), dict(type='Mixup', alpha=0.1)]))

train_dataloader = dict(batch_size=128)  # 8 GPUs: 1024 a step
optim_wrapper = dict(optimizer=dict(lr=1e-3, weight_decay=0.03))
auto_scale_lr = dict(base_batch_size=1024)

test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='TorchvisionTransforms', transforms=[
        dict(_base_.resize, size=248),  # 224 / 0.9
        dict(type='CenterCrop', size=224)]),
    dict(type='PackInputs'),
]
val_dataloader = dict(dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader
