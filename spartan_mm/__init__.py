"""SpaRTAN backbones and RT-DETR detectors for OpenMMLab.

Importing this package registers the backbone with mmengine; it loads neither mmdet nor mmpretrain.
The detector parts register themselves on ``import spartan_mm.detection``.
"""

from . import compat
from .version import __version__

compat.require('mmengine', '0.10.0', 'backbone')
compat.stand_in_for_mmcv_ext()
compat.let_torch_read_mmengine_checkpoints()

from .backbones import SpaRTAN  # noqa: E402  (needs mmengine, checked above)

__all__ = ['SpaRTAN', '__version__']
