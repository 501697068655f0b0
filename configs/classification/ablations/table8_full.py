# Table VIII, full convolutions (F) in all stages: 74.1 % top-1 (paper).
_base_ = ['../_base_/spartan.py', '../_base_/imagenet_224.py', '../_base_/schedule_300e.py']

model = dict(backbone=dict(conv_types='full'))
