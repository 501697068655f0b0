# SpaRTAN-T, pre-trained by SparK; start a classifier or detector from its backbone.
_base_ = './_base_/spark.py'

model = dict(backbone=dict(arch='t'))
