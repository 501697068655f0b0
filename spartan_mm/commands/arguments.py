"""The flags that several commands have, each in one place: same name, same meaning, same words."""
import argparse
import sys
from argparse import ArgumentParser
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmengine.config import DictAction

from ..files import check_writable
from ..text import printable

if TYPE_CHECKING:
    from ..analysis.look_inside.inputs import GivenModel
    from ..inference import Source


def positive(text: str) -> int:
    """Read a whole number from 1 on, as the ``type`` of a flag."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f'{text} must be a whole number, at least 1')
    return int(text)


def share(text: str) -> float:
    """Read a number from 0 to 1, as the ``type`` of a flag."""
    try:
        if 0 <= float(text) <= 1:
            return float(text)
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f'{text} must be a number from 0 to 1')


def _sides(text: str) -> list[int]:
    """Read a side, or HxW."""
    return [*map(positive, text.split('x'))]


class _Size(argparse.Action):
    """Height and width, of one number or two."""

    def __call__(self, parser, namespace, values, option_string=None) -> None:
        values = sum(values, [])
        if len(values) > 2:
            parser.error(f'{option_string} takes a side, or a height and a width, not '
                         f'{len(values)} numbers')
        setattr(namespace, self.dest, (values[0], values[-1]))


_FLAGS = {
    '--cfg-options': dict(
        nargs='+', action=DictAction, metavar='KEY=VALUE',
        help='override settings of the config, such as train_dataloader.batch_size=2 '
             '"model.backbone.out_indices=(1,2,3)"'),
    '--out-dir': dict(type=Path, metavar='DIR', help='where to write (default: %(default)s)'),
    '--device': dict(
        metavar='DEVICE', help="such as 'cpu' or 'cuda:0' (default: a GPU if there is one)"),
    '--seed': dict(type=int, default=0, metavar='N',
                   help='seed of all random numbers (default: %(default)s)'),
    '--names': dict(nargs='+', metavar='NAME',
                    help='what to call the models (default: their own names)'),
    '--images': dict(type=positive, metavar='N'),
    '--size': dict(type=_sides, nargs='+', action=_Size, metavar=('H', 'W')),
    '--batch-size': dict(type=positive, metavar='N'),
    '--rounds': dict(type=positive, metavar='N',
                     help='how often each is timed (default: as often as takes some 20 s)'),
    '--json': dict(type=Path, metavar='FILE', help='write the numbers to it, too'),
    '--score-thr': dict(type=share, default=0.3, metavar='SCORE',
                        help='least score of a detection that counts (default: %(default)s)'),
    '--match-classes': dict(
        choices=('name', 'number'),
        help="if the checkpoint's classes are not those of the data: put its outputs in their "
             'order by name, or take classes of the same number for the same (default: stop)'),
}


def add(parser: ArgumentParser, flag: str, *older: str, **options: Any) -> None:
    """Add a flag that several commands have.

    Args:
        parser: Of the command, or a group of its flags.
        flag: Its name.
        older: Names that go on to work.
        options: What this command says otherwise, such as its default.
    """
    parser.add_argument(flag, *older, **_FLAGS[flag] | options)


def add_config(parser: ArgumentParser) -> None:
    """Add CONFIG, and ``--cfg-options`` to change it."""
    parser.add_argument('config', metavar='CONFIG', help='config file, or the name of a model')
    add(parser, '--cfg-options')


def add_any_model(parser: ArgumentParser, name: str = 'config', **options) -> None:
    """Add CONFIG, a model of anybody's; of several, `name` is another."""
    from ..analysis.models import NAMES
    parser.add_argument(name, metavar=name.rstrip('s').upper(), help=f'a model: {NAMES}', **options)


def add_run(parser: ArgumentParser) -> None:
    """Add what the commands have that build a runner: ``--work-dir``, ``--launcher`` and others."""
    parser.add_argument('--work-dir', metavar='DIR',
                        help='folder for logs and results (default: work_dir of the config, else '
                             './work_dirs/<name of the config>)')
    parser.add_argument('--compile', nargs='?', const='default', metavar='MODE',
                        help='compile the model, the way to go on a GPU; MODE is one of '
                             "torch.compile's: default, reduce-overhead, max-autotune")
    parser.add_argument('--launcher', choices=('none', 'pytorch', 'slurm', 'mpi'), default='none',
                        help='what started the processes (default: %(default)s); dist_train.sh and '
                             'dist_test.sh set it')
    # torch.distributed.launch passes the rank as a flag, torchrun as a variable.
    parser.add_argument('--local-rank', '--local_rank', type=int, default=0, help=argparse.SUPPRESS)


def add_looked_at(parser: ArgumentParser, out_dir: str, several: bool = True) -> None:
    """Add INPUT, the pictures, and the models that look at them, or one; where, and on what."""
    from ..analysis.models import NAMES
    parser.add_argument('input', metavar='INPUT',
                        help='an image, or a folder; it is searched with its subfolders')
    help = f'with its weights, a file or URL. MODEL is {NAMES}'
    if several:
        parser.add_argument('models', nargs='+', metavar='MODEL[=CHECKPOINT]',
                            help=f'models, each {help}')
        add(parser, '--names')
    else:
        parser.add_argument('models', nargs=1, metavar='MODEL[=CHECKPOINT]', help=f'a model {help}')
        parser.set_defaults(names=None)
    add(parser, '--out-dir', default=out_dir)
    add(parser, '--device')


def add_sample(parser: ArgumentParser, images: int | None) -> None:
    """Add how many pictures to draw, and what to do about models without weights."""
    add(parser, '--images', '--num-images', default=images,
        help=f'number of images, drawn at random (default: {images or "all"})')
    parser.add_argument('--random', action='store_true',
                        help='give models without a checkpoint random weights')
    add(parser, '--seed')


def take_sample(args: argparse.Namespace, picture: str
                ) -> tuple[Path, 'Source', list['GivenModel']]:
    """Do what the flags of :func:`add_looked_at` and :func:`add_sample` say.

    Returns:
        The path of the picture to write; the images that were drawn; the models, loaded.
    """
    from ..analysis.look_inside.inputs import choose_images, load_models
    from ..inference import find_images
    source, target = find_images(args.input, args.out_dir), args.out_dir / picture
    check_writable(target)
    source.images = choose_images(source.images, args.images, args.seed)
    return target, source, load_models(args.models, args.names, args.random, args.device, args.seed)


def add_layers(parser: ArgumentParser, help: str) -> None:
    """Add ``--layer``; :func:`layer_of_each` reads it."""
    parser.add_argument('--layer', nargs='+', default=[None], dest='layers', metavar='LAYER',
                        help=f'{help}, one for all models or one for each (default: the last stage '
                             'of the backbone); spartan-mm cam --list-layers prints all there are')


def layer_of_each(args: argparse.Namespace) -> list[str | None]:
    """The layer of each model; leave if there is another number of them."""
    if len(args.layers) not in (1, len(args.models)):
        args.parser.error(f'--layer: {len(args.layers)} layers for {len(args.models)} models')
    return args.layers if len(args.layers) > 1 else args.layers * len(args.models)


def add_work(parser: ArgumentParser) -> None:
    """Add what times depend on: device, ``--amp`` and ``--threads``; `use_threads` reads that."""
    add(parser, '--device')
    parser.add_argument('--amp', choices=('float16', 'bfloat16'),
                        help='automatic mixed precision')
    parser.add_argument('--threads', type=positive, metavar='N',
                        help="of the CPU (default: PyTorch's)")


def add_results(parser: ArgumentParser, out_dir: str) -> None:
    """Add what commands have in common that look at the predictions of a test.

    Args:
        parser: Of the command.
        out_dir: Default of ``--out-dir``.
    """
    add_config(parser)
    parser.add_argument('predictions', metavar='FILE.pkl', help='what a test with --out wrote')
    add(parser, '--out-dir', default=out_dir)
    add(parser, '--score-thr')
    parser.add_argument('--iou-thr', type=float, default=0.5, metavar='IOU',
                        help='least overlap of a detection with the object that it finds (default: '
                             '%(default)s)')


def read_results(args: argparse.Namespace, first: str) -> tuple[Any, bool]:
    """Read what `add_results` named, before it check that the file `first` has a place.

    Returns:
        What :func:`~.predictions.read_results` gives, and whether it is a detector's.
    """
    from ..analysis.mistakes.predictions import DetectorResults, read_results
    from ..engine.launch import load_config
    check_writable(args.out_dir / first)
    results = read_results(load_config(args.config, options=args.cfg_options), args.predictions)
    return results, isinstance(results, DetectorResults)


def report_failures(failures: Iterable[object]) -> int:
    """Print what went wrong at the end of a command, a line each; return its status."""
    failures = list(failures)
    for failure in failures:
        print(printable(f'error: {failure}'), file=sys.stderr)
    return int(bool(failures))
