"""Errors that explain themselves: commands end with their message alone, without a traceback."""


class ExplainedError(Exception):
    """What is wrong with what was given, and what to do; the base of such errors."""


class UsageError(ExplainedError, ValueError):
    """Arguments that do not go together, or not with the config or the machine."""


class CheckpointError(ExplainedError, RuntimeError):
    """A checkpoint that cannot be read, loaded, converted, published or written."""
