"""Show what a model takes for what: the confusion matrix of a detector or a classifier.

A detector's has a row more, 'no object left', for detections that no object is left for, duplicates
among them, and a column more for objects that are missed. DIR gets confusion_matrix.png and
confusion_matrix.csv; the most frequent confusions are printed. The predictions come from
tools/test.py CONFIG CHECKPOINT --out FILE.pkl.
"""

import argparse
import csv
import io
import os
import sys
from pathlib import Path

# A checkout that is not installed; what is installed comes first.
sys.path.append(os.fspath(Path(__file__).resolve().parents[2]))

from spartan_mm.engine import launch  # noqa: E402
from spartan_mm.files import check_writable, write_whole  # noqa: E402

NUM_PRINTED = 10


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    launch.add_result_arguments(parser, 'work_dirs/confusion_matrix')
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    with launch.reporting():
        from spartan_mm.analysis.confusion import (
            MISSED,
            SURPLUS,
            count_confusions,
            count_detections,
            draw_confusion,
            rank_confusions,
        )
        from spartan_mm.analysis.results import DetectorResults, read_results
        check_writable(args.out_dir / 'confusion_matrix.png')
        results = read_results(launch.load_config(args.config, options=args.cfg_options),
                               args.predictions)
        detector = isinstance(results, DetectorResults)
        try:
            counts = (count_detections(results.dataset, results.predictions, args.score_thr,
                                       args.iou_thr)
                      if detector else count_confusions(results.outcomes))
        except ValueError as error:
            raise launch.UsageError(str(error)) from error

        figure = draw_confusion(counts, results.classes, surplus=detector)
        with write_whole(args.out_dir / 'confusion_matrix.png') as file:
            figure.savefig(file, format='png')
        rows = [*results.classes, SURPLUS] if detector else results.classes
        columns = [*results.classes, MISSED] if detector else results.classes
        table = io.StringIO(newline='')
        writer = csv.writer(table)
        writer.writerow(['true \\ predicted', *columns])
        writer.writerows([name, *row] for name, row in zip(rows, counts.tolist(), strict=True))
        with write_whole(args.out_dir / 'confusion_matrix.csv') as file:
            file.write(table.getvalue().encode())

    print(figure.axes[0].get_title(loc='left').replace('\n', ' '))
    for row, column, count in rank_confusions(counts)[:NUM_PRINTED]:
        print(f'{rows[row]} -> {columns[column]}: {count} of {counts[row].sum()}')
    print(f'see {args.out_dir}')


if __name__ == '__main__':
    main()
