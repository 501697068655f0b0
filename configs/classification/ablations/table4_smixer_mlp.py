# Table IV, SMixer + MLP: 72.4 % top-1 (paper).
_base_ = ['../_base_/spartan.py', '../_base_/imagenet_224.py', '../_base_/schedule_300e.py']

model = dict(backbone=dict(spatial_mixer='smixer', channel_mixer='mlp'))
