"""Write the table of parameters and multiply-adds into configs/classification/README.md."""

import argparse
import os
import sys
from pathlib import Path

# A checkout that is not installed; what is installed comes first.
sys.path.append(os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))

from spartan_mm.analysis.complexity import comparison_table, insert_table  # noqa: E402

FOLDER = Path(__file__).resolve().parents[2] / 'configs' / 'classification'


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--print', action='store_true', help='print it and leave the file alone')
    args = parser.parse_args()

    table = comparison_table(FOLDER / 'metafile.yml')
    if args.print:
        print(table, end='')
        return
    readme = FOLDER / 'README.md'
    text = insert_table(readme.read_text(encoding='utf-8'), table)
    readme.write_text(text, encoding='utf-8')


if __name__ == '__main__':
    main()
