# Table VII, BN after the convolutions, BN before the mixers: 73.1 % top-1 (paper).
_base_ = ['../_base_/spartan.py', '../_base_/imagenet_224.py', '../_base_/schedule_300e.py']

model = dict(backbone=dict(conv_norm='BN', block_norm='BN'))
