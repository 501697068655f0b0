"""Show what a model takes for what: the confusion matrix of a detector or a classifier.

    spartan-mm test my_config.py epoch_72.pth --out predictions.pkl
    spartan-mm confusion my_config.py predictions.pkl

A detector's has a row more, 'no object left', for detections that no object is left for, duplicates
among them, and a column more for objects that are missed. DIR gets confusion_matrix.png and
confusion_matrix.csv; the most frequent confusions are printed.
"""
from argparse import ArgumentParser, Namespace

from ..files import write_whole
from ..text import printable
from .arguments import add_results, read_results

NUM_PRINTED = 10


def add_arguments(parser: ArgumentParser) -> None:
    """Add the flags."""
    add_results(parser, 'work_dirs/confusion_matrix')


def run(args: Namespace) -> None:
    """Draw the matrix, and print the most frequent confusions."""
    from ..analysis.mistakes.confusion import count_confusions, count_detections
    from ..analysis.style import write_figure
    results, detector = read_results(args, 'confusion_matrix.png')
    found = (count_detections(results, args.score_thr, args.iou_thr) if detector
             else count_confusions(results))
    write_figure(args.out_dir / 'confusion_matrix.png', found.draw())
    with write_whole(args.out_dir / 'confusion_matrix.csv') as file:
        file.write(found.as_csv().encode(errors='backslashreplace'))

    print(found.summarize().replace('\n', ' '))
    for row, column, count in found.rank()[:NUM_PRINTED]:
        print(printable(f'{found.rows[row]} -> {found.columns[column]}: {count} of '
                        f'{found.counts[row].sum()}'))
    print(printable(f'see {args.out_dir}'))
