"""Draw the worst errors of a detector or a classifier.

    spartan-mm test my_config.py epoch_72.pth --out predictions.pkl
    spartan-mm errors my_config.py predictions.pkl

A detector's are missed objects and false alarms: on background, of the wrong class, badly
localised, duplicates; DIR gets errors.png with the worst of each kind, and errors.json with all.
Of a classifier, DIR gets mistakes.png and mistakes.json, the most confident first. Whole pictures
ranked by their AP are what mmdet's own analyze_results.py draws.
"""
from argparse import ArgumentParser, Namespace

from ..files import write_json, write_whole
from ..text import printable
from .arguments import add_results, positive, read_results


def add_arguments(parser: ArgumentParser) -> None:
    """Add the flags."""
    add_results(parser, 'work_dirs/worst_errors')
    parser.add_argument('--images', '--number', type=positive, metavar='N',
                        help='how many to draw: of each kind of a detector (default: 8), of all of '
                             'a classifier (default: 48)')


def run(args: Namespace) -> None:
    """Draw the errors, and list them."""
    from ..analysis.mistakes.errors import count_kinds, find_errors, find_mistakes, record_mistake
    from ..analysis.mistakes.pictures import draw_errors, draw_mistakes
    results, detector = read_results(args, 'errors.png')
    if detector:
        errors = find_errors(results, args.score_thr, args.iou_thr)
        name, records = 'errors', [error.as_record(results) for error in errors]
        for kind, number in count_kinds(errors).items():
            print(f'{kind}: {number}')
        sheet = draw_errors(errors, results, args.images or 8)
    else:
        wrong = find_mistakes(results)
        name, records = 'mistakes', [record_mistake(results, index) for index in wrong]
        print(f'{len(wrong)} of {len(results.paths)} misclassified')
        sheet = draw_mistakes(results, args.images or 48)
    with write_whole(args.out_dir / f'{name}.png') as file:
        sheet.save(file, 'PNG')
    write_json(args.out_dir / f'{name}.json', records)
    print(printable(f'see {args.out_dir}'))
