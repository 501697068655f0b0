"""What the ImageNet recipe needs beyond mmpretrain, registered for its configs.

Put ``custom_imports = dict(imports=['spartan_mm.classification'])`` into a config to use it.
"""
from ..requirements import require

require('mmcv', '2.0.0', 'classification')
require('mmpretrain', '1.2.0', 'classification')

# ruff: noqa: E402 - the packages' versions are checked before anything of theirs is touched
from mmpretrain.apis import ModelHub

from .. import (
    engine,  # noqa: F401
    model_index,
)
from .dataset import CheckedImageFolder, CheckedImageNet
from .heads import AveragedClsHead
from .hooks import AverageStatisticsHook
from .losses import HardLabelSmoothLoss
from .schedules import WarmupCosineLR
from .spark import PyramidSparK
from .transforms import TorchvisionTransforms

__all__ = [
    'AverageStatisticsHook', 'AveragedClsHead', 'CheckedImageFolder', 'CheckedImageNet',
    'HardLabelSmoothLoss', 'PyramidSparK', 'TorchvisionTransforms', 'WarmupCosineLR'
]

# By name in mmpretrain's get_model, list_models and inferencers.
ModelHub.register_model_index(model_index.root() / 'configs/classification/metafile.yml',
                              model_index.root())
