# RT-DETR with VAN-B0 and the R50 head, COCO, 70 epochs as SpaRTAN's. Not measured.
_base_ = ['../_base_/rtdetr.py', '../_base_/coco.py', '../_base_/schedule_72e.py']
custom_imports = dict(
    imports=['spartan_mm.detection', 'mmpretrain.models'], allow_failed_imports=False)

model = dict(
    backbone=dict(
        _delete_=True,
        type='mmpretrain.VAN',
        arch='tiny',
        out_indices=(1, 2, 3),
        # A classifier to start from: mmpretrain's van-tiny_3rdparty_in1k
        init_cfg=dict(type='CheckedPretrained', checkpoint='checkpoints/van_b0.pth',
                      prefix='backbone.')),
    neck=dict(in_channels=[64, 160, 256]))
train_cfg = dict(max_epochs=70)
