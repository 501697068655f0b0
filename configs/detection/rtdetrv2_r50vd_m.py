# RT-DETRv2-R50 with half as wide blocks in the neck, evaluated at its third decoder layer of six,
# COCO, 84 epochs: 51.9 AP (paper).
_base_ = './rtdetrv2_r50vd.py'

model = dict(
    data_preprocessor=dict(batch_augments=[dict(type='BatchRandomResize', stop_epoch=81)]),
    neck=dict(expansion=0.5),
    decoder=dict(eval_idx=2))
train_cfg = dict(max_epochs=84)
custom_hooks = [*_base_.custom_hooks[:-1], dict(_base_.custom_hooks[-1], switch_epoch=81)]
