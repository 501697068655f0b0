"""Draw samples of a config's dataset on sheets: as they are, after the pipeline, or as the model
gets them, batch augmentations (another size, Mixup, CutMix) included.

    spartan-mm browse my_config.py --stage original model --images 8

DIR gets a sheet SPLIT_STAGE.png for each stage, with the same samples in the same places. For a
file for each picture of the whole dataset there are mmdet's own browse_dataset.py, which needs an
mmcv with compiled ops, and mmpretrain's, which draws what each step of the pipeline does, too
(--mode pipeline).
"""
from argparse import ArgumentParser, Namespace

from ..datasets.check import SPLITS
from ..files import check_writable, write_whole
from ..text import printable
from .arguments import add, add_config, positive

STAGES = ('original', 'pipeline', 'model')


def add_arguments(parser: ArgumentParser) -> None:
    """Add the flags."""
    add_config(parser)
    parser.add_argument('--stage', nargs='+', choices=STAGES, default=['model'], metavar='STAGE',
                        help=f'one or several of {", ".join(STAGES)} (default: model)')
    parser.add_argument('--split', choices=SPLITS, default='train',
                        help='which dataset (default: %(default)s)')
    add(parser, '--images', '--number', default=16,
        help='how many samples (default: %(default)s)')
    add(parser, '--seed')
    parser.add_argument('--columns', type=positive, default=4, metavar='N',
                        help='pictures side by side (default: %(default)s)')
    parser.add_argument('--size', '--side', type=positive, default=320, metavar='PIXELS',
                        help='longer side of each picture on the sheet (default: %(default)s)')
    add(parser, '--out-dir', default='work_dirs/browse_dataset')


def run(args: Namespace) -> None:
    """Draw the sheets."""
    from ..analysis.report.browsing import browse, draw_views
    from ..engine.launch import load_config
    check_writable(args.out_dir / f'{args.split}_{args.stage[0]}.png')
    config = load_config(args.config, options=args.cfg_options)
    classes, samples = browse(config, args.stage, args.images, args.seed, args.split)
    for stage, views in samples.items():
        path = args.out_dir / f'{args.split}_{stage}.png'
        with write_whole(path) as file:
            draw_views(views, classes, args.columns, args.size).save(file, 'PNG')
        print(printable(f'see {path}'))
