# CAS-ViT-S, ImageNet-1k at 224 x 224: 80.9 % top-1 (paper).
_base_ = './casvit_xs.py'

model = dict(
    backbone=dict(arch='s'), neck=dict(in_channels=256), head=dict(in_channels=256))
