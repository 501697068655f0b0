"""Errors that explain themselves: commands end with their message alone, without a traceback."""
# runtime.py stands alone where it is copied to, so that its errors are the base of all.
from .runtime import ExplainedError as ExplainedError
from .runtime import InputError as InputError


class UsageError(ExplainedError, ValueError):
    """Arguments that do not go together, or not with the config or the machine."""


class CheckpointError(ExplainedError, RuntimeError):
    """A checkpoint that cannot be read, loaded, converted, published or written."""
