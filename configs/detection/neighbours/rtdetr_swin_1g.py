# RT-DETR with Swin-1G (Swin-T at half its width) and the R50 head, COCO, 70 epochs as SpaRTAN's.
# Not measured.
_base_ = ['../_base_/rtdetr.py', '../_base_/coco.py', '../_base_/schedule_72e.py']

model = dict(
    backbone=dict(
        _delete_=True,
        type='TIMMFeatures',
        model_name='swin_tiny_patch4_window7_224',
        embed_dim=48,
        strict_img_size=False,
        normalize=True))
train_cfg = dict(max_epochs=70)
# No weights are published for this width.
# NOTE: torch's conversion would lose the activations that many models of timm keep in their norms.
sync_bn = None
