"""Count what the paper's Tables II, III, IV, V and VIII say of sizes, and write docs/tables.md.

The models come from this package, mmpretrain, mmdet and timm, without weights: nothing is
downloaded. It takes a minute or two, most of it for Deformable-DETR, the only model that has to
compute. With --check, nothing is written: the page is compared with the counts.
"""

import argparse
import os
import sys
import warnings
from pathlib import Path

# A checkout that is not installed; what is installed comes first.
ROOT = Path(__file__).resolve().parents[2]
sys.path.append(os.fspath(ROOT))

from rich.progress import track  # noqa: E402

from spartan_mm.analysis.paper_tables import (  # noqa: E402
    TABLES,
    UnexplainedError,
    fill_in,
    list_rows,
    make_table,
    read_tables,
)
from spartan_mm.files import write_whole  # noqa: E402

PAGE = ROOT / 'docs' / 'tables.md'


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--only', nargs='+', choices=TABLES, default=TABLES, metavar='TABLE',
                        help=f'some of {", ".join(TABLES)}')
    parser.add_argument('--check', action='store_true', help='compare, and write nothing')
    args = parser.parse_args()
    # Of mmdet's models, once in the middle of a progress bar.
    warnings.filterwarnings('ignore', 'torch.meshgrid')
    try:
        old = PAGE.read_text(encoding='utf-8')
        tables = {table: make_table(table, track(list_rows(table), description=f'Table {table}'))
                  for table in args.only}
        new = fill_in(old, tables)
        if not args.check:
            with write_whole(PAGE) as file:
                file.write(new.encode())
            return
    except (ImportError, OSError, UnexplainedError, ValueError) as error:
        sys.exit(f'error: {error}')

    problems = [f'error: Table {table} of {PAGE.relative_to(ROOT)} is not what is counted:\n'
                f'  there:   {was}\n  counted: {is_}'
                for table, text in tables.items()
                for was, is_ in differing(read_tables(old)[table], text)]
    if problems:
        sys.exit('\n'.join([*problems, 'error: run tools/analysis_tools/paper_tables.py']))


def differing(old: str, new: str) -> list[tuple[str, str]]:
    """Pair the lines that are not the same."""
    lines = old.splitlines(), new.splitlines()
    length = max(map(len, lines))
    padded = (each + [''] * (length - len(each)) for each in lines)
    return [(was, is_) for was, is_ in zip(*padded, strict=True) if was != is_]


if __name__ == '__main__':
    main()
