# scikit-learn's handwritten digits in folders, see tools/dataset_converters/make_digit_folder.py.
data_root = 'data/digit_folder/'
batch_size = 32

resize = dict(type='Resize', scale=(32, 32), interpolation='bicubic')  # from 8 x 8

moved = dict(magnitude_std='inf', pad_val=0, interpolation='bilinear', prob=0.7)
train_pipeline = [
    dict(type='LoadImageFromFile'),
    resize,
    # Up to these, either way. No flip: a mirrored digit is no digit.
    dict(type='Rotate', magnitude_range=(0, 12), **moved),  # degrees
    dict(type='Shear', magnitude_range=(0, 0.15), direction='horizontal', **moved),
    dict(type='Translate', magnitude_range=(0, 0.12), direction='horizontal', **moved),
    dict(type='Translate', magnitude_range=(0, 0.12), direction='vertical', **moved),
    dict(type='PackInputs'),
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    resize,
    dict(type='PackInputs'),
]

train_dataloader = dict(
    batch_size=batch_size,
    num_workers=1,
    persistent_workers=True,
    drop_last=True,
    collate_fn=dict(type='default_collate'),
    sampler=dict(type='DefaultSampler', shuffle=True),
    dataset=dict(
        type='CheckedImageFolder', data_root=data_root, split='train', pipeline=train_pipeline))
val_dataloader = dict(
    batch_size=batch_size,
    num_workers=1,
    persistent_workers=True,
    collate_fn=dict(type='default_collate'),
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(
        type='CheckedImageFolder', data_root=data_root, split='val', pipeline=test_pipeline))
test_dataloader = val_dataloader

val_evaluator = dict(type='Accuracy', topk=(1, 5))
test_evaluator = val_evaluator
