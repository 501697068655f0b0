# A user's own config, outside this repository: mmdet's terms and `custom_imports`.
custom_imports = dict(imports=['spartan_mm.detection'])
default_scope = 'mmdet'

pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations', with_bbox=True),
    dict(type='Resize', scale=(64, 64), keep_ratio=False),
    dict(type='PackDetInputs',
         meta_keys=('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor')),
]
dataset = dict(type='CocoDataset', data_root='pictures/', ann_file='annotations.json',
               data_prefix=dict(img=''), metainfo=dict(classes=('square', 'disc')),
               pipeline=pipeline)
train_dataloader = dict(
    batch_size=2, num_workers=0, sampler=dict(type='DefaultSampler', shuffle=True),
    dataset=dict(dataset, filter_cfg=dict(filter_empty_gt=False)))
val_dataloader = dict(
    batch_size=1, num_workers=0, sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(dataset, test_mode=True))
test_dataloader = val_dataloader
val_evaluator = dict(type='CocoMetric', ann_file='pictures/annotations.json')
test_evaluator = val_evaluator

model = dict(
    type='RTDETR',
    num_queries=20,
    data_preprocessor=dict(
        type='DetDataPreprocessor', mean=[0] * 3, std=[255] * 3, bgr_to_rgb=True),
    backbone=dict(
        type='SpaRTAN',
        out_indices=(1, 2, 3),
        arch=dict(stem_channels=8, depths=(1, 1, 1, 1), channels=(8, 16, 24, 32),
                  expand_ratios=(2, 2, 2, 2),
                  conv_types=('full', 'full', 'depthwise', 'depthwise'))),
    neck=dict(type='HybridEncoder', embed_dims=32, ffn_dims=32, expansion=0.5, num_blocks=1),
    decoder=dict(in_channels=[32, 32, 32], embed_dims=32, num_layers=2, num_heads=4, ffn_dims=32),
    bbox_head=dict(type='RTDETRHead', num_classes=2, embed_dims=32),
    dn_cfg=dict(num_queries=8),
    train_cfg=dict(assigner=dict(
        type='HungarianAssigner',
        match_costs=[
            dict(type='FocalLossCost', weight=2.0),
            dict(type='BBoxL1Cost', weight=5.0, box_format='xywh'),
            dict(type='IoUCost', iou_mode='giou', weight=2.0),
        ])),
    test_cfg=dict(max_per_img=20))

train_cfg = dict(type='EpochBasedTrainLoop', max_epochs=2)
val_cfg = dict(type='ValLoop')
test_cfg = dict(type='TestLoop')
optim_wrapper = dict(type='OptimWrapper', optimizer=dict(type='AdamW', lr=1e-3))
auto_scale_lr = dict(enable=False, base_batch_size=4)
custom_hooks = [dict(type='EMAHook', ema_type='ExpMomentumEMA', momentum=0.5, update_buffers=True)]
default_hooks = dict(
    logger=dict(type='LoggerHook', interval=1), visualization=dict(type='DetVisualizationHook'))
visualizer = dict(type='DetLocalVisualizer', vis_backends=[dict(type='LocalVisBackend')])
sync_bn = 'torch'
