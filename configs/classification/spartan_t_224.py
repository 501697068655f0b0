# SpaRTAN-T, ImageNet-1k at 224 x 224: 77.1 % top-1 (paper, Table II).
_base_ = ['./_base_/spartan.py', './_base_/imagenet_224.py', './_base_/schedule_300e.py']

model = dict(backbone=dict(arch='t'), head=dict(in_channels=256))
