# RT-DETR with EfficientFormerV2-S0 and the R50 head, COCO, 70 epochs as SpaRTAN's. Not measured.
_base_ = ['../_base_/rtdetr.py', '../_base_/coco.py', '../_base_/schedule_72e.py']

model = dict(
    data_preprocessor=dict(batch_augments=None),
    backbone=dict(
        _delete_=True,
        type='TIMMFeatures',
        model_name='efficientformerv2_s0',
        img_size=640,
        normalize=True))
train_cfg = dict(max_epochs=70)
# Its attention has biases of one size: no other is trained on, and published weights do not fit.
# NOTE: torch's conversion would lose the activations that many models of timm keep in their norms.
sync_bn = None
