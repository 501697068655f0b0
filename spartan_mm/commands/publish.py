"""Make a checkpoint fit to be given away: STEM-<hash>.safetensors and STEM-<hash>.pth.

    spartan-mm publish work_dirs/X/epoch_70.pth out/X
    spartan-mm publish work_dirs/X/epoch_70.pth out/X --push ORG/NAME

Both hold the weights that the model is evaluated with, the names of its classes and its config, and
are all that inference needs: `spartan-mm infer` takes either in place of the config. What only the
training needs is left out, as is where things lie on this machine. On the Hugging Face Hub they are
hf://ORG/NAME.
"""
from argparse import ArgumentParser, Namespace

from ..engine.launch import load_config
from ..errors import CheckpointError
from ..text import printable
from ..weights.hub import check_repository, push
from ..weights.model_card import make_card
from ..weights.publish import publish


def add_arguments(parser: ArgumentParser) -> None:
    """Add the flags."""
    parser.add_argument('src', metavar='SRC', help='a checkpoint, path or URL')
    parser.add_argument('stem', metavar='STEM', help='where to write, without hash and suffix')
    parser.add_argument('--config', metavar='CONFIG',
                        help='config file, or the name of a model (default: the config in SRC)')
    parser.add_argument('--classes', nargs='+', metavar='NAME',
                        help="names of the classes, or 'coco' (default: those in SRC, else in the "
                             'config)')
    parser.add_argument('--push', metavar='ORG/NAME',
                        help='put both into this repository of the Hugging Face Hub, too, with a '
                             'model card; it is made if there is none, for all to see')


def run(args: Namespace) -> None:
    """Publish, and list the files."""
    classes = 'coco' if args.classes == ['coco'] else args.classes
    if args.push:
        check_repository(args.push)
    config = args.config and load_config(args.config)
    try:
        files = publish(args.src, args.stem, config, classes)
    except (OSError, CheckpointError) as error:
        raise CheckpointError(f'{args.src} was not published: {error}') from error
    for path in files:
        print(printable(f'{path} ({path.stat().st_size / 1e6:.1f} MB)'))
    if args.push:
        print(printable(push(files, args.push, make_card(files.safetensors, args.push))))
