"""Words for people: names cut to length, tables, the gist of an error; and lines on a screen.

Names of files, classes and configs come from anywhere. What is written here has them `printable`.
"""

import shutil
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from .runtime import printable as printable


def shorten(name: str, length: int = 24) -> str:
    """Cut a name where it has more than `length` characters.

    Example:
        >>> shorten('backbone.stages.3', 9)
        'backbone…'
    """
    name = printable(name)
    return name if len(name) <= length else f'{name[:length - 1]}…'


def first_line(error: Exception) -> str:
    """Say what an error says first, or its kind if it says nothing."""
    return printable((str(error).strip() or type(error).__name__).splitlines()[0])


def markdown(rows: Sequence[Sequence[str]]) -> str:
    r"""Write a table in Markdown, its first row the head.

    Example:
        >>> print(markdown([['class'], ['a|b']]), end='')
        | class |
        |---|
        | a\|b |
    """
    cells = [[printable(cell).replace('|', r'\|') for cell in row] for row in rows]
    lines = [f"| {' | '.join(row)} |" for row in cells]
    lines.insert(1, '|' + '---|' * len(rows[0]))
    return '\n'.join(lines) + '\n'


def join(items: Iterable[Any], limit: int = 8, none: str = 'none',
         write: Callable[[Any], str] = str) -> str:
    """Name some things, or the first of them and their number if there are many.

    Args:
        items: The things.
        limit: The most that are named.
        none: What to say if there are none.
        write: Writes one.

    Example:
        >>> join(['cat', 'dog']), join([]), join(range(9), limit=2)
        ('cat, dog', 'none', '0, 1, ... (9 in all)')
    """
    items = list(items)
    more = f', ... ({len(items)} in all)' if len(items) > limit else ''
    return (printable(', '.join(map(write, items[:limit]))) or none) + more


def count(number: int, noun: str) -> str:
    """Say how many there are of something.

    Example:
        >>> count(1, 'class'), count(2, 'class'), count(0, 'key')
        ('1 class', '2 classes', '0 keys')
    """
    ending = 'es' if noun.endswith(('s', 'x', 'ch', 'sh')) else 's'
    return f'{number} {noun}{"" if number == 1 else ending}'


class Console:
    """Lines that stay, and below them one that changes; in a file, now and then a line of it."""

    def __init__(self, pause: float = 20.) -> None:
        self._live = sys.stdout.isatty()
        self._pause = pause
        self._shown = 0.
        self._width = 0

    def line(self, text: str = '') -> None:
        """Print a line that stays."""
        self._clear()
        self._shown = time.monotonic()
        print(text, flush=True)

    def status(self, text: str) -> None:
        """Show how far a step is."""
        text = printable(text)
        if self._live:
            text = text[:shutil.get_terminal_size().columns - 1]
            print(f'\r{text:<{self._width}}', end='', flush=True)
            self._width = len(text)
        elif time.monotonic() - self._shown > self._pause:
            self._shown = time.monotonic()
            print(text, flush=True)

    def _clear(self) -> None:
        if self._width:
            print(f'\r{"":<{self._width}}\r', end='')
            self._width = 0
