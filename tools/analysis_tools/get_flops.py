"""Count a model's parameters and operations, as a whole and module by module.

    get_flops.py rtdetr_spartan_t --deploy          both forms, and the modules of the deploy form
    get_flops.py spartan_t --shape 224 224 --depth 4
    get_flops.py timm:resnet18

CONFIG is the name of a model of this package, a config file or a checkpoint that holds its config,
xt or t (the backbone alone), timm:NAME, mmpretrain:NAME or mmdet:NAME, or a config of theirs such
as mmdet::detr/detr_r50_8xb2-150e_coco.py. Neither data nor weights are needed.
"""

import argparse
import json
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# A checkout that is not installed; what is installed comes first.
sys.path.append(os.fspath(ROOT))

from spartan_mm.engine import launch  # noqa: E402


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('config', metavar='CONFIG')
    parser.add_argument('--shape', type=int, nargs=2, metavar=('H', 'W'),
                        help="of the image (default: as in the config's test pipeline)")
    parser.add_argument('--deploy', action='store_true', help='the inference form, too')
    parser.add_argument('--depth', type=int, default=2, metavar='N',
                        help='how far down the modules are listed; -1 for all of them (default: '
                             '%(default)s)')
    parser.add_argument('--json', type=Path, metavar='FILE',
                        help='write the numbers of all modules to it, too')
    args = parser.parse_args()
    if args.shape and min(args.shape) < 1:
        parser.error(f'--shape {args.shape[0]} {args.shape[1]}: must be at least 1')
    return args


def main() -> None:
    args = parse_args()
    import torch

    from spartan_mm.analysis.flops import (
        COUNTED,
        DEPLOY_FORM,
        CountError,
        count_model,
        forms_table,
        tree,
    )
    from spartan_mm.files import check_writable, write_whole
    from spartan_mm.zoo import UnknownModelError

    if args.json:
        check_writable(args.json)
    shape = tuple(args.shape) if args.shape else None
    try:
        counts = [count_model(args.config, shape)]
        if args.deploy and counts[0].form != DEPLOY_FORM:
            counts.append(count_model(args.config, shape, deploy=True))
    except (CountError, UnknownModelError, ImportError) as error:
        sys.exit(f'error: {error}')
    last = counts[-1]
    print(f'{last.name} ({last.source})\n\n{forms_table(counts)}\n'
          f'{last.form}, module by module\n\n'
          f'{tree(last, None if args.depth < 0 else args.depth)}\n'
          f'{COUNTED} torch {torch.__version__}')
    if args.json:
        content = json.dumps([count.to_dict() for count in counts], indent=1)
        with write_whole(args.json) as file:
            file.write(f'{content}\n'.encode())


if __name__ == '__main__':
    with launch.reporting():
        main()
