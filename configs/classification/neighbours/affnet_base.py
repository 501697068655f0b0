# AFFNet, ImageNet-1k at 256 x 256: 79.8 % top-1 (paper).
_base_ = './affnet_et.py'

model = dict(
    backbone=dict(arch='base'),
    neck=dict(in_channels=320, out_channels=960),
    head=dict(in_channels=960))
