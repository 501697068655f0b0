# SpaRTAN-XT at 224 x 224 with a dilated 11x11 for the low frequencies where convolutions are
# depthwise: a field of 21. Not in the paper, not measured.
_base_ = ['./_base_/spartan.py', './_base_/imagenet_224.py', './_base_/schedule_300e.py']

model = dict(backbone=dict(low_freq_kernel=(3, 3, 11, 11)))
