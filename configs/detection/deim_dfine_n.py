# DEIM-D-FINE-N, COCO, 160 epochs: 43.0 AP (paper). The learning rate stays after the warm-up.
_base_ = ['./dfine_n.py', './_base_/dense_o2o.py', './_base_/deim.py']

model = dict(
    data_preprocessor=dict(batch_augments=[
        dict(type='BatchMixUp', prob=0.5, begin_epoch=4, stop_epoch=78)]),
    decoder=dict(act='silu'),
    bbox_head=dict(act='silu', loss_cls=_base_.mal))
train_dataloader = dict(dataset=dict(pipeline=_base_.bare_pipeline))
param_scheduler = [dict(_base_.flat_cosine, flat=160)]
custom_hooks = [
    *_base_.custom_hooks[:-1],
    dict(type='CheckedPipelineSwitchHook', switch_epoch=4, switch_pipeline=_base_.deim_pipeline),
    dict(type='CheckedPipelineSwitchHook', switch_epoch=78, switch_pipeline=_base_.train_pipeline),
    dict(type='CheckedPipelineSwitchHook', switch_epoch=148, switch_pipeline=_base_.bare_pipeline),
]
