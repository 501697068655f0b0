"""SpaRTAN backbones and RT-DETR detectors for OpenMMLab.

Importing this package registers the backbone with mmengine; it loads neither mmdet nor mmpretrain.
The detector parts register themselves on ``import spartan_mm.detection``.
"""

from typing import Any

from .compat import stand_in_for_mmcv_ext
from .requirements import require
from .version import __version__

require('mmengine', '0.10.0', 'backbone')
stand_in_for_mmcv_ext()

# ruff: noqa: E402 - mmengine is checked before anything of it is touched
from .backbones import SpaRTAN
from .weights.mmengine_loaders import read_checkpoints_safely
from .weights.stored_config import config_from
from .zoo import config_path, get_config, get_model, list_models

read_checkpoints_safely()

__all__ = [
    'SpaRTAN', '__version__', 'config_from', 'config_path', 'get_config', 'get_model',
    'list_models', 'train'
]


def __getattr__(name: str) -> Any:
    """Import what takes long when it is asked for."""
    if name == 'train':
        from .engine.train import train
        return train
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
