# RT-DETR-R50: the model. Leaves change the backbone and, for smaller ones, the widths.
custom_imports = dict(imports=['spartan_mm.detection'], allow_failed_imports=False)

model = dict(
    type='RTDETR',
    num_queries=300,
    data_preprocessor=dict(
        type='DetDataPreprocessor',
        # RT-DETR divides by 255 and does nothing else, no ImageNet statistics.
        mean=[0, 0, 0],
        std=[255, 255, 255],
        bgr_to_rgb=True,
        pad_size_divisor=1,
        batch_augments=[dict(type='BatchRandomResize')]),
    backbone=dict(
        type='ResNetVd',
        depth=50,
        out_indices=(1, 2, 3),
        frozen_stages=0,
        norm_cfg=dict(type='BN', requires_grad=False),
        norm_eval=True),
    neck=dict(
        type='HybridEncoder',  # takes in_channels from the backbone
        embed_dims=256,
        ffn_dims=1024,
        expansion=1.0),
    decoder=dict(
        in_channels=[256, 256, 256],
        embed_dims=256,
        num_layers=6,
        eval_idx=-1,
        num_heads=8,
        num_points=4,
        ffn_dims=1024),
    bbox_head=dict(
        type='RTDETRHead',
        num_classes=80,
        embed_dims=256,
        loss_cls=dict(type='IoUAwareVarifocalLoss', alpha=0.75, gamma=2.0, loss_weight=1.0),
        loss_bbox=dict(type='L1Loss', loss_weight=5.0),
        loss_iou=dict(type='PairedGIoULoss', loss_weight=2.0)),
    dn_cfg=dict(num_queries=100, label_noise=0.5, box_noise=1.0),
    train_cfg=dict(
        assigner=dict(
            type='HungarianAssigner',
            match_costs=[
                dict(type='FocalLossCost', weight=2.0),
                dict(type='BBoxL1Cost', weight=5.0, box_format='xywh'),
                dict(type='IoUCost', iou_mode='giou', weight=2.0),
            ])),
    test_cfg=dict(max_per_img=300))
