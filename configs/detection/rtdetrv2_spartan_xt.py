# RT-DETR with SpaRTAN-XT and the recipe of RT-DETRv2-R34, COCO, 120 epochs. Nobody has trained it.
_base_ = './rtdetrv2_spartan_t.py'

model = dict(backbone=dict(arch='xt', init_cfg=dict(checkpoint='checkpoints/spartan_xt.pth')))
