# RT-DETR's schedule: 72 epochs of 16 images a step at a constant learning rate, EMA, clipping.
_base_ = 'mmdet::_base_/default_runtime.py'

train_cfg = dict(type='EpochBasedTrainLoop', max_epochs=72, val_interval=1)
val_cfg = dict(type='ValLoop')
test_cfg = dict(type='TestLoop')

optim_wrapper = dict(
    type='OptimWrapper',
    constructor='RuleOptimWrapperConstructor',
    optimizer=dict(type='AdamW', lr=1e-4, betas=(0.9, 0.999), weight_decay=1e-4),
    clip_grad=dict(max_norm=0.1, norm_type=2),
    paramwise_cfg=dict(rules=[
        dict(pattern=r'^backbone\.', norm=True, lr_mult=0.1, decay_mult=0., optional=True),
        dict(pattern=r'^backbone\.', lr_mult=0.1),
        # NOTE: The official rule goes by names, in which these norms aren't called so: they decay.
        dict(pattern=r'^neck\.input_projs\.\d+\.norm\.weight$|^memory_trans_norm\.weight$'),
        dict(pattern='norm|bias', decay_mult=0.),
    ]))
# NOTE: The first PyTorch version had no warm-up; the published weights were trained with this one.
param_scheduler = [dict(type='LinearLR', start_factor=0.001, by_epoch=False, begin=0, end=2000)]

custom_hooks = [
    dict(type='ClassCountCheckHook'),
    dict(type='FiniteNumbersHook'),
    # decay(u) = 0.9999 (1 - exp(-u / 2000)) after u steps, running statistics included; before
    # the other hooks of normal priority (50), so that they see the averaged weights.
    dict(type='EMAHook', ema_type='ExpMomentumEMA', momentum=1e-4, gamma=2000, update_buffers=True,
         priority=49),
]
default_hooks = dict(
    checkpoint=dict(type='CheckpointHook', interval=1, max_keep_ckpts=3, save_best='coco/bbox_mAP'))

# Only takes effect where several processes train.
sync_bn = 'torch'

# 4 GPUs x 4 images; `--auto-scale-lr` scales the learning rate to other batches.
auto_scale_lr = dict(enable=False, base_batch_size=16)
