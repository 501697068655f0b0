"""Train a model, detector or classifier, as its config describes."""

import argparse
import os
import sys

# A checkout that is not installed; what is installed comes first.
sys.path.append(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from spartan_mm.engine import launch  # noqa: E402
from spartan_mm.engine.checkpoint import CheckpointError, StrictCheckpointHook  # noqa: E402


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('config', help='config file')
    launch.add_common_arguments(parser)
    parser.add_argument('--amp', nargs='?', const='float16', choices=('float16', 'bfloat16'),
                        help='train in automatic mixed precision, float16 unless said otherwise')
    parser.add_argument('--channels-last', action='store_true',
                        help='lay weights and maps out with the channels last')
    parser.add_argument('--auto-scale-lr', action='store_true',
                        help='scale the learning rate to the real total batch size')
    parser.add_argument('--resume', nargs='?', const='auto', metavar='CHECKPOINT',
                        help='continue from a checkpoint; without a name, from the latest one in '
                             'the work dir')
    parser.add_argument('--seed', type=int, help='seed of all random numbers (default: random)')
    parser.add_argument('--deterministic', action='store_true',
                        help='let torch use deterministic algorithms wherever it has them')
    args = parser.parse_args()
    os.environ.setdefault('LOCAL_RANK', str(args.local_rank))
    return args


def main() -> None:
    args = parse_args()
    try:
        cfg = launch.load_config(args.config, args.work_dir, args.cfg_options, args.launcher)
        if args.amp:
            launch.use_amp(cfg, args.amp)
        if args.channels_last:
            launch.use_channels_last(cfg)
        if args.auto_scale_lr:
            launch.scale_learning_rate(cfg)
        if args.resume:
            launch.resume_from(cfg, args.resume)
        launch.set_randomness(cfg, args.seed, args.deterministic)
        runner = launch.build_runner(cfg)
        if cfg.get('resume'):
            runner.register_hook(StrictCheckpointHook(), priority='HIGHEST')
        runner.train()
    except (FileNotFoundError, launch.UsageError, CheckpointError) as error:
        sys.exit(f'error: {error}')
    launch.shut_down()


if __name__ == '__main__':
    main()
