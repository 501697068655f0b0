"""Draw samples of a config's dataset on sheets: as they are, after the pipeline, or as the model
gets them, batch augmentations (another size, Mixup, CutMix) included.

DIR gets a sheet <split>_<stage>.png for each stage, with the same samples in the same places. For a
file for each picture of the whole dataset there are mmdet's own browse_dataset.py, which needs an
mmcv with compiled ops, and mmpretrain's, which draws what each step of the pipeline does, too
(--mode pipeline).
"""

import argparse
import os
import sys
from pathlib import Path

# A checkout that is not installed; what is installed comes first.
sys.path.append(os.fspath(Path(__file__).resolve().parents[2]))

from mmengine.config import DictAction  # noqa: E402

from spartan_mm.analysis.browsing import STAGES, browse, draw_views  # noqa: E402
from spartan_mm.engine import launch  # noqa: E402
from spartan_mm.files import check_writable, write_whole  # noqa: E402


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('config', help='config file, or the name of a model')
    parser.add_argument('--stage', nargs='+', choices=STAGES, default=['model'], metavar='STAGE',
                        help=f'one or several of {", ".join(STAGES)} (default: model)')
    parser.add_argument('--split', choices=('train', 'val', 'test'), default='train',
                        help='which dataset (default: %(default)s)')
    parser.add_argument('--number', type=int, default=16, metavar='N',
                        help='how many samples (default: %(default)s)')
    parser.add_argument('--seed', type=int, default=0,
                        help='of the choice and the augmentation (default: %(default)s)')
    parser.add_argument('--columns', type=int, default=4, metavar='N',
                        help='pictures side by side (default: %(default)s)')
    parser.add_argument('--side', type=int, default=320, metavar='PIXELS',
                        help='longer side of each picture on the sheet (default: %(default)s)')
    parser.add_argument('--out-dir', type=Path, metavar='DIR',
                        default=Path('work_dirs/browse_dataset'),
                        help='where to write (default: %(default)s)')
    parser.add_argument('--cfg-options', nargs='+', action=DictAction, metavar='KEY=VALUE',
                        help='override settings of the config')
    args = parser.parse_args()
    for name in ('number', 'columns', 'side'):
        if getattr(args, name) < 1:
            parser.error(f'--{name} {getattr(args, name)}: must be at least 1')
    return args


def main() -> None:
    args = parse_args()
    with launch.reporting():
        check_writable(args.out_dir / f'{args.split}_{args.stage[0]}.png')
        config = launch.load_config(args.config, options=args.cfg_options)
        try:
            samples = browse(config, args.stage, args.number, args.seed, args.split)
        except OSError as error:  # a picture that cannot be read
            raise launch.UsageError(str(error)) from error
        for stage, views in samples.views.items():
            path = args.out_dir / f'{args.split}_{stage}.png'
            with write_whole(path) as file:
                draw_views(views, samples.classes, args.columns, args.side).save(file, 'PNG')
            print(f'see {path}')


if __name__ == '__main__':
    main()
