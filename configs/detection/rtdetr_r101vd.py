# RT-DETR-R101, COCO, 72 epochs: 54.3 AP (paper).
_base_ = ['./_base_/rtdetr.py', './_base_/coco.py', './_base_/schedule_72e.py']

model = dict(
    backbone=dict(
        depth=101,
        init_cfg=dict(
            type='ConvertedPretrained', converter='resnet_vd',
            checkpoint='https://github.com/lyuwenyu/storage/releases/download/v0.1/'
                       'ResNet101_vd_ssld_pretrained_from_paddle.pth')),
    neck=dict(embed_dims=384, ffn_dims=2048),
    decoder=dict(in_channels=[384, 384, 384]))

# NOTE: The official config replaces the list of groups by this one: norms and biases decay.
optim_wrapper = dict(paramwise_cfg=dict(rules=[dict(pattern=r'^backbone\.', lr_mult=0.01)]))
