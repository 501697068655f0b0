# DEIM-D-FINE-M, COCO, 102 epochs: 52.7 AP (paper).
_base_ = ['./dfine_m.py', './_base_/dense_o2o.py', './_base_/deim.py']

model = dict(
    data_preprocessor=dict(batch_augments=[
        dict(type='BatchMixUp', prob=0.5, begin_epoch=4, stop_epoch=49), dict(
            type='BatchRandomResize', stop_epoch=90, sizes=[*_base_.sizes, *[640] * 6])]),
    decoder=dict(act='silu'),
    bbox_head=dict(act='silu', loss_cls=_base_.mal))
train_cfg = dict(max_epochs=102)
train_dataloader = dict(dataset=dict(pipeline=_base_.bare_pipeline))
optim_wrapper = dict(optimizer=dict(lr=4e-4), paramwise_cfg=dict(rules=[
    dict(pattern=r'^backbone\.', norm=True, lr_mult=0.1, decay_mult=0.),
    dict(pattern=r'^backbone\.', lr_mult=0.1), _base_.norms_and_biases]))
param_scheduler = [dict(_base_.flat_cosine, flat=49, tail=12)]
custom_hooks = [
    *_base_.custom_hooks[:-1],
    dict(type='CheckedPipelineSwitchHook', switch_epoch=4, switch_pipeline=_base_.deim_pipeline),
    dict(type='CheckedPipelineSwitchHook', switch_epoch=49, switch_pipeline=_base_.train_pipeline),
    dict(type='CheckedPipelineSwitchHook', switch_epoch=90, switch_pipeline=_base_.bare_pipeline),
]
