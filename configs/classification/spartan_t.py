# SpaRTAN-T, ImageNet-1k at 256 x 256: 77.7 % top-1 (paper, Table II).
_base_ = ['./_base_/spartan.py', './_base_/imagenet_256.py', './_base_/schedule_300e.py']

model = dict(backbone=dict(arch='t'), head=dict(in_channels=256))
