"""Datasets that need no download."""

from .digit_folder import make_digit_folder
from .digits import DIGITS_CATEGORIES, DIGITS_METAINFO, DigitsPaths, make_digits

__all__ = [
    'DIGITS_CATEGORIES', 'DIGITS_METAINFO', 'DigitsPaths', 'make_digit_folder', 'make_digits'
]
