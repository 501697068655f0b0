"""Check the datasets of a config before a long run.

    spartan-mm check-data my_config.py --decode

Files that are missing, boxes without area, ids that lead nowhere, classes that the model does not
have, images of another size than annotated ... The summary is printed; DIR gets report.json and
pictures: objects of each class, sizes of boxes, and the images to look at. The exit status is 1 if
there are errors, which a training would refuse, too, or stumble over.
"""
from argparse import ArgumentParser, BooleanOptionalAction, Namespace

from ..datasets.check import SPLITS, check_config
from ..errors import UsageError
from ..files import check_writable, write_json
from ..text import printable
from .arguments import add, add_config, positive


def add_arguments(parser: ArgumentParser) -> None:
    """Add the flags."""
    add_config(parser)
    parser.add_argument('--split', nargs='+', choices=SPLITS, default=SPLITS, metavar='SPLIT',
                        help='which datasets to check, of train, val and test (default: all)')
    parser.add_argument('--decode', action=BooleanOptionalAction, default=False,
                        help='decode every image, as the loader of the config does; takes minutes '
                             'for 100,000 images')
    parser.add_argument('--workers', type=positive, metavar='N',
                        help='number of processes that decode (default: one for each CPU)')
    add(parser, '--out-dir', '--out', default='dataset_report')


def run(args: Namespace) -> int:
    """Check, and say what was found."""
    from rich.progress import Progress

    from ..analysis.report.dataset_pictures import describe, write_pictures
    from ..engine.launch import load_config
    config = load_config(args.config, options=args.cfg_options)
    check_writable(args.out_dir / 'report.json')
    with Progress() as bar:
        reports = check_config(
            config, args.split, args.decode, args.workers,
            lambda items, description, total: bar.track(items, total, description=description))
    if not reports:
        raise UsageError(f'{args.config} has no dataloader for {", ".join(args.split)}')

    for report in reports:
        print(describe(report))
    levels = [finding.level for report in reports for finding in report.findings]
    errors, warnings = levels.count('error'), levels.count('warning')
    record = dict(config=args.config, decoded=args.decode, errors=errors, warnings=warnings,
                  datasets=[report.as_record() for report in reports])
    write_json(args.out_dir / 'report.json', record)
    write_pictures(reports, args.out_dir)
    print(printable(f'{errors} errors, {warnings} warnings; see {args.out_dir}'))
    return int(errors > 0)
