"""Detect objects in an image, a folder of images or a video, or classify them.

    spartan-mm infer photos/ rtdetr_spartan_t.pth --out-dir outputs

A detector writes pictures (or a video) with boxes, and results.json with boxes, classes and scores;
a classifier writes pictures with a bar for each of the likeliest classes, and results.json with
these and their scores. The config says which of the two it is.
"""
from argparse import ArgumentParser, Namespace

from ..engine.launch import choose_device
from ..files import check_writable
from ..inference import find_source, infer, load_model
from ..text import printable
from .arguments import add, positive, report_failures


def add_arguments(parser: ArgumentParser) -> None:
    """Add the flags."""
    parser.add_argument('input', metavar='INPUT',
                        help='an image, a video, or a folder; it is searched with its subfolders')
    parser.add_argument('config', metavar='CONFIG',
                        help='config file, or the name of a model; or a checkpoint that holds its '
                             'config, as published ones do')
    parser.add_argument('checkpoint', nargs='?', metavar='CHECKPOINT',
                        help='checkpoint file or URL, if it is not in the place of the config')
    add(parser, '--out-dir', default='outputs')
    add(parser, '--device')
    add(parser, '--match-classes')
    add(parser, '--score-thr')
    parser.add_argument('--top', type=positive, default=5, metavar='N',
                        help='number of classes that a classifier names (default: %(default)s)')
    add(parser, '--batch-size', default=1,
        help='images or frames in one pass (default: %(default)s)')


def run(args: Namespace) -> int:
    """Infer, and say what was found."""
    source = find_source(args.input, args.out_dir)
    check_writable(args.out_dir / 'results.json', args.config)
    model = load_model(args.config, args.checkpoint, choose_device(args.device),
                       args.match_classes)
    report = infer(model, source, args.out_dir, args.score_thr, args.batch_size, args.top)

    pictures = f'{len(report.results)} pictures'
    if model.kind == 'detector':
        detections = sum(len(result['detections']) for result in report.results)
        print(printable(f'{detections} detections in {pictures}; see {args.out_dir}'))
    else:
        print(printable(f'{pictures} classified; see {args.out_dir}'))
    return report_failures(report.failures.values())
