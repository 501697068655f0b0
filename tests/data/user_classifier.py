# A user's own config, outside this repository: mmpretrain's terms and `custom_imports`.
custom_imports = dict(imports=['spartan_mm'])
default_scope = 'mmpretrain'

dataset = dict(
    type='CustomDataset', data_root='classes/',
    pipeline=[dict(type='LoadImageFromFile'), dict(type='Resize', scale=32),
              dict(type='PackInputs')])
train_dataloader = dict(batch_size=4, num_workers=0, dataset=dataset,
                        sampler=dict(type='DefaultSampler', shuffle=True))
val_dataloader = dict(batch_size=4, num_workers=0, dataset=dataset,
                      sampler=dict(type='DefaultSampler', shuffle=False))
test_dataloader = val_dataloader
val_evaluator = dict(type='Accuracy', topk=1)
test_evaluator = val_evaluator

model = dict(
    type='ImageClassifier',
    data_preprocessor=dict(num_classes=2, mean=[0] * 3, std=[255] * 3, to_rgb=True),
    backbone=dict(
        type='SpaRTAN',
        arch=dict(stem_channels=8, depths=(1, 1, 1, 1), channels=(8, 16, 24, 32),
                  expand_ratios=(2, 2, 2, 2),
                  conv_types=('full', 'full', 'depthwise', 'depthwise'))),
    neck=dict(type='GlobalAveragePooling'),
    head=dict(type='LinearClsHead', num_classes=2, in_channels=32,
              loss=dict(type='CrossEntropyLoss')))

train_cfg = dict(by_epoch=True, max_epochs=1)
val_cfg = dict()
test_cfg = dict()
optim_wrapper = dict(optimizer=dict(type='AdamW', lr=1e-3))
