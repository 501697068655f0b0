"""Nothing is written twice in the package."""
from collections import defaultdict
from itertools import pairwise
from pathlib import Path

import spartan_mm

PACKAGE = Path(spartan_mm.__file__).parent
LENGTH = 10


def test_no_ten_lines_stand_in_two_places():
    places = defaultdict(list)
    for path in sorted(PACKAGE.rglob('*.py')):
        if '.mim' in path.parts:
            continue  # a wheel's copy of configs and tools
        lines = [(number, text.strip()) for number, text
                 in enumerate(path.read_text(encoding='utf-8').splitlines(), 1) if text.strip()]
        for i in range(len(lines) - LENGTH + 1):
            block = lines[i:i + LENGTH]
            key = tuple(text for _, text in block)
            places[key].append(f'{path.relative_to(PACKAGE)}:{block[0][0]}')
    twice = [f'{one} and {other}' for found in places.values() for one, other in pairwise(found)]
    assert not twice, '\n'.join(twice)
