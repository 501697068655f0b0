# DEIM-D-FINE-S, COCO, 132 epochs: 49.0 AP (paper).
_base_ = ['./dfine_s.py', './_base_/dense_o2o.py', './_base_/deim.py']

model = dict(
    data_preprocessor=dict(batch_augments=[
        dict(type='BatchMixUp', prob=0.5, begin_epoch=4, stop_epoch=64), dict(
            type='BatchRandomResize', stop_epoch=120, sizes=[*_base_.sizes, *[640] * 20])]),
    decoder=dict(act='silu'),
    bbox_head=dict(act='silu', loss_cls=_base_.mal))
train_cfg = dict(max_epochs=132)
train_dataloader = dict(dataset=dict(pipeline=_base_.bare_pipeline))
optim_wrapper = dict(optimizer=dict(lr=4e-4), paramwise_cfg=dict(rules=[
    dict(pattern=r'^backbone\.', norm=True, lr_mult=0.5, decay_mult=0.),
    dict(pattern=r'^backbone\.', lr_mult=0.5), _base_.norms_and_biases]))
param_scheduler = [dict(_base_.flat_cosine, flat=64, tail=12)]
custom_hooks = [
    *_base_.custom_hooks[:-1],
    dict(type='CheckedPipelineSwitchHook', switch_epoch=4, switch_pipeline=_base_.deim_pipeline),
    dict(type='CheckedPipelineSwitchHook', switch_epoch=64, switch_pipeline=_base_.train_pipeline),
    dict(type='CheckedPipelineSwitchHook', switch_epoch=120, switch_pipeline=_base_.bare_pipeline),
]
