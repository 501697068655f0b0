"""Train a model, detector or classifier, as its config describes.

    spartan-mm train rtdetr_spartan_t --auto-scale-lr --resume

Checkpoints and logs go to the work dir. Given again after an interruption, the same command goes
on from the last checkpoint. For several processes, see tools/dist_train.sh; a wheel has it in
spartan_mm/.mim/tools.
"""
import os
from argparse import ArgumentParser, Namespace

from .arguments import add, add_config, add_run


def add_arguments(parser: ArgumentParser) -> None:
    """Add the flags."""
    add_config(parser)
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
    add(parser, '--seed', default=None, help='seed of all random numbers (default: random)')
    parser.add_argument('--logger', nargs='+', default=[], metavar='NAME', dest='loggers',
                        help='show the training in tensorboard, mlflow, wandb, clearml, neptune, '
                             'dvclive or aim, too')
    parser.add_argument('--deterministic', action='store_true',
                        help='let torch use deterministic algorithms wherever it has them')


def run(args: Namespace) -> None:
    """Change the config as the flags say, and train."""
    os.environ.setdefault('LOCAL_RANK', str(args.local_rank))
    from mmengine.device import get_device

    from ..backbones.fused import fuse
    from ..datasets.evaluators import check_evaluator
    from ..datasets.preflight import PreflightHook, check_batches
    from ..engine import launch
    from ..engine.agreement import ResumeCheckHook
    from ..engine.finetune import FineTuneHook
    from ..engine.hooks import BackboneCheckHook
    from ..engine.loggers import add_loggers, require_loggers
    require_loggers(args.loggers)
    cfg = launch.load_config(args.config, args.work_dir, args.cfg_options, args.launcher, 'train')
    if args.amp:
        launch.use_amp(cfg, args.amp)
    if args.channels_last:
        launch.use_channels_last(cfg)
    launch.use_compile(cfg, args.compile)
    if args.auto_scale_lr:
        launch.scale_learning_rate(cfg)
    launch.set_randomness(cfg, args.seed, args.deterministic)
    launch.make_resumable(cfg, args.save_every)
    check_evaluator(cfg, 'val')
    overruled = None
    if args.resume or cfg.get('resume'):
        overruled = launch.resume_from(cfg, args.resume or cfg.get('load_from') or 'auto')
    runner = launch.build_runner(cfg, 'train')
    add_loggers(runner, args.loggers)
    # Ahead of hooks that load the checkpoint themselves.
    runner.register_hook(FineTuneHook(), priority='HIGHEST')
    runner.register_hook(ResumeCheckHook(overruled), priority='HIGHEST')
    runner.register_hook(PreflightHook(), priority='HIGHEST')
    runner.register_hook(BackboneCheckHook(), priority='HIGHEST')
    if not args.no_fuse and get_device() == 'cpu':
        fuse(runner.model)
    # Here, since a schedule that counts in epochs cannot be built for epochs of no iterations.
    check_batches(runner.train_loop.dataloader, 'train')
    runner.train()
