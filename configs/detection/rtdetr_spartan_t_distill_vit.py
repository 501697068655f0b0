# RT-DETR with SpaRTAN-T whose coarsest map learns from a frozen DINOv3 ViT-B, as RT-DETRv4 does it;
# what runs is rtdetr_spartan_t.py's. Nobody has trained it on COCO. timm downloads the teacher; to
# take a file: --cfg-options model.distillation.teacher.checkpoint=FILE
_base_ = './rtdetr_spartan_t.py'

model = dict(
    distillation=dict(
        type='FeatureDistillation',
        teacher=dict(model_name='vit_base_patch16_dinov3.lvd1689m'),
        channels=768,
        loss_weight=5.0))
