# D-FINE-L, COCO, 80 epochs: 54.0 AP (paper).
_base_ = './_base_/dfine.py'

model = dict(
    data_preprocessor=dict(batch_augments=[dict(
        type='BatchRandomResize', stop_epoch=72, sizes=[*_base_.sizes, *[640] * 4])]),
    backbone=dict(norm_eval=True, frozen=('stem', )))
train_cfg = dict(max_epochs=80)
# Biases decay.
optim_wrapper = dict(optimizer=dict(lr=2.5e-4, weight_decay=1.25e-4), paramwise_cfg=dict(rules=[
    dict(pattern=r'^backbone\.', lr_mult=0.05), dict(pattern='norm', decay_mult=0.)]))
custom_hooks = [*_base_.custom_hooks, dict(
    type='CheckedPipelineSwitchHook', switch_epoch=72, switch_pipeline=_base_.bare_pipeline)]
