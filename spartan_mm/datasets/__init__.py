"""Datasets that need no download."""

from .digits import DIGITS_CATEGORIES, DIGITS_METAINFO, DigitsPaths, make_digits

__all__ = ['DIGITS_CATEGORIES', 'DIGITS_METAINFO', 'DigitsPaths', 'make_digits']
