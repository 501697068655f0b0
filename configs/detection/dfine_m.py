# D-FINE-M, COCO, 132 epochs: 52.3 AP (paper).
_base_ = './_base_/dfine.py'

model = dict(
    data_preprocessor=dict(batch_augments=[dict(
        type='BatchRandomResize', stop_epoch=120, sizes=[*_base_.sizes, *[640] * 6])]),
    backbone=dict(model_name='hgnetv2_b2.ssld_stage1_in22k_in1k'),
    neck=dict(num_blocks=2),
    decoder=dict(num_layers=4))
train_cfg = dict(max_epochs=132)
optim_wrapper = dict(paramwise_cfg=dict(rules=[
    dict(pattern=r'^backbone\.', lr_mult=0.1), _base_.norms_and_biases]))
custom_hooks = [*_base_.custom_hooks, dict(
    type='CheckedPipelineSwitchHook', switch_epoch=120, switch_pipeline=_base_.bare_pipeline)]
