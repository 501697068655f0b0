"""Backbones, registered in mmengine's root registry."""
from .baselines import MLP, ConvMixer
from .neighbours import AFFNet, CASViT, LSNet, MogaNet, UniRepLKNet
from .spartan import SpaRTAN
from .timm import TIMMFeatures

__all__ = ['AFFNet', 'CASViT', 'LSNet', 'MLP', 'ConvMixer', 'MogaNet', 'SpaRTAN', 'TIMMFeatures',
           'UniRepLKNet']
