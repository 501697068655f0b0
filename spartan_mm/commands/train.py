"""Train a model, detector or classifier, on a folder of data or as a config describes.

    spartan-mm train my_pictures --epochs 50
    spartan-mm train rtdetr_spartan_t --auto-scale-lr --resume

Data is a folder in the format of COCO, a Roboflow export, YOLO or Pascal VOC, or one with a folder
of pictures for each class; or a COCO file or YOLO's data.yaml. It is checked, and a config is
written to config.py in the work dir, which is yours to edit and to train again.

Checkpoints and logs go to the work dir. With --resume, the same command given again goes on from
the last checkpoint; without, it begins anew and writes over them.
"""
import os
import sys
from argparse import ArgumentParser, ArgumentTypeError, Namespace

from .arguments import add, add_run, positive

# What says more of data than where it is; a config says it itself.
_OF_DATA = ('model', 'epochs', 'weights', 'batch_size', 'size')


def _batch_size(text: str) -> int | str:
    if text == 'auto':
        return text
    try:
        return positive(text)
    except ArgumentTypeError:
        raise ArgumentTypeError(f"{text} must be a whole number, at least 1, or 'auto'") from None


def add_arguments(parser: ArgumentParser) -> None:
    """Add the flags."""
    parser.add_argument('config', metavar='DATA|CONFIG',
                        help='folder of data; or a config file, or the name of a model')
    add(parser, '--cfg-options')
    _add_flags_of_data(parser)
    add_run(parser)
    parser.add_argument('--amp', nargs='?', const='float16', choices=('float16', 'bfloat16'),
                        help='train in automatic mixed precision on a GPU, float16 unless said '
                             'otherwise')
    parser.add_argument('--channels-last', action='store_true',
                        help='lay weights and maps out with the channels last')
    parser.add_argument('--no-fuse', action='store_true',
                        help="leave SpaRTAN's blocks in their plain form on a CPU, too, where they "
                             'are slower to train')
    parser.add_argument('--auto-scale-lr', action='store_true',
                        help='scale the learning rate to the real total batch size')
    parser.add_argument('--resume', nargs='?', const='auto', metavar='CHECKPOINT',
                        help='continue from a checkpoint, exactly as if there had been no '
                             'interruption; without a name, from the latest whole one in the work '
                             'dir, or from the beginning if there is none')
    parser.add_argument('--save-every', type=int, metavar='ITERATIONS',
                        help='save in the middle of epochs, too (default: as '
                             'default_hooks.checkpoint.every_iters of the config says)')
    add(parser, '--seed', default=None,
        help='seed of all random numbers (default: random; with DATA: 0)')
    parser.add_argument('--logger', nargs='+', default=[], metavar='NAME', dest='loggers',
                        help='show the training in tensorboard, mlflow, wandb, clearml, neptune, '
                             'dvclive or aim, too')
    parser.add_argument('--deterministic', action='store_true',
                        help='let torch use deterministic algorithms wherever it has them')


def _add_flags_of_data(parser: ArgumentParser) -> None:
    """Add what is settled before several processes start."""
    parser.add_argument('--gpus', type=positive, default=1, metavar='N',
                        help='train in so many processes, one for each GPU, or on the CPU where '
                             'there is none (default: %(default)s)')
    group = parser.add_argument_group('with DATA, of which a config is written')
    group.add_argument('--model', metavar='MODEL',
                       help='name of a model, or a config of it (default: rtdetr_spartan_t, for '
                            'folders of classes spartan_t)')
    group.add_argument('--epochs', type=positive, metavar='N',
                       help='number of epochs (default: those of the recipe, of a classifier '
                            'those of its config)')
    group.add_argument('--weights', metavar='FILE',
                       help="checkpoint to start from, a detector's or a classifier's")
    add(group, '--batch-size', type=_batch_size, metavar='auto|N',
        help="images a step on each GPU, 'auto' for as many as fit (default: those of the recipe, "
             'of a classifier those of its config, fewer of a small set)')
    group.add_argument('--size', type=positive, metavar='S',
                       help='side of the images in pixels (default: that of the model)')


def run(args: Namespace) -> None:
    """Write a config if there is none yet, and train as it says."""
    os.environ.setdefault('LOCAL_RANK', str(args.local_rank))
    from ..datasets.layouts import is_data
    from ..engine.data_config import prepare
    from ..engine.launch import load_config
    from ..engine.loggers import require_loggers
    from ..engine.train import train_config
    from ..errors import UsageError
    from ..model_index import NoConfigError, list_models
    require_loggers(args.loggers)
    config = args.config
    if config not in list_models() and is_data(config):
        args.config = str(prepare(
            config, args.model, work_dir=args.work_dir, gpus=args.gpus, seed=args.seed,
            deterministic=args.deterministic, options=args.cfg_options,
            **{name: getattr(args, name) for name in _OF_DATA[1:]}))
        args.work_dir = args.cfg_options = None
    elif given := [name for name in _OF_DATA if getattr(args, name) is not None]:
        known = os.path.isfile(config) or config in list_models()
        raise UsageError(f'--{given[0].replace("_", "-")} goes with a folder of data, and {config} '
                         + ('is a config: change it there, or with --cfg-options' if known else
                            'is none: there is no such folder'))
    if args.gpus > 1 and args.launcher == 'none':
        _start_processes(args, config)
    try:
        cfg = load_config(args.config, args.work_dir, args.cfg_options, args.launcher, 'train')
    except NoConfigError as error:
        raise NoConfigError(f'{error}; there is no folder of data of this name, either') from error
    train_config(
        cfg, amp=args.amp, channels_last=args.channels_last, compile=args.compile,
        auto_scale_lr=args.auto_scale_lr, seed=args.seed, deterministic=args.deterministic,
        save_every=args.save_every, resume=args.resume, fused=not args.no_fuse,
        loggers=args.loggers)


def _start_processes(args: Namespace, given: str) -> None:
    """Become the command that starts several of this one, with the flags that are left to do."""
    from ..engine.train import torchrun
    parser = type(args.parser)(add_help=False)
    _add_flags_of_data(parser)
    if args.config != given:
        # In the config by now.
        parser.add_argument('--work-dir')
        add(parser, '--cfg-options')
    _, words = parser.parse_known_args(args.words)
    words[words.index(given)] = args.config
    command, environment = torchrun(args.gpus, words)
    sys.stdout.flush()
    os.execvpe(command[0], command, environment)
