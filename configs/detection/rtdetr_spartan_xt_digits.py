# A small RT-DETR on SpaRTAN-XT that learns digits from scratch in minutes on two CPU cores.
_base_ = ['./_base_/rtdetr.py', './_base_/digits.py', './_base_/schedule_digits.py']

model = dict(
    num_queries=60,
    data_preprocessor=dict(batch_augments=None),
    backbone=dict(_delete_=True, type='SpaRTAN', arch='xt', out_indices=(1, 2, 3),
                  drop_path_rate=0.),
    neck=dict(embed_dims=128, ffn_dims=256, expansion=0.5, num_blocks=1),
    decoder=dict(in_channels=[128, 128, 128], embed_dims=128, num_layers=3, ffn_dims=256),
    bbox_head=dict(num_classes=10, embed_dims=128),
    dn_cfg=dict(num_queries=30))
