# RT-DETRv2-R34, COCO, 120 epochs: 49.9 AP (paper).
_base_ = './rtdetr_r34vd.py'

model = dict(data_preprocessor=dict(batch_augments=[
    dict(type='BatchRandomResize', stop_epoch=117)]))
train_cfg = dict(max_epochs=120)
optim_wrapper = dict(paramwise_cfg=dict(rules=[
    dict(pattern=r'^backbone\.', norm=True, lr_mult=0.5, decay_mult=0.),
    dict(pattern=r'^backbone\.', lr_mult=0.5),
    dict(pattern='norm|bias', decay_mult=0.),
]))
custom_hooks = [
    *_base_.custom_hooks,
    dict(type='CheckedPipelineSwitchHook', switch_epoch=117, switch_pipeline=_base_.bare_pipeline),
]
