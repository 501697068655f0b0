# DEIM-RT-DETRv2-R34, COCO, 120 epochs: 50.9 AP (paper).
_base_ = './deim_rtdetr_r18vd.py'

model = dict(
    backbone=dict(
        depth=34,
        init_cfg=dict(checkpoint='https://github.com/lyuwenyu/storage/releases/download/v0.1/'
                                 'ResNet34_vd_pretrained_from_paddle.pth')),
    decoder=dict(num_layers=4))
optim_wrapper = dict(paramwise_cfg=dict(rules=[
    _base_.norms, dict(pattern=r'^backbone\.', lr_mult=0.5)]))
