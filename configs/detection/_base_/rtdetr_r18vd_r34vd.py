# What RT-DETR-R18 and R34 have in common: a backbone that is trained wholly, half as wide blocks.
_base_ = './rtdetr.py'

model = dict(
    backbone=dict(
        frozen_stages=-1,
        norm_cfg=dict(type='BN', requires_grad=True),
        norm_eval=False),
    neck=dict(expansion=0.5))
