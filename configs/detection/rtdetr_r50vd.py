# RT-DETR-R50, COCO, 72 epochs: 53.1 AP (paper).
_base_ = ['./_base_/rtdetr.py', './_base_/coco.py', './_base_/schedule_72e.py']

model = dict(backbone=dict(init_cfg=dict(
    type='ConvertedPretrained', converter='resnet_vd',
    checkpoint='https://github.com/lyuwenyu/storage/releases/download/v0.1/'
               'ResNet50_vd_ssld_v2_pretrained_from_paddle.pth')))
