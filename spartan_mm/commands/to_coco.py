"""Write the labels of YOLO or Pascal VOC as COCO's files, for tools that read nothing else.

    spartan-mm to-coco data/mine --out-dir annotations

Training needs no conversion: `spartan-mm train data/mine` reads these formats. The pictures stay
where they are, named by their paths in the folder.
"""
from argparse import ArgumentParser, Namespace

from ..text import printable
from .arguments import add


def add_arguments(parser: ArgumentParser) -> None:
    """Add the flags."""
    parser.add_argument('data', metavar='DATA', help='folder of the data, or its data.yaml')
    add(parser, '--out-dir', '--out', default='annotations')
    parser.add_argument('--seed', type=int, default=0,
                        help='of the pictures that are held out for validation, where none are '
                             'meant for it (default: %(default)s)')


def run(args: Namespace) -> None:
    """Write, and say where to."""
    from ..detection.to_coco import write_coco
    for path in write_coco(args.data, args.out_dir, args.seed).values():
        print(printable(f'wrote {path}'))
