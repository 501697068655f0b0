# DEIM-RT-DETRv2-R18, COCO, 120 epochs: 49.0 AP (paper).
_base_ = ['./rtdetr_r18vd.py', './_base_/dense_o2o.py', './_base_/deim.py']

model = dict(
    data_preprocessor=dict(batch_augments=[
        dict(type='BatchMixUp', prob=0.5, begin_epoch=4, stop_epoch=64),
        dict(type='BatchRandomResize', stop_epoch=117)]),
    decoder=_base_.deim_decoder,
    bbox_head=dict(act='silu', loss_cls=_base_.mal))
train_cfg = dict(max_epochs=120)
train_dataloader = dict(dataset=dict(pipeline=_base_.bare_pipeline))
optim_wrapper = dict(optimizer=dict(lr=2e-4), paramwise_cfg=dict(rules=[_base_.norms]))
param_scheduler = [dict(_base_.flat_cosine, flat=64, tail=3)]
custom_hooks = [
    *_base_.custom_hooks,
    dict(type='CheckedPipelineSwitchHook', switch_epoch=4, switch_pipeline=_base_.deim_pipeline),
    dict(type='CheckedPipelineSwitchHook', switch_epoch=64, switch_pipeline=_base_.train_pipeline),
    dict(type='CheckedPipelineSwitchHook', switch_epoch=117, switch_pipeline=_base_.bare_pipeline),
]
