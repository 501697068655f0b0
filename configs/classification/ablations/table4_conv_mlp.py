# Table IV, convolution + MLP (the baseline): 71.9 % top-1 (paper).
_base_ = ['../_base_/spartan.py', '../_base_/imagenet_224.py', '../_base_/schedule_300e.py']

model = dict(backbone=dict(spatial_mixer='conv', channel_mixer='mlp'))
