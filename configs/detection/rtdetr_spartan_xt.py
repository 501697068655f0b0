# RT-DETR with SpaRTAN-XT and the R50 head, COCO, 70 epochs: 48.5 AP (paper, Table III).
_base_ = ['./_base_/rtdetr.py', './_base_/coco.py', './_base_/schedule_72e.py']

model = dict(
    backbone=dict(
        _delete_=True,
        type='SpaRTAN',
        arch='xt',
        out_indices=(1, 2, 3),
        # A classifier to start from, for example a converted checkpoint of the authors; another
        # one: --cfg-options model.backbone.init_cfg.checkpoint=FILE
        init_cfg=dict(type='CheckedPretrained', checkpoint='checkpoints/spartan_xt.pth',
                      prefix='backbone.')))
train_cfg = dict(max_epochs=70)
