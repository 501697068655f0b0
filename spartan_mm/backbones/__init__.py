"""Backbones, registered in mmengine's root registry."""
from .spartan import SpaRTAN

__all__ = ['SpaRTAN']
