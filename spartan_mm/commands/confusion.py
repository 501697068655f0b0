"""Show what a model takes for what: the confusion matrix of a detector or a classifier.

    spartan-mm test my_config.py epoch_72.pth --out predictions.pkl
    spartan-mm confusion my_config.py predictions.pkl

A detector's has a row more, 'no object left', for detections that no object is left for, duplicates
among them, and a column more for objects that are missed. DIR gets confusion_matrix.png and
confusion_matrix.csv; the most frequent confusions are printed.
"""
from argparse import ArgumentParser, Namespace

from ..files import check_writable, write_whole
from .arguments import add_results

NUM_PRINTED = 10


def add_arguments(parser: ArgumentParser) -> None:
    """Add the flags."""
    add_results(parser, 'work_dirs/confusion_matrix')


def run(args: Namespace) -> None:
    """Draw the matrix, and print the most frequent confusions."""
    from ..analysis.mistakes import confusion
    from ..analysis.mistakes.predictions import DetectorResults, read_results
    from ..analysis.style import write_figure
    from ..engine.launch import load_config
    check_writable(args.out_dir / 'confusion_matrix.png')
    config = load_config(args.config, options=args.cfg_options)
    results = read_results(config, args.predictions)
    detector = isinstance(results, DetectorResults)
    counts = (confusion.count_detections(results.dataset, results.predictions, args.score_thr,
                                         args.iou_thr)
              if detector else confusion.count_confusions(results.outcomes))
    write_figure(args.out_dir / 'confusion_matrix.png',
                 confusion.draw_confusion(counts, results.classes, detector))
    with write_whole(args.out_dir / 'confusion_matrix.csv') as file:
        file.write(confusion.as_csv(counts, results.classes, detector).encode())

    print(confusion.summarize_counts(counts, detector).replace('\n', ' '))
    rows, columns = confusion.name_cells(counts, results.classes, detector)
    for row, column, count in confusion.rank_confusions(counts)[:NUM_PRINTED]:
        print(f'{rows[row]} -> {columns[column]}: {count} of {counts[row].sum()}')
    print(f'see {args.out_dir}')
