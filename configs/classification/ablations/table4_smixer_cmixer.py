# Table IV, SMixer + CMixer: 73.9 % top-1 (paper).
_base_ = ['../_base_/spartan.py', '../_base_/imagenet_224.py', '../_base_/schedule_300e.py']

model = dict(backbone=dict(spatial_mixer='smixer', channel_mixer='cmixer'))
