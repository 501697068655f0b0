# RT-DETR on any backbone of timm, COCO, 72 epochs. Nothing has been trained with it here.
_base_ = ['./_base_/rtdetr.py', './_base_/coco.py', './_base_/schedule_72e.py']

model = dict(
    backbone=dict(
        _delete_=True,
        type='TIMMFeatures',
        model_name='resnet18d.ra4_e3600_r224_in1k',  # the one line to change
        normalize=True,
        pretrained=True))  # downloads the weights when a training starts
# NOTE: torch's conversion would lose the activations that many models of timm keep in their norms.
sync_bn = None
