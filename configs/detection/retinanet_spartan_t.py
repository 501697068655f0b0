# RetinaNet with SpaRTAN-T, COCO, 12 epochs: mmdet's own detector and schedule.
_base_ = 'mmdet::retinanet/retinanet_r50_fpn_1x_coco.py'
custom_imports = dict(imports=['spartan_mm.detection'], allow_failed_imports=False)

model = dict(
    backbone=dict(
        _delete_=True,
        type='SpaRTAN',
        arch='t',
        out_indices=(0, 1, 2, 3),
        init_cfg=dict(type='CheckedPretrained', checkpoint='checkpoints/spartan_t.pth',
                      prefix='backbone.')),
    neck=dict(in_channels=[32, 64, 128, 256]))

# AdamW as mmdet's configs for light transformers (PVT) have it. What doesn't decay in the
# classifier's training doesn't here: norms, biases and the SMixers' gamma.
optim_wrapper = dict(
    constructor='RuleOptimWrapperConstructor',
    optimizer=dict(_delete_=True, type='AdamW', lr=1e-4, weight_decay=1e-4),
    paramwise_cfg=dict(rules=[
        dict(norm=True, decay_mult=0.),
        dict(pattern=r'\.bias$|\.gamma$', decay_mult=0.),
    ]))
