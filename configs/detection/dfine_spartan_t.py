# SpaRTAN-T with D-FINE's neck, decoder and distributions, trained as deim_rtdetr_spartan_t.py:
# with MAL and dense one-to-one, 74 epochs. Nobody has trained it on COCO.
_base_ = './deim_rtdetr_spartan_t.py'

model = dict(
    neck=dict(type='ELANEncoder'),
    decoder=dict(type='DFINEDecoder', num_points=(3, 6, 3)),
    bbox_head=dict(type='DFINEHead', reg_max=32, reg_scale=4.0))
