# MogaNet-T, ImageNet-1k at 224 x 224: 79.0 % top-1 (paper).
_base_ = './moganet_xt.py'

model = dict(backbone=dict(arch='t', drop_path_rate=0.1), head=dict(in_channels=256))
optim_wrapper = dict(optimizer=dict(weight_decay=0.04))
