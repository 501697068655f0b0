# SpaRTAN-XT at 224 x 224 with kernels whose weights find their places: DCLS (arXiv
# 2112.03740) where convolutions are depthwise. As many parameters. Not in the paper, not measured.
_base_ = ['./_base_/spartan.py', './_base_/imagenet_224.py', './_base_/schedule_300e.py']

model = dict(backbone=dict(low_freq_kernel='dcls'))
