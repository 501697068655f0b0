# RT-DETR with SpaRTAN-T and the R50 head, COCO, 70 epochs: 50.0 AP (paper, Table III).
_base_ = ['./_base_/rtdetr.py', './_base_/coco.py', './_base_/schedule_72e.py']

model = dict(
    backbone=dict(
        _delete_=True,
        type='SpaRTAN',
        arch='t',
        # Start from a classifier (a converted checkpoint of the authors, say) by adding
        # init_cfg=dict(type='Pretrained', checkpoint='spartan_t.pth', prefix='backbone.')
        out_indices=(1, 2, 3)),
    neck=dict(in_channels=[64, 128, 256]))
train_cfg = dict(max_epochs=70)
