"""Words for people: names cut to length, tables, the gist of an error."""

from collections.abc import Sequence


def shorten(name: str, length: int = 24) -> str:
    """Cut a name where it has more than `length` characters.

    Example:
        >>> shorten('backbone.stages.3', 9)
        'backbone…'
    """
    return name if len(name) <= length else f'{name[:length - 1]}…'


def first_line(error: Exception) -> str:
    """Say what an error says first, or its kind if it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """Write a table in Markdown, its first row the head."""
    lines = [f"| {' | '.join(row)} |" for row in rows]
    lines.insert(1, '|' + '---|' * len(rows[0]))
    return '\n'.join(lines) + '\n'
