"""Draw the worst errors of a detector or a classifier.

A detector's are missed objects and false alarms: on background, of the wrong class, badly
localised, duplicates; DIR gets errors.png with the worst of each kind, and errors.json with all.
Of a classifier, DIR gets mistakes.png and mistakes.json, the most confident first. The predictions
come from tools/test.py CONFIG CHECKPOINT --out FILE.pkl. Whole pictures ranked by their AP are what
mmdet's own analyze_results.py draws.
"""

import argparse
import json
import os
import sys
from pathlib import Path

# A checkout that is not installed; what is installed comes first.
sys.path.append(os.fspath(Path(__file__).resolve().parents[2]))

from spartan_mm.engine import launch  # noqa: E402
from spartan_mm.files import UnwritableError, check_writable, write_whole  # noqa: E402


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    launch.add_result_arguments(parser, 'work_dirs/worst_errors')
    parser.add_argument('--number', type=int, metavar='N',
                        help='how many to draw: of each kind of a detector (default: 8), of all of '
                             'a classifier (default: 48)')
    args = parser.parse_args()
    if args.number is not None and args.number < 1:
        parser.error(f'--number {args.number}: must be at least 1')
    return args


def main() -> None:
    args = parse_args()
    with launch.reporting():
        from spartan_mm.analysis.results import DetectorResults, read_results
        check_writable(args.out_dir / 'errors.png')
        results = read_results(launch.load_config(args.config, options=args.cfg_options),
                               args.predictions)
        try:
            if isinstance(results, DetectorResults):
                name, records = show_errors(results, args)
            else:
                name, records = show_mistakes(results, args)
        except UnwritableError:
            raise
        except (OSError, ValueError) as error:
            raise launch.UsageError(str(error)) from error
        with write_whole(args.out_dir / f'{name}.json') as file:
            file.write(json.dumps(records, ensure_ascii=False, indent=1).encode(
                'utf-8', 'backslashreplace'))
    print(f'see {args.out_dir}')


def show_errors(results, args: argparse.Namespace) -> tuple[str, list[dict]]:
    """Draw what a detector got wrong; return the name of the picture, and a record of each."""
    from spartan_mm.analysis.errors import count_kinds, draw_errors, find_errors
    errors = find_errors(results.dataset, results.predictions, args.score_thr, args.iou_thr)
    for kind, count in count_kinds(errors).items():
        print(f'{kind}: {count}')
    sheet = draw_errors(errors, results.dataset, args.number or 8)
    with write_whole(args.out_dir / 'errors.png') as file:
        sheet.save(file, 'PNG')
    return 'errors', [error.as_record(results.dataset) for error in errors]


def show_mistakes(results, args: argparse.Namespace) -> tuple[str, list[dict]]:
    """Draw what a classifier got wrong; return the name of the picture, and a record of each."""
    from spartan_mm.analysis.mistakes import draw_mistakes, find_mistakes
    outcomes, classes = results.outcomes, results.classes
    wrong = find_mistakes(outcomes)
    print(f'{len(wrong)} of {len(outcomes)} misclassified')
    figure = draw_mistakes(outcomes, classes, args.number or 48)
    with write_whole(args.out_dir / 'mistakes.png') as file:
        figure.savefig(file, format='png')
    return 'mistakes', [
        dict(file=outcomes.paths[i], true_class=classes[outcomes.truths[i]],
             predicted_class=classes[outcomes.predicted[i]],
             score=round(float(outcomes.scores[i].max()), 4)) for i in wrong]


if __name__ == '__main__':
    main()
