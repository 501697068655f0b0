# SpaRTAN-XT at 256 x 256 with a moving average of the weights, which is evaluated and saved.
# Not in the paper, not measured.
_base_ = ['./_base_/spartan.py', './_base_/imagenet_256.py', './_base_/schedule_300e.py']

# A half-life of ln 2 / 1e-4 = 6931 steps, 11 epochs of 1.28 M images / 2048 = 625 steps; with
# accumulation divide the momentum by its count.
custom_hooks = [
    *_base_.custom_hooks,
    dict(type='EMAHook', momentum=1e-4, update_buffers=True),
]
