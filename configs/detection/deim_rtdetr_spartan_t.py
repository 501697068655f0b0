# RT-DETR with SpaRTAN-T, trained as DEIM does it, by ECDet's stages: dense to epoch 36 of 74, none
# of it in the last two. What runs is rtdetr_spartan_t.py's. Nobody has trained it on COCO.
_base_ = ['./rtdetr_spartan_t.py', './_base_/dense_o2o.py', './_base_/deim.py']

model = dict(
    data_preprocessor=dict(batch_augments=[dict(type='BatchMixUp', prob=0.75, stop_epoch=36)]),
    bbox_head=dict(loss_cls=_base_.mal))
train_cfg = dict(max_epochs=74)
train_dataloader = dict(dataset=dict(pipeline=_base_.dense_pipeline))
optim_wrapper = dict(
    optimizer=dict(lr=2e-4),
    paramwise_cfg=dict(rules=[_base_.norms, dict(pattern=r'^backbone\.', lr_mult=0.5)]))
param_scheduler = [dict(_base_.flat_cosine, flat=36, tail=2)]
custom_hooks = [
    *_base_.custom_hooks,
    dict(type='CheckedPipelineSwitchHook', switch_epoch=36, switch_pipeline=_base_.train_pipeline),
    dict(type='CheckedPipelineSwitchHook', switch_epoch=72, switch_pipeline=_base_.bare_pipeline),
]
