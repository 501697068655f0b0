"""Draw the worst errors of a detector or a classifier.

    spartan-mm test my_config.py epoch_72.pth --out predictions.pkl
    spartan-mm errors my_config.py predictions.pkl

A detector's are missed objects and false alarms: on background, of the wrong class, badly
localised, duplicates; DIR gets errors.png with the worst of each kind, and errors.json with all.
Of a classifier, DIR gets mistakes.png and mistakes.json, the most confident first. Whole pictures
ranked by their AP are what mmdet's own analyze_results.py draws.
"""
from argparse import ArgumentParser, Namespace

from ..files import check_writable, write_json, write_whole
from .arguments import add_results, positive


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
    from ..analysis.mistakes.predictions import DetectorResults, read_results
    from ..engine.launch import load_config
    check_writable(args.out_dir / 'errors.png')
    config = load_config(args.config, options=args.cfg_options)
    results = read_results(config, args.predictions)
    if isinstance(results, DetectorResults):
        errors = find_errors(results.dataset, results.predictions, args.score_thr, args.iou_thr)
        name, records = 'errors', [error.as_record(results.dataset) for error in errors]
        for kind, number in count_kinds(errors).items():
            print(f'{kind}: {number}')
        sheet = draw_errors(errors, results.dataset, args.images or 8)
    else:
        outcomes, classes = results.outcomes, results.classes
        wrong = find_mistakes(outcomes)
        name, records = 'mistakes', [record_mistake(outcomes, index, classes) for index in wrong]
        print(f'{len(wrong)} of {len(outcomes)} misclassified')
        sheet = draw_mistakes(outcomes, classes, args.images or 48)
    with write_whole(args.out_dir / f'{name}.png') as file:
        sheet.save(file, 'PNG')
    write_json(args.out_dir / f'{name}.json', records)
    print(f'see {args.out_dir}')
