"""Datasets that need no download."""

from .digit_folder import make_digit_folder
from .digits import DIGITS_CATEGORIES, DigitsPaths, make_digits

__all__ = ['DIGITS_CATEGORIES', 'DigitsPaths', 'make_digit_folder', 'make_digits']
