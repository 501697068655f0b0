"""Backbones, registered in mmengine's root registry."""
from .baselines import MLP, ConvMixer
from .spartan import SpaRTAN
from .timm import TIMMFeatures

__all__ = ['MLP', 'ConvMixer', 'SpaRTAN', 'TIMMFeatures']
