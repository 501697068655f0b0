# RT-DETRv2-R18, COCO, 120 epochs: 48.1 AP (paper). One size of images, one learning rate for all.
_base_ = './rtdetr_r18vd.py'

model = dict(data_preprocessor=dict(batch_augments=None))
train_cfg = dict(max_epochs=120)
# NOTE: Biases decay, officially by intent or not.
optim_wrapper = dict(paramwise_cfg=dict(rules=[dict(norm=True, decay_mult=0.)]))
custom_hooks = [
    *_base_.custom_hooks,
    dict(type='CheckedPipelineSwitchHook', switch_epoch=117, switch_pipeline=_base_.bare_pipeline),
]
