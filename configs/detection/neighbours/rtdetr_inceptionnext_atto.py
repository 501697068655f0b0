# RT-DETR with InceptionNeXt-atto and the R50 head, COCO, 70 epochs as SpaRTAN's. Not measured.
_base_ = ['../_base_/rtdetr.py', '../_base_/coco.py', '../_base_/schedule_72e.py']

model = dict(
    backbone=dict(
        _delete_=True,
        type='TIMMFeatures',
        model_name='inception_next_atto.sail_in1k',
        normalize=True,
        pretrained=True))
train_cfg = dict(max_epochs=70)
# NOTE: torch's conversion would lose the activations that many models of timm keep in their norms.
sync_bn = None
