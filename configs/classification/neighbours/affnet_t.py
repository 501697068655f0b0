# AFFNet-T, ImageNet-1k at 256 x 256: 77.0 % top-1 (paper).
_base_ = './affnet_et.py'

model = dict(
    backbone=dict(arch='t'),
    neck=dict(in_channels=192, out_channels=768),
    head=dict(in_channels=768))
