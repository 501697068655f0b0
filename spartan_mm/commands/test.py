"""Evaluate a checkpoint, or an exported file, as its config describes.

    spartan-mm test rtdetr_spartan_t epoch_72.pth --out predictions.pkl
    spartan-mm test rtdetr_spartan_t model.onnx

For several processes, see tools/dist_test.sh; a wheel has it in spartan_mm/.mim/tools.
"""
import os
from argparse import ArgumentParser, ArgumentTypeError, Namespace

from ..errors import UsageError
from ..files import check_writable
from ..runtime import SUFFIXES
from .arguments import add, add_config, add_run


def add_arguments(parser: ArgumentParser) -> None:
    """Add the flags."""
    add_config(parser)
    parser.add_argument('checkpoint', metavar='CHECKPOINT',
                        help='checkpoint file or URL, or an exported .onnx, .xml or .tflite file')
    add_run(parser)
    add(parser, '--match-classes')
    parser.add_argument('--out', type=_pickle_name, metavar='FILE.pkl',
                        help='keep the predictions in a pickle file')
    parser.add_argument('--tta', action='store_true',
                        help='predict each image as it is and mirrored, too, and merge both '
                             '(tta_model and tta_pipeline of the config say it otherwise)')
    parser.add_argument('--show', action='store_true', help='show each picture in a window')
    parser.add_argument('--show-dir', metavar='DIR',
                        help='write pictures with predictions to <work dir>/<time>/DIR')
    parser.add_argument('--wait-time', type=float, default=2., metavar='SECONDS',
                        help='how long --show shows each picture (default: %(default)s)')


def run(args: Namespace) -> None:
    """Change the config as the flags say, and test."""
    os.environ.setdefault('LOCAL_RANK', str(args.local_rank))
    from ..datasets.evaluators import check_evaluator
    from ..engine import launch
    from ..export.accuracy import build_tester
    cfg = launch.load_config(args.config, args.work_dir, args.cfg_options, args.launcher, 'test')
    check_evaluator(cfg, 'test')
    if args.checkpoint.lower().endswith(SUFFIXES):
        check_exported(args)
    else:
        launch.use_compile(cfg, args.compile)
    if args.tta:
        launch.use_tta(cfg)
    if args.show or args.show_dir:
        launch.visualize(cfg, args.show, args.show_dir, args.wait_time)
    if args.out:
        check_writable(args.out, args.config, args.checkpoint)
        launch.keep_predictions(cfg, args.out)
    build_tester(cfg, args.checkpoint, args.match_classes).test()


def check_exported(args: Namespace) -> None:
    """Refuse flags that an exported file has no use for."""
    for flag, asked in (('--tta', args.tta), ('--compile', args.compile),
                        (f'--launcher {args.launcher}', args.launcher != 'none')):
        if asked:
            raise UsageError(f'{flag} is for checkpoints: {args.checkpoint} is an exported file, '
                             'which is tested as it is, in one process; drop the flag')


def _pickle_name(text: str) -> str:
    if not text.endswith(('.pkl', '.pickle')):
        raise ArgumentTypeError(f'{text}: the name must end in .pkl or .pickle')
    return text
