# D-FINE-S, COCO, 132 epochs: 48.5 AP (paper).
_base_ = './_base_/dfine.py'

model = dict(
    data_preprocessor=dict(batch_augments=[dict(
        type='BatchRandomResize', stop_epoch=120, sizes=[*_base_.sizes, *[640] * 20])]),
    backbone=dict(model_name='hgnetv2_b0.ssld_stage1_in22k_in1k'),
    neck=dict(expansion=0.5, num_blocks=1),
    decoder=dict(num_layers=3))
train_cfg = dict(max_epochs=132)
optim_wrapper = dict(paramwise_cfg=dict(rules=[
    dict(pattern=r'^backbone\.', lr_mult=0.5), _base_.norms_and_biases]))
custom_hooks = [*_base_.custom_hooks, dict(
    type='CheckedPipelineSwitchHook', switch_epoch=120, switch_pipeline=_base_.bare_pipeline)]
