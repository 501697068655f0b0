# Dense one-to-one: more objects in an image, so that more queries are matched. A leaf puts these
# pipelines into its stages, as deim_rtdetr_spartan_t.py does, and BatchMixUp before the model.
mosaic = [dict(type='DenseMosaic'), dict(type='RandomPhotometricDistort', prob=0.5)]
single = [
    dict(type='RandomPhotometricDistort', prob=0.5),
    dict(type='RandomZoomOut', prob=0.5),
    dict(type='RandomIoUCrop', prob=0.8),
]

# ECDet's, from the first epoch to the half.
dense_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations', with_bbox=True),
    dict(type='RandomChoice', transforms=[mosaic, single], prob=[0.75, 0.25]),
    dict(type='FilterSmallBoxes'),
    dict(type='RandomFlip', prob=0.5),
    dict(type='AntialiasedResize', scale=(640, 640)),
    dict(type='FilterSmallBoxes'),
    dict(type='PackDetInputs'),
]
# DEIM's, from the fifth epoch to the half; before it, the bare pipeline.
deim_pipeline = dense_pipeline[:2] + [dict(dense_pipeline[2], prob=[0.5, 0.5])] + dense_pipeline[3:]
