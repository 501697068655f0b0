"""Write the tables of models into the READMEs, from configs/*/metafile.yml.

With --check, nothing is written: the sizes in the metafiles are compared with those of the models,
which takes a second for each, and the READMEs with the metafiles. With --count, the sizes in the
metafiles are counted anew first.
"""

import argparse
import os
import sys
from pathlib import Path

# A checkout that is not installed; what is installed comes first.
ROOT = Path(__file__).resolve().parents[2]
sys.path.append(os.fspath(ROOT))

from rich.progress import track  # noqa: E402

from spartan_mm import zoo  # noqa: E402
from spartan_mm.analysis.model_tables import (  # noqa: E402
    count,
    find_wrong_counts,
    make_texts,
    write_counts,
)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    choice = parser.add_mutually_exclusive_group()
    choice.add_argument('--check', action='store_true', help='compare, and write nothing')
    choice.add_argument('--count', action='store_true', help='write the sizes, too')
    args = parser.parse_args()
    if args.count:
        counts = {name: count(name) for name in track(zoo.list_models(), description='counting')}
        for task in zoo.TASKS:
            metafile = ROOT / 'configs' / task / 'metafile.yml'
            text = write_counts(metafile.read_text(encoding='utf-8'), counts)
            metafile.write_text(text, encoding='utf-8')
        zoo.read_metafiles.cache_clear()
    try:
        texts = make_texts(ROOT)
    except (OSError, ValueError) as error:
        sys.exit(f'error: {error}')

    if not args.check:
        for path, text in texts.items():
            path.write_text(text, encoding='utf-8')
        return
    problems = [f'{path.relative_to(ROOT)} is not what the metafiles say; run '
                'tools/analysis_tools/model_tables.py' for path, text in texts.items()
                if text != path.read_text(encoding='utf-8')]
    for name, model in track(zoo.read_metafiles().items(), description='counting'):
        problems += find_wrong_counts({name: model})
    if problems:
        sys.exit('\n'.join(f'error: {problem}' for problem in problems))


if __name__ == '__main__':
    main()
