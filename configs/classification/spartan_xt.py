# SpaRTAN-XT, ImageNet-1k at 256 x 256: 74.4 % top-1 (paper, Table II).
_base_ = ['./_base_/spartan.py', './_base_/imagenet_256.py', './_base_/schedule_300e.py']
