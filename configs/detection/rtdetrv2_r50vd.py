# RT-DETRv2-R50, COCO, 72 epochs: 53.4 AP (paper).
_base_ = './rtdetr_r50vd.py'

model = dict(data_preprocessor=dict(batch_augments=[
    dict(type='BatchRandomResize', stop_epoch=71)]))
# The backbone's norms are frozen; biases decay.
optim_wrapper = dict(paramwise_cfg=dict(rules=[
    dict(pattern=r'^backbone\.', lr_mult=0.1),
    dict(norm=True, decay_mult=0.),
]))
custom_hooks = [
    *_base_.custom_hooks,
    dict(type='CheckedPipelineSwitchHook', switch_epoch=71, switch_pipeline=_base_.bare_pipeline),
]
