# Table VI, SiLU in the patch embeddings, GELU in the blocks: 73.9 % top-1 (paper).
# NOTE: The stem is a patch embedding here, too; the released models have GELU in it.
_base_ = ['../_base_/spartan.py', '../_base_/imagenet_224.py', '../_base_/schedule_300e.py']

model = dict(backbone=dict(stem_act='SiLU', patch_act='SiLU', block_act='GELU'))
