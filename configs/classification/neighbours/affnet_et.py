# AFFNet-ET, ImageNet-1k at 256 x 256: 73.0 % top-1 (paper).
# The recipe is ours: the authors' is not public.
_base_ = [
    '../_base_/spartan.py', '../_base_/imagenet_256.py', '../_base_/schedule_300e.py'
]

model = dict(
    backbone=dict(_delete_=True, type='AFFNet', arch='et'),
    neck=dict(_delete_=True, type='PoolingNeck', in_channels=144, out_channels=576),
    head=dict(in_channels=576))
