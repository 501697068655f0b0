"""Words for messages: lists cut short, things counted, errors in a line."""
from collections.abc import Iterable
from textwrap import shorten as _shorten


def join(items: Iterable[object], limit: int = 8, none: str = 'none') -> str:
    """Name some things, or the first of them and their number if there are many.

    Args:
        items: Written with ``str``.
        limit: The most that are named.
        none: What to say if there are none.

    Example:
        >>> join(['cat', 'dog']), join([]), join(range(9), limit=2)
        ('cat, dog', 'none', '0, 1, ... (9 in all)')
    """
    items = [str(item) for item in items]
    more = f', ... ({len(items)} in all)' if len(items) > limit else ''
    return (', '.join(items[:limit]) or none) + more


def count(number: int, noun: str) -> str:
    """Say how many there are of something.

    Example:
        >>> count(1, 'class'), count(2, 'class'), count(0, 'key')
        ('1 class', '2 classes', '0 keys')
    """
    ending = 'es' if noun.endswith(('s', 'x', 'ch', 'sh')) else 's'
    return f'{number} {noun}{"" if number == 1 else ending}'


def shorten(text: object, width: int = 300) -> str:
    """Write something in one line, cut at a blank if it is long.

    Args:
        text: Written with ``str``; an error that says nothing gives its type.
        width: The most characters.

    Example:
        >>> shorten('one\\ntwo   three'), shorten('one two three', 8), shorten(KeyError())
        ('one two three', 'one ...', 'KeyError')
    """
    return _shorten(str(text) or type(text).__name__, max(width, 4), placeholder=' ...')
