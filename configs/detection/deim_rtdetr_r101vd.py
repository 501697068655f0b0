# DEIM-RT-DETRv2-R101, COCO, 60 epochs: 55.5 AP (paper).
_base_ = './deim_rtdetr_r50vd.py'

model = dict(
    backbone=dict(
        depth=101,
        init_cfg=dict(checkpoint='https://github.com/lyuwenyu/storage/releases/download/v0.1/'
                                 'ResNet101_vd_ssld_pretrained_from_paddle.pth')),
    neck=dict(embed_dims=384, ffn_dims=2048),
    decoder=dict(in_channels=[384, 384, 384]))
optim_wrapper = dict(paramwise_cfg=dict(rules=[
    _base_.norms, dict(pattern=r'^backbone\.', lr_mult=0.01)]))
