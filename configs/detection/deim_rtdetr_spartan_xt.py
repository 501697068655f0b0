# RT-DETR with SpaRTAN-XT, trained as deim_rtdetr_spartan_t.py. Nobody has trained it on COCO.
_base_ = './deim_rtdetr_spartan_t.py'

model = dict(backbone=dict(arch='xt', init_cfg=dict(checkpoint='checkpoints/spartan_xt.pth')))
