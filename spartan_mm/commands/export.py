"""Write a model for other runtimes, with everything inside, and compare it with the model.

    spartan-mm export rtdetr_spartan_t epoch_72.pth --to onnx --out-dir exported
    python exported/runtime.py exported/rtdetr_spartan_t.onnx photos/

A detector takes images and their original sizes and gives labels, boxes and scores, a classifier
takes images and gives scores; both take bytes in RGB order. What runtime.py needs to know (classes,
size, how images are resized) stands in the file.
"""
from argparse import ArgumentParser, ArgumentTypeError, Namespace

from ..files import clean_up_on_sigterm
from ..text import printable
from .arguments import add, positive


def add_arguments(parser: ArgumentParser) -> None:
    """Add the flags."""
    from ..export.formats import FORMATS
    parser.add_argument('config', metavar='CONFIG',
                        help='config file, or the name of a model; or a checkpoint that holds its '
                             'config, as published ones do')
    parser.add_argument('checkpoint', nargs='?', metavar='CHECKPOINT',
                        help='checkpoint file or URL, if it is not in the place of the config')
    parser.add_argument('--to', choices=FORMATS, default='onnx',
                        help='the format (default: %(default)s)')
    add(parser, '--out-dir', default='exported')
    add(parser, '--size', help="of the images (default: that of the config's test pipeline)")
    parser.add_argument('--dynamic', type=_axes, default=None, metavar='AXES',
                        help='what stays free: batch, size, batch,size or none (default: batch, '
                             'where the format has it)')
    parser.add_argument('--raw', action='store_true',
                        help='give logits, and the boxes of all queries, in place of results')
    parser.add_argument('--precision', choices=('fp32', 'fp16', 'bf16', 'int8'), default='fp32',
                        help='of weights and computation (default: %(default)s)')
    parser.add_argument('--calibration', type=_pictures, default=64, metavar='IMAGES|N',
                        help='what int8 measures ranges with: a folder of images, or how many of '
                             "the config's test data (default: %(default)s)")
    checks = parser.add_mutually_exclusive_group()
    checks.add_argument('--check', type=_pictures, default=8, metavar='IMAGES|N',
                        help='what to compare on: an image, a folder of images, or how many of '
                             "the config's test data (default: %(default)s)")
    checks.add_argument('--no-check', dest='check', action='store_const', const=None,
                        help='do not compare what was written with the model')
    parser.add_argument('--accuracy', action='store_true',
                        help="test checkpoint and file on the config's test data, too")
    add(parser, '--match-classes')


def run(args: Namespace) -> None:
    """Export, and say where to."""
    from ..export import export_model
    clean_up_on_sigterm()
    path = export_model(args.config, args.checkpoint, args.to, args.out_dir, args.size,
                        args.dynamic, args.raw, args.precision, args.calibration, args.check,
                        args.match_classes, args.accuracy)
    print(printable(f'wrote {path}'))


def _axes(text: str) -> tuple[str, ...]:
    axes = tuple(text.split(',')) if text != 'none' else ()
    if not {*axes} <= {'batch', 'size'}:
        raise ArgumentTypeError(f'{text} must be batch, size, batch,size or none')
    return axes


def _pictures(text: str) -> int | str:
    return positive(text) if text.isdecimal() else text
