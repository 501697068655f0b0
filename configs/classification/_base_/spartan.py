# SpaRTAN-XT for ImageNet-1k: the model, and how it mixes images. Leaves change the backbone.
custom_imports = dict(imports=['spartan_mm.classification'], allow_failed_imports=False)

model = dict(
    type='ImageClassifier',
    data_preprocessor=dict(
        type='ClsDataPreprocessor',
        num_classes=1000,
        mean=[123.675, 116.28, 103.53],
        std=[58.395, 57.12, 57.375],
        to_rgb=True),
    backbone=dict(type='SpaRTAN', arch='xt', drop_path_rate=0.1),
    neck=dict(type='GlobalAveragePooling'),
    head=dict(
        type='LinearClsHead',
        num_classes=1000,
        in_channels=192,
        # NOTE: Never smooths as long as every batch is mixed.
        loss=dict(type='HardLabelSmoothLoss', label_smooth_val=0.2),
        topk=(1, 5),
        init_cfg=dict(type='TruncNormal', layer='Linear', std=0.02)),
    # One of the two for every batch, with equal chance. NOTE: torchvision's, in the authors' code,
    # mix each image with its neighbour in the batch, mmpretrain's with a random one.
    train_cfg=dict(augments=[dict(type='CutMix', alpha=1.0), dict(type='Mixup', alpha=0.2)]))
