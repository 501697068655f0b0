# DEIM-RT-DETRv2-R50 with half as wide blocks in the neck, evaluated at its third decoder layer of
# six, COCO, 60 epochs: 53.2 AP (paper).
_base_ = './deim_rtdetr_r50vd.py'

model = dict(neck=dict(expansion=0.5), decoder=dict(eval_idx=2))
