"""SpaRTAN backbones and RT-DETR detectors for OpenMMLab.

Importing this package registers the backbone with mmengine; it loads neither mmdet nor mmpretrain.
The detector parts register themselves on ``import spartan_mm.detection``.
"""

from . import compat
from .version import __version__

compat.require('mmengine', '0.10.0', 'backbone')
compat.stand_in_for_mmcv_ext()
compat.read_checkpoints_safely()

# ruff: noqa: E402 - mmengine is checked before anything of it is touched
from .backbones import SpaRTAN
from .engine.publish import config_from
from .zoo import config_path, get_config, get_model, list_models

__all__ = [
    'SpaRTAN', '__version__', 'config_from', 'config_path', 'get_config', 'get_model', 'list_models'
]
