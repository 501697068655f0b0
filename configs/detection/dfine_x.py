# D-FINE-X, COCO, 80 epochs: 55.8 AP (paper).
_base_ = './dfine_l.py'

model = dict(
    data_preprocessor=dict(batch_augments=[dict(
        type='BatchRandomResize', stop_epoch=72, sizes=[*_base_.sizes, *[640] * 3])]),
    backbone=dict(model_name='hgnetv2_b5.ssld_stage1_in22k_in1k'),
    neck=dict(embed_dims=384, ffn_dims=2048),
    decoder=dict(in_channels=[384] * 3),
    bbox_head=dict(reg_scale=8.0))
optim_wrapper = dict(paramwise_cfg=dict(rules=[
    dict(pattern=r'^backbone\.', lr_mult=0.01), dict(pattern='norm', decay_mult=0.)]))
