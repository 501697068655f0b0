# RT-DETR with UniRepLKNet-F and the R50 head, COCO, 70 epochs as SpaRTAN's. Not measured.
_base_ = ['../_base_/rtdetr.py', '../_base_/coco.py', '../_base_/schedule_72e.py']

model = dict(
    backbone=dict(
        _delete_=True,
        type='UniRepLKNet',
        arch='f',
        out_indices=(1, 2, 3),
        out_norm=True,
        # A classifier to start from: spartan-mm convert backbone unireplknet FILE CHECKPOINT
        init_cfg=dict(type='CheckedPretrained', checkpoint='checkpoints/unireplknet_f.pth',
                      prefix='backbone.')))
train_cfg = dict(max_epochs=70)
