# ImageNet-1k under data/imagenet/, at 224 x 224: train/ and val/ with a folder for each class, or
# with the pictures anywhere in them where meta/train.txt and meta/val.txt give the labels.
data_root = 'data/imagenet/'
batch_size = 256  # per GPU; with 8 of them the recipe's 2048
num_workers = 8

# NOTE: torchvision's transforms, as in the authors' code; mmpretrain's of these names differ in
# magnitudes, fill, interpolation and antialiasing, see TorchvisionTransforms.
crop = dict(type='RandomResizedCrop', size=224, interpolation='bilinear', antialias=True)
augments = [
    dict(type='RandomHorizontalFlip', p=0.5),
    # A magnitude of 7 from 0 to 30; black where nothing is left.
    dict(type='RandAugment', num_ops=2, magnitude=7, num_magnitude_bins=31,
         interpolation='bilinear'),
    # NOTE: The authors erase to zero after normalization. This is the mean in whole levels, which
    # becomes less than 0.01, so that images stay bytes on the way to the GPU.
    dict(type='RandomErasing', p=0.25, value=[124, 116, 104]),
]
# The shorter side. NOTE: To the size of the crop, not 256 for 224 as is usual.
resize = dict(type='Resize', size=224, interpolation='bilinear', antialias=True)

train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='TorchvisionTransforms', transforms=[crop, *augments]),
    dict(type='PackInputs'),
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='TorchvisionTransforms', transforms=[resize, dict(type='CenterCrop', size=224)]),
    dict(type='PackInputs'),
]

train_dataloader = dict(
    batch_size=batch_size,
    num_workers=num_workers,
    persistent_workers=True,
    pin_memory=True,
    drop_last=True,
    collate_fn=dict(type='default_collate'),
    sampler=dict(type='DefaultSampler', shuffle=True),
    dataset=dict(
        type='CheckedImageNet', data_root=data_root, split='train', pipeline=train_pipeline))
val_dataloader = dict(
    batch_size=batch_size,
    num_workers=num_workers,
    persistent_workers=True,
    pin_memory=True,
    collate_fn=dict(type='default_collate'),
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(
        type='CheckedImageNet', data_root=data_root, split='val', pipeline=test_pipeline))
test_dataloader = val_dataloader

val_evaluator = dict(type='Accuracy', topk=(1, 5))
test_evaluator = val_evaluator
