"""What is wrong with data: errors that stop, and findings that are collected first."""

import reprlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from .. import text
from ..errors import ExplainedError

MAX_NAMED = 5
_MAX_LISTED = 20


class DataError(ExplainedError, ValueError):
    """Data is not what it should be; the message is one line that names the culprit.

    NOTE: torch passes an error of a data loader's worker on with the worker's traceback in the
    message. The traceback is cut off here: the message alone says what is wrong.
    """

    def __init__(self, message: str) -> None:
        if message.startswith('Caught ') and '\nOriginal Traceback' in message:
            message = message.rstrip().rpartition('\n')[2].partition(': ')[2]
        super().__init__(message)


class MissingDataError(DataError, FileNotFoundError):
    """A file that the data needs does not exist."""


class UndecodableError(DataError):
    """The file of an image is there, and no image can be made of it."""


@dataclass(frozen=True)
class Finding:
    """Something to know about a dataset before it is used.

    Args:
        level: 'error' for what surely fails or gives wrong results, 'warning' for what may, 'note'
            for what is right and worth knowing.
        kind: A few words for what was found, the same for every dataset.
        message: One line that names the first culprits.
        count: Number of culprits.
        images: Paths of the first images concerned.
    """

    level: str
    kind: str
    message: str
    count: int = 1
    images: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, 'message', text.printable(self.message))


def name_culprits(items: Sequence[Any], describe: Callable[[Any], str], remedy: str = '') -> str:
    """Describe the first of several culprits, and count the others.

    Example:
        >>> name_culprits(range(7), lambda item: f'page {item} is torn', 'Replace them.')
        'page 0 is torn; page 1 is torn; page 2 is torn; page 3 is torn; page 4 is torn; and 2
        more. Replace them.'
    """
    named = [describe(item) for item in items[:MAX_NAMED]]
    if len(items) > MAX_NAMED:
        named.append(f'and {len(items) - MAX_NAMED} more')
    return '; '.join(named) + (f'. {remedy}' if remedy else '')


def join(values: Iterable[Any], limit: int = _MAX_LISTED) -> str:
    """List values, shortened where there are many.

    Example:
        >>> join(['cat', 5])
        'cat, 5'
        >>> join(range(9), limit=2)
        '0, 1, ... (9 in all)'
    """
    return text.join(values, limit, '',
                     lambda value: value if isinstance(value, str) else show(value))


def show(value: Any) -> str:
    """Write a value in one short line, whatever it is."""
    return ' '.join(reprlib.repr(value).split())
