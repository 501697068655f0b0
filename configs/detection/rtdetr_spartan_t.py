# RT-DETR with SpaRTAN-T and the R50 head, COCO, 70 epochs: 50.0 AP (paper, Table III).
_base_ = ['./_base_/rtdetr.py', './_base_/coco.py', './_base_/schedule_72e.py']

model = dict(
    backbone=dict(
        _delete_=True,
        type='SpaRTAN',
        arch='t',
        out_indices=(1, 2, 3),
        # A classifier to start from, for example a converted checkpoint of the authors; another
        # one: --cfg-options model.backbone.init_cfg.checkpoint=FILE
        init_cfg=dict(type='CheckedPretrained', checkpoint='checkpoints/spartan_t.pth',
                      prefix='backbone.')))
train_cfg = dict(max_epochs=70)
