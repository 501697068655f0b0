"""Detect objects in an image, a folder of images or a video, or classify them.

A detector writes pictures (or a video) with boxes, and results.json with boxes, classes and scores;
a classifier writes pictures with a bar for each of the likeliest classes, and results.json with
these and their scores. The config says which of the two it is.
"""

import argparse
import os
import sys

# A checkout that is not installed; what is installed comes first.
sys.path.append(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from spartan_mm.engine.checkpoint import CheckpointError  # noqa: E402
from spartan_mm.engine.launch import read_share  # noqa: E402
from spartan_mm.inference import InputError, find_source, infer, load_model  # noqa: E402


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('input',
                        help='an image, a video, or a folder; it is searched with its subfolders')
    parser.add_argument('config', help='config file, or the name of a model; or a checkpoint that '
                                       'holds its config, as published ones do')
    parser.add_argument('checkpoint', nargs='?',
                        help='checkpoint file or URL, if it is not in the place of the config')
    parser.add_argument('--out-dir', default='outputs', metavar='DIR',
                        help='where to write (default: %(default)s)')
    parser.add_argument('--device',
                        help="such as 'cpu' or 'cuda:0' (default: a GPU if there is one)")
    parser.add_argument('--score-thr', type=read_share, default=0.3, metavar='SCORE',
                        help='least score of a detection that counts (default: %(default)s)')
    parser.add_argument('--top', type=int, default=5, metavar='N',
                        help='number of classes that a classifier names (default: %(default)s)')
    parser.add_argument('--batch-size', type=int, default=1, metavar='N',
                        help='images or frames in one pass (default: %(default)s)')
    args = parser.parse_args()
    for flag, value in (('--batch-size', args.batch_size), ('--top', args.top)):
        if value < 1:
            parser.error(f'{flag} {value}: must be at least 1')
    return args


def main() -> None:
    args = parse_args()
    try:
        source = find_source(args.input, args.out_dir)
        model = load_model(args.config, args.checkpoint, args.device)
        report = infer(model, source, args.out_dir, args.score_thr, args.batch_size, args.top)
    except (FileNotFoundError, InputError, CheckpointError) as error:
        sys.exit(f'error: {error}')

    pictures = f'{len(report.results)} pictures'
    if model.kind == 'detector':
        detections = sum(len(result['detections']) for result in report.results)
        print(f'{detections} detections in {pictures}; see {args.out_dir}')
    else:
        print(f'{pictures} classified; see {args.out_dir}')
    if report.failures:
        sys.exit('\n'.join(f'error: {failure}' for failure in report.failures.values()))


if __name__ == '__main__':
    main()
