# D-FINE-N, COCO, 160 epochs of 128 images a step: 42.8 AP (paper).
_base_ = './_base_/dfine.py'

model = dict(
    data_preprocessor=dict(batch_augments=None),  # one size of images
    backbone=dict(model_name='hgnetv2_b0.ssld_stage1_in22k_in1k', out_indices=(2, 3)),
    neck=dict(embed_dims=128, ffn_dims=512, expansion=0.34, num_blocks=2),
    decoder=dict(in_channels=[128] * 2, embed_dims=128, num_layers=3, num_points=(6, 6),
                 ffn_dims=512),
    bbox_head=dict(embed_dims=128))
train_cfg = dict(max_epochs=160)
train_dataloader = dict(batch_size=32)
auto_scale_lr = dict(base_batch_size=128)
optim_wrapper = dict(optimizer=dict(lr=8e-4), paramwise_cfg=dict(rules=[
    dict(pattern=r'^backbone\.', lr_mult=0.5), _base_.norms_and_biases]))
custom_hooks = [*_base_.custom_hooks, dict(
    type='CheckedPipelineSwitchHook', switch_epoch=148, switch_pipeline=_base_.bare_pipeline)]
