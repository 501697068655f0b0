# D-FINE-L: the model, COCO, and what all sizes are trained with, officially under --amp.
_base_ = ['./rtdetr.py', './coco.py', './schedule_72e.py']

model = dict(
    backbone=dict(
        _delete_=True,
        type='TIMMFeatures',
        model_name='hgnetv2_b4.ssld_stage1_in22k_in1k',
        pretrained=True,  # downloads the weights when a training starts
        out_indices=(1, 2, 3)),
    neck=dict(type='ELANEncoder', num_blocks=3),
    decoder=dict(type='DFINEDecoder', num_points=(3, 6, 3)),
    bbox_head=dict(
        type='DFINEHead',
        reg_max=32,
        reg_scale=4.0,
        fgl_weight=0.15,
        ddf_weight=1.5,
        temperature=5.0))

# A leaf adds as many 640s as its size has.
sizes = [480, 512, 544, 576, 608, 672, 704, 736, 768, 800]

# 4 GPUs x 8 images. A leaf gives the backbone its share of the learning rate.
train_dataloader = dict(batch_size=8)
auto_scale_lr = dict(base_batch_size=32)
norms_and_biases = dict(pattern='norm|bias', decay_mult=0.)
optim_wrapper = dict(optimizer=dict(lr=2e-4))
param_scheduler = [dict(type='LinearLR', start_factor=0.002, by_epoch=False, begin=0, end=500)]

custom_hooks = [
    dict(type='ClassCountCheckHook'),
    dict(type='FiniteNumbersHook'),
    # decay(u) = 0.9999 (1 - exp(-u / 1000)) after u steps.
    dict(type='EMAHook', ema_type='ExpMomentumEMA', momentum=1e-4, gamma=1000, update_buffers=True,
         priority=49),
]
