"""What is wrong with data: errors that stop, and findings that are collected first."""

import codecs
import reprlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from mmengine import fileio

from .. import text
from ..errors import ExplainedError

#: The first two bytes of a text with a byte order mark.
MARKS = (codecs.BOM_UTF8[:2], codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
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
        # Names of files and classes come from anywhere.
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


def read_text(path: str, backend_args: dict | None = None) -> str:
    """Read a text in UTF-8, or as its byte order mark says, which Windows' tools write.

    Raises:
        DataError: It cannot be read, or is no such text.
    """
    try:
        content = fileio.get(path, backend_args=backend_args)
    except FileNotFoundError:
        raise MissingDataError(f'There is no file {path!r}.') from None
    except OSError as error:
        raise DataError(f'{path}: cannot be read: {error.strerror or error}.') from error
    wide = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        return content.decode('utf-16' if wide else 'utf-8-sig')
    except UnicodeDecodeError as error:
        raise DataError(f'{path}: not a text in UTF-8, or in UTF-16 with a byte order mark: '
                        f'{error}.') from error


def read_lines(path: str) -> list[str]:
    """Read the lines of a text, see :func:`read_text`."""
    return read_text(path).splitlines()
