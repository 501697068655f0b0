# RT-DETR-R18, COCO, 72 epochs: 46.5 AP (paper).
_base_ = ['./_base_/rtdetr_r18vd_r34vd.py', './_base_/coco.py', './_base_/schedule_72e.py']

model = dict(
    backbone=dict(
        depth=18,
        init_cfg=dict(
            type='ConvertedPretrained', converter='resnet_vd',
            checkpoint='https://github.com/lyuwenyu/storage/releases/download/v0.1/'
                       'ResNet18_vd_pretrained_from_paddle.pth')),
    decoder=dict(num_layers=3))
