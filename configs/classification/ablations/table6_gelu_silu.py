# Table VI, GELU in the patch embeddings, SiLU in the blocks: 73.2 % top-1 (paper).
# NOTE: The stem is a patch embedding here, too; the released models have GELU in it.
_base_ = ['../_base_/spartan.py', '../_base_/imagenet_224.py', '../_base_/schedule_300e.py']

model = dict(backbone=dict(stem_act='GELU', patch_act='GELU', block_act='SiLU'))
