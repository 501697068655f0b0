# A small RT-DETR on SpaRTAN-XT that learns digits from scratch in minutes on two CPU cores.
_base_ = ['./_base_/rtdetr.py', './_base_/digits.py', './_base_/schedule_72e.py']

model = dict(
    num_queries=60,
    data_preprocessor=dict(batch_augments=None),
    backbone=dict(_delete_=True, type='SpaRTAN', arch='xt', out_indices=(1, 2, 3),
                  drop_path_rate=0.),
    neck=dict(in_channels=[64, 96, 192], embed_dims=128, ffn_dims=256, expansion=0.5,
              num_blocks=1),
    decoder=dict(in_channels=[128, 128, 128], embed_dims=128, num_layers=3, ffn_dims=256),
    bbox_head=dict(num_classes=10, embed_dims=128),
    dn_cfg=dict(num_queries=30))

# From scratch: one learning rate for all, a short warm-up, and down to nothing.
train_cfg = dict(max_epochs=3)
optim_wrapper = dict(
    optimizer=dict(lr=1e-3),
    clip_grad=dict(max_norm=1.0),
    paramwise_cfg=dict(_delete_=True, rules=[dict(pattern='norm|bias', decay_mult=0.)]))
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=50),
    # Stays high for long, and falls steeply towards the end of however many epochs there are.
    dict(type='PolyLR', power=0.4, by_epoch=True, begin=0, eta_min=1e-5,
         convert_to_iter_based=True),
]
auto_scale_lr = dict(base_batch_size=8)
randomness = dict(seed=0)
custom_hooks = [
    dict(type='ClassCountCheckHook'),
    dict(type='FiniteNumbersHook'),
    dict(type='EMAHook', ema_type='ExpMomentumEMA', momentum=2e-3, gamma=100, update_buffers=True,
         priority=49),
]
default_hooks = dict(logger=dict(interval=10))
