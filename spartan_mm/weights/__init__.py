"""Checkpoints: reading them safely, loading, converting, publishing, the form for inference.

Importing it registers the initializers ``CheckedPretrained`` and ``ConvertedPretrained``.
"""
from .initialize import CheckedPretrained, ConvertedPretrained

__all__ = ['CheckedPretrained', 'ConvertedPretrained']
