# RT-DETR-R18 whose boxes are refined as distributions; all else is its own, COCO, 72 epochs. Nobody
# has trained it. It can start from an RT-DETR-R18, which lacks what is new:
# --cfg-options model.init_cfg.type=Pretrained model.init_cfg.checkpoint=FILE
_base_ = './rtdetr_r18vd.py'

model = dict(
    decoder=dict(type='DFINEDecoder', gate=False, project_values=True),
    bbox_head=dict(type='DFINEHead'))
