# DEIM-D-FINE-L, COCO, 58 epochs: 54.7 AP (paper).
_base_ = ['./dfine_l.py', './_base_/dense_o2o.py', './_base_/deim.py']

model = dict(
    data_preprocessor=dict(batch_augments=[
        dict(type='BatchMixUp', prob=0.5, begin_epoch=4, stop_epoch=29), dict(
            type='BatchRandomResize', stop_epoch=50, sizes=[*_base_.sizes, *[640] * 4])]),
    decoder=dict(act='silu'),
    bbox_head=dict(act='silu', loss_cls=_base_.mal))
train_cfg = dict(max_epochs=58)
train_dataloader = dict(dataset=dict(pipeline=_base_.bare_pipeline))
optim_wrapper = dict(optimizer=dict(lr=5e-4))
param_scheduler = [dict(_base_.flat_cosine, flat=29, tail=8)]
custom_hooks = [
    *_base_.custom_hooks[:-1],
    dict(type='CheckedPipelineSwitchHook', switch_epoch=4, switch_pipeline=_base_.deim_pipeline),
    dict(type='CheckedPipelineSwitchHook', switch_epoch=29, switch_pipeline=_base_.train_pipeline),
    dict(type='CheckedPipelineSwitchHook', switch_epoch=50, switch_pipeline=_base_.bare_pipeline),
]
