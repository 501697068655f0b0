"""Backbones, registered in mmengine's root registry."""
from .baselines import MLP, ConvMixer
from .masked import MaskedSpaRTAN
from .neighbours import AFFNet, CASViT, LSNet, MogaNet, UniRepLKNet
from .spartan import SpaRTAN
from .timm import TIMMFeatures

__all__ = ['AFFNet', 'CASViT', 'LSNet', 'MLP', 'ConvMixer', 'MaskedSpaRTAN', 'MogaNet', 'SpaRTAN',
           'TIMMFeatures', 'UniRepLKNet']
