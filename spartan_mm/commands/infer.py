"""Detect objects in images, videos, cameras and streams, or classify them.

    spartan-mm infer photos/ rtdetr_spartan_t.pth --out-dir outputs

A detector writes pictures (or a video) with boxes, and results.json with boxes, classes and scores;
a classifier writes pictures with a bar for each of the likeliest classes, and results.json with
these and their scores. The config says which of the two it is.
"""
from argparse import ArgumentParser, Namespace
from pathlib import Path

from ..engine.launch import choose_device
from ..errors import UsageError
from ..files import check_writable, clean_up_on_sigterm
from ..inference import find_source, infer, load_model
from ..results import FILES
from ..runtime import SUFFIXES, Runtime
from ..text import printable
from .arguments import add, positive, report_failures


def add_arguments(parser: ArgumentParser) -> None:
    """Add the flags."""
    parser.add_argument('input', metavar='INPUT',
                        help="an image; a folder, which is searched with its subfolders; a pattern "
                             "('photos/*.jpg'); a video; the number of a camera (0); the URL of a "
                             'stream (rtsp://...)')
    parser.add_argument('config', metavar='CONFIG',
                        help='config file, or the name of a model; or a checkpoint that holds its '
                             'config, as published ones do; or an exported .onnx, .xml or .tflite')
    parser.add_argument('checkpoint', nargs='?', metavar='CHECKPOINT',
                        help='checkpoint file or URL, if it is not in the place of the config')
    add(parser, '--out-dir', default='outputs')
    add(parser, '--device')
    add(parser, '--match-classes')
    add(parser, '--score-thr')
    parser.add_argument('--top', type=positive, default=5, metavar='N',
                        help='number of classes that a classifier names (default: %(default)s)')
    add(parser, '--batch-size', default=1,
        help='images, frames or tiles in one pass (default: %(default)s)')
    parser.add_argument('--track', action='store_true',
                        help='number the objects of a video, the same from frame to frame')
    parser.add_argument('--tile', type=positive, metavar='SIDE',
                        help='look for small objects in tiles of so many pixels, and in the whole')
    parser.add_argument('--results', nargs='+', choices=FILES, default=['json'], metavar='FORMAT',
                        help='of results, one or several: json, jsonl, csv, yolo, coco (default: '
                             'json); jsonl and csv grow while the command runs')
    parser.add_argument('--ann-file', type=Path, metavar='FILE',
                        help="COCO's annotation file, whose ids of images and categories `--results"
                             ' coco` takes')
    parser.add_argument('--no-pictures', action='store_true', help='write results alone')


def run(args: Namespace) -> int:
    """Infer, and say what was found."""
    clean_up_on_sigterm()
    source = find_source(args.input, args.out_dir)
    for each in args.results:
        check_writable(args.out_dir / FILES[each], args.config)
    if Path(args.config).suffix in SUFFIXES:
        if args.checkpoint or args.match_classes or args.device:
            raise UsageError(f'{args.config} is an exported file: it takes no checkpoint, --device '
                             'or --match-classes')
        model = Runtime(args.config)
    else:
        model = load_model(args.config, args.checkpoint, choose_device(args.device),
                           args.match_classes)
    report = infer(model, source, args.out_dir, args.score_thr, args.batch_size, args.top,
                   formats=args.results, ann_file=args.ann_file, pictures=not args.no_pictures,
                   track=args.track, tile=args.tile)
    print(printable(f'{report}; see {args.out_dir}'))
    return report_failures(report.failures.values())
