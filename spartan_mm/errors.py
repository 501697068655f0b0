"""Errors that explain themselves: commands end with their message alone, without a traceback."""
from .text import printable


class ExplainedError(Exception):
    """What is wrong with what was given, and what to do; the base of such errors.

    Its message is one line, whatever the names in it are; further arguments are lines below.
    """

    def __str__(self) -> str:
        return '\n  '.join(map(printable, self.args))


class UsageError(ExplainedError, ValueError):
    """Arguments that do not go together, or not with the config or the machine."""


class InputError(ExplainedError, ValueError):
    """An image, a folder, a video or a config that nothing can be found in or with."""


class CheckpointError(ExplainedError, RuntimeError):
    """A checkpoint that cannot be read, loaded, converted, published or written."""
