# From scratch in three epochs of 2000 / 8 = 250 steps: one learning rate for all, down to nothing.
_base_ = './schedule_72e.py'

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
    # decay(u) = 0.998 (1 - exp(-u / 100)): the mean of about 1 / 0.002 = 500 of the 750 steps.
    dict(type='EMAHook', ema_type='ExpMomentumEMA', momentum=2e-3, gamma=100, update_buffers=True,
         priority=49),
]
default_hooks = dict(logger=dict(interval=10))
