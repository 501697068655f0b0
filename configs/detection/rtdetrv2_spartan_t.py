# RT-DETR with SpaRTAN-T and the recipe of RT-DETRv2-R34, COCO, 120 epochs. Nobody has trained it.
_base_ = './rtdetr_spartan_t.py'

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
