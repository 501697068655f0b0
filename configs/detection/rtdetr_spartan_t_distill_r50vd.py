# RT-DETR with SpaRTAN-T that learns from the queries of a frozen RT-DETR-R50; what runs is
# rtdetr_spartan_t.py's. Nobody has trained it on COCO. The teacher is a training of ours, or
# official weights by spartan-mm convert: --cfg-options model.distillation.teacher.checkpoint=FILE
_base_ = './rtdetr_spartan_t.py'

model = dict(
    distillation=dict(
        type='DetectorDistillation',
        teacher=dict(config='rtdetr_r50vd', checkpoint='checkpoints/rtdetr_r50vd.pth')))
