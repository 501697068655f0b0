# DEIM-RT-DETRv2-R50, COCO, 60 epochs: 54.3 AP (paper). The whole backbone is trained.
_base_ = ['./rtdetr_r50vd.py', './_base_/dense_o2o.py', './_base_/deim.py']

model = dict(
    data_preprocessor=dict(batch_augments=[
        dict(type='BatchMixUp', prob=0.5, begin_epoch=4, stop_epoch=34),
        dict(type='BatchRandomResize', stop_epoch=58)]),
    backbone=dict(frozen_stages=-1, norm_cfg=dict(requires_grad=True), norm_eval=False),
    decoder=_base_.deim_decoder,
    bbox_head=dict(act='silu', loss_cls=_base_.mal))
train_cfg = dict(max_epochs=60)
train_dataloader = dict(dataset=dict(pipeline=_base_.bare_pipeline))
optim_wrapper = dict(optimizer=dict(lr=2e-4), paramwise_cfg=dict(rules=[
    _base_.norms, dict(pattern=r'^backbone\.', lr_mult=0.1)]))
param_scheduler = [dict(_base_.flat_cosine, flat=34, tail=2)]
custom_hooks = [
    *_base_.custom_hooks,
    dict(type='CheckedPipelineSwitchHook', switch_epoch=4, switch_pipeline=_base_.deim_pipeline),
    dict(type='CheckedPipelineSwitchHook', switch_epoch=34, switch_pipeline=_base_.train_pipeline),
    dict(type='CheckedPipelineSwitchHook', switch_epoch=58, switch_pipeline=_base_.bare_pipeline),
]
