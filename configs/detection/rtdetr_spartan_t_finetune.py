# RT-DETR with SpaRTAN-T on pictures of your own: an example to copy. `spartan-mm train DATA` writes
# one like it by itself.
_base_ = ['./_base_/rtdetr.py', './_base_/coco.py', './_base_/finetune.py']

load_from = 'rtdetr_spartan_t_coco.pth'  # its classes that are yours, too, are found by name
model = dict(
    backbone=dict(_delete_=True, type='SpaRTAN', arch='t', out_indices=(1, 2, 3)),
    bbox_head=dict(num_classes=3))
train_dataloader = dict(batch_size=8, dataset=dict(
    data_root='data/mine/', ann_file='train.json', data_prefix=dict(img='train/')))
val_dataloader = dict(dataset=dict(
    data_root='data/mine/', ann_file='val.json', data_prefix=dict(img='val/')))
test_dataloader = val_dataloader
val_evaluator = dict(ann_file='data/mine/val.json')
test_evaluator = val_evaluator
