"""Backbones, registered in mmengine's root registry."""
from .spartan import SpaRTAN
from .timm import TIMMFeatures

__all__ = ['SpaRTAN', 'TIMMFeatures']
