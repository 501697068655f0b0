"""Evaluate a checkpoint, detector or classifier, as its config describes."""

import argparse
import os
import sys

# A checkout that is not installed; what is installed comes first.
sys.path.append(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from spartan_mm.engine import launch  # noqa: E402
from spartan_mm.engine.checkpoint import StrictCheckpointHook  # noqa: E402


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('config', help='config file, or the name of a model')
    parser.add_argument('checkpoint', help='checkpoint file or URL')
    launch.add_common_arguments(parser)
    parser.add_argument('--out', metavar='FILE.pkl', help='keep the predictions in a pickle file')
    parser.add_argument('--show', action='store_true', help='show each picture in a window')
    parser.add_argument('--show-dir', metavar='DIR',
                        help='write pictures with predictions to <work dir>/<time>/DIR')
    parser.add_argument('--wait-time', type=float, default=2., metavar='SECONDS',
                        help='how long --show shows each picture (default: %(default)s)')
    args = parser.parse_args()
    if args.out and not args.out.endswith(('.pkl', '.pickle')):
        parser.error(f'--out {args.out}: the name must end in .pkl or .pickle')
    os.environ.setdefault('LOCAL_RANK', str(args.local_rank))
    return args


def main() -> None:
    args = parse_args()
    with launch.reporting():
        cfg = launch.load_config(args.config, args.work_dir, args.cfg_options, args.launcher)
        launch.load_weights(cfg, args.checkpoint)
        launch.use_compile(cfg, args.compile)
        if args.show or args.show_dir:
            launch.visualize(cfg, args.show, args.show_dir, args.wait_time)
        if args.out:
            launch.keep_predictions(cfg, args.out)
        runner = launch.build_runner(cfg)
        # Ahead of hooks that load the checkpoint themselves.
        runner.register_hook(StrictCheckpointHook(), priority='HIGHEST')
        runner.test()


if __name__ == '__main__':
    main()
