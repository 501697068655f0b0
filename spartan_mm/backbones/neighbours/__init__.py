"""Light backbones of others, to be compared with SpaRTAN under the same heads and recipes."""
from .affnet import AFFNet
from .casvit import CASViT
from .lsnet import LSNet
from .moganet import MogaNet
from .pooling import PoolingNeck
from .unireplknet import UniRepLKNet

__all__ = ['AFFNet', 'CASViT', 'LSNet', 'MogaNet', 'PoolingNeck', 'UniRepLKNet']
