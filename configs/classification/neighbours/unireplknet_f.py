# UniRepLKNet-F, ImageNet-1k at 224 x 224: 78.6 % top-1 (paper).
_base_ = './unireplknet_a.py'

model = dict(backbone=dict(arch='f'), head=dict(in_channels=384))
