"""RT-DETR and what trains it, registered in mmdet's registries.

Put ``custom_imports = dict(imports=['spartan_mm.detection'])`` into a config to use it.
"""
from ..requirements import require

require('mmcv', '2.0.0', 'detection')
require('mmdet', '3.3.0', 'detection')

# ruff: noqa: E402 - the packages' versions are checked before anything of theirs is touched
from .. import engine  # noqa: F401
from .batch_mix import BatchMixUp
from .batch_resize import BatchRandomResize
from .coco_dataset import CheckedCocoDataset, LoadCheckedImage
from .coco_metric import CheckedCocoMetric
from .deformable_attention import MultiScaleDeformableAttention
from .denoising import DenoisingGenerator
from .dfine_decoder import DFINEDecoder
from .dfine_head import DFINEHead
from .distillation import DetectorDistillation, DistillationWeightHook, FeatureDistillation
from .elan_encoder import ELANEncoder
from .geometry import AntialiasedResize, FilterSmallBoxes, RandomIoUCrop, RandomZoomOut
from .hooks import CheckedPipelineSwitchHook
from .hybrid_encoder import HybridEncoder
from .inferencer import DetInferencer
from .label_datasets import CheckedVOCDataset, CheckedYOLODataset
from .losses import IoUAwareVarifocalLoss, MatchabilityAwareLoss
from .mosaic import DenseMosaic
from .photometric import RandomPhotometricDistort
from .resnet_vd import ResNetVd
from .rtdetr import RTDETR
from .rtdetr_decoder import RTDETRDecoder
from .rtdetr_head import RTDETRHead

__all__ = [
    'AntialiasedResize', 'BatchMixUp', 'BatchRandomResize', 'CheckedCocoDataset',
    'CheckedCocoMetric', 'CheckedPipelineSwitchHook', 'CheckedVOCDataset', 'CheckedYOLODataset',
    'DenoisingGenerator', 'DenseMosaic', 'DetectorDistillation', 'DetInferencer', 'DFINEDecoder',
    'DFINEHead', 'DistillationWeightHook', 'ELANEncoder', 'FeatureDistillation',
    'FilterSmallBoxes', 'HybridEncoder', 'IoUAwareVarifocalLoss',
    'LoadCheckedImage', 'MatchabilityAwareLoss', 'MultiScaleDeformableAttention',
    'RandomIoUCrop', 'RandomPhotometricDistort', 'RandomZoomOut', 'ResNetVd', 'RTDETR',
    'RTDETRDecoder', 'RTDETRHead'
]
