# SpaRTAN-XT with D-FINE's parts, trained as dfine_spartan_t.py. Nobody has trained it on COCO.
_base_ = './dfine_spartan_t.py'

model = dict(backbone=dict(arch='xt', init_cfg=dict(checkpoint='checkpoints/spartan_xt.pth')))
