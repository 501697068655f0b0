# COCO 2017 under data/coco/, with RT-DETR's transforms.
data_root = 'data/coco/'
batch_size = 4  # per GPU; the recipe has 4 GPUs
num_workers = 4

# As torchvision resizes PIL images, antialiased: exactly so at test; in training, where it has to
# be fast, a grey level off in few values, see AntialiasedResize.
test_resize = dict(type='Resize', scale=(640, 640), keep_ratio=False, interpolation='bilinear',
                   backend='pillow')
train_resize = dict(type='AntialiasedResize', scale=(640, 640))

train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations', with_bbox=True),
    dict(type='RandomPhotometricDistort', prob=0.5),
    dict(type='RandomZoomOut', prob=0.5),
    dict(type='RandomIoUCrop', prob=0.8),
    dict(type='FilterSmallBoxes'),
    dict(type='RandomFlip', prob=0.5),
    train_resize,
    dict(type='FilterSmallBoxes'),
    dict(type='PackDetInputs'),
]
# Without what changes images much: flip and resize are left, for the last epochs of newer recipes.
bare_pipeline = train_pipeline[:2] + train_pipeline[6:]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    test_resize,
    # After Resize: evaluation wants the original boxes.
    dict(type='LoadAnnotations', with_bbox=True),
    dict(type='PackDetInputs',
         meta_keys=('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor')),
]

train_dataloader = dict(
    batch_size=batch_size,
    num_workers=num_workers,
    persistent_workers=True,
    drop_last=True,
    sampler=dict(type='DefaultSampler', shuffle=True),
    dataset=dict(
        type='CheckedCocoDataset',
        data_root=data_root,
        ann_file='annotations/instances_train2017.json',
        data_prefix=dict(img='train2017/'),
        # The 1,021 images without objects are trained on, too.
        filter_cfg=dict(filter_empty_gt=False),
        invalid_boxes='drop',  # COCO itself has a few boxes without height or width
        pipeline=train_pipeline))
val_dataloader = dict(
    batch_size=8,
    num_workers=num_workers,
    persistent_workers=True,
    drop_last=False,
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(
        type='CheckedCocoDataset',
        data_root=data_root,
        ann_file='annotations/instances_val2017.json',
        data_prefix=dict(img='val2017/'),
        test_mode=True,
        invalid_boxes='drop',
        pipeline=test_pipeline))
test_dataloader = val_dataloader

val_evaluator = dict(
    type='CheckedCocoMetric',
    ann_file=data_root + 'annotations/instances_val2017.json',
    metric='bbox',
    # COCO's own limits; mmdet's default prints AP50 and the like at 1000 detections an image.
    proposal_nums=(1, 10, 100))
test_evaluator = val_evaluator
