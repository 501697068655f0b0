# A checkpoint learns your objects, of which there are 50 to 5,000 pictures: every length is a share
# of the training, so that it fits few steps and many. In place of schedule_72e.py.
_base_ = './schedule_72e.py'

train_cfg = dict(max_epochs=50)

optim_wrapper = dict(
    optimizer=dict(lr=1e-4),
    # The backbone at half the rate; ResNet-50 and larger: lr_mult=0.1.
    paramwise_cfg=dict(_delete_=True, rules=[
        dict(pattern=r'^backbone\.', norm=True, lr_mult=0.5, decay_mult=0., optional=True),
        dict(pattern=r'^backbone\.', lr_mult=0.5),
        dict(pattern='norm|bias', decay_mult=0., optional=True),
    ]))
param_scheduler = [
    # Linear for 3 of 50 epochs, but 1000 steps at most; constant to the middle; down to a tenth.
    dict(type='FlatCosineLR', by_epoch=True, convert_to_iter_based=True, shares=True, warmup=0.06,
         max_warmup=1000, warmup_power=1., flat=0.5, tail=0.1, gamma=0.1),
]

custom_hooks = [
    dict(type='ClassCountCheckHook'),
    dict(type='FiniteNumbersHook'),
    # Before the other hooks of normal priority (50), so that they see the averaged weights.
    dict(type='StepsAwareEMAHook', update_buffers=True, priority=49),
    # Of the averaged weights, which are what is validated.
    dict(type='ResumableEarlyStoppingHook', monitor='coco/bbox_mAP', patience=10, min_delta=0.001),
    dict(type='PlainEndHook', share=0.1),
    dict(type='BatchNormEvalHook', batch_size=8),
]
