# The same at 256 x 256.
_base_ = './imagenet_224.py'

crop = dict(_base_.crop, size=256)
resize = dict(_base_.resize, size=256)
train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='TorchvisionTransforms', transforms=[crop, *_base_.augments]),
    dict(type='PackInputs'),
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='TorchvisionTransforms', transforms=[resize, dict(type='CenterCrop', size=256)]),
    dict(type='PackInputs'),
]

train_dataloader = dict(dataset=dict(pipeline=train_pipeline))
val_dataloader = dict(dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader
