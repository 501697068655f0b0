# RT-DETR with LSNet-T and the R50 head, COCO, 70 epochs as SpaRTAN's. Not measured.
_base_ = ['../_base_/rtdetr.py', '../_base_/coco.py', '../_base_/schedule_72e.py']

model = dict(
    backbone=dict(
        _delete_=True,
        type='LSNet',
        arch='t',
        out_indices=(0, 1, 2),  # strides 8, 16 and 32, without stage 4
        # A classifier to start from: spartan-mm convert backbone lsnet FILE CHECKPOINT
        init_cfg=dict(type='CheckedPretrained', checkpoint='checkpoints/lsnet_t.pth',
                      prefix='backbone.')))
train_cfg = dict(max_epochs=70)
