"""Check the datasets of a config before a long run.

Files that are missing, boxes that are none, ids that lead nowhere, classes that the model does not
have, images of another size than annotated ... The summary is printed; DIR gets report.json and
pictures: objects of each class, sizes of boxes, and the images to look at. The exit status is 1 if
there are errors, which a training would refuse, too, or stumble over.
"""

import argparse
import json
import os
import sys
from pathlib import Path

# A checkout that is not installed; what is installed comes first.
sys.path.append(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from mmengine.config import DictAction  # noqa: E402
from rich.progress import Progress  # noqa: E402

from spartan_mm.datasets.check import SPLITS, Report, check_config  # noqa: E402
from spartan_mm.datasets.data_errors import DataError  # noqa: E402
from spartan_mm.engine import launch  # noqa: E402


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('config', help='config file')
    parser.add_argument('--split', nargs='+', choices=SPLITS, default=SPLITS, metavar='SPLIT',
                        help='which datasets to check, of train, val and test (default: all)')
    parser.add_argument('--decode', action=argparse.BooleanOptionalAction, default=False,
                        help='decode every image, as the loader of the config does; takes minutes '
                             'for 100,000 images')
    parser.add_argument('--workers', type=int, metavar='N',
                        help='number of processes that decode (default: one for each CPU)')
    parser.add_argument('--out', default='dataset_report', metavar='DIR',
                        help='where to write (default: %(default)s)')
    parser.add_argument('--cfg-options', nargs='+', action=DictAction, metavar='KEY=VALUE',
                        help='override settings of the config')
    args = parser.parse_args()
    if args.workers is not None and args.workers < 1:
        parser.error(f'--workers {args.workers}: must be at least 1')
    return args


def main() -> None:
    args = parse_args()
    try:
        cfg = launch.load_config(args.config, options=args.cfg_options)
        with Progress() as bar:
            reports = check_config(
                cfg, args.split, args.decode, args.workers,
                lambda items, description, total: bar.track(items, total, description=description))
    except (FileNotFoundError, DataError, launch.UsageError) as error:
        sys.exit(f'error: {error}')
    if not reports:
        sys.exit(f'error: {args.config} has no dataloader for {", ".join(args.split)}')

    for report in reports:
        print_report(report)
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    levels = [finding.level for report in reports for finding in report.findings]
    record = dict(config=args.config, decoded=args.decode, errors=levels.count('error'),
                  warnings=levels.count('warning'),
                  datasets=[report.as_record() for report in reports])
    (out / 'report.json').write_text(
        json.dumps(record, ensure_ascii=False, indent=1), encoding='utf-8',
        errors='backslashreplace')
    draw(reports, out)
    print(f'{record["errors"]} errors, {record["warnings"]} warnings; see {out}')
    sys.exit(record['errors'] > 0)


def print_report(report: Report) -> None:
    """Print what a dataset holds and what was found."""
    content = report.content
    print(f'{report.split}: {report.name}')
    if content.infos:
        print(f'  {len(content.infos)} images, {content.count_objects().sum()} '
              f'{"labels" if content.boxes is None else "objects"} of {len(content.classes)} '
              'classes')
    for finding in report.findings:
        print(f'  {finding.level}: {finding.message}')


def draw(reports: list[Report], out: Path) -> None:
    """Draw what there is to draw."""
    from spartan_mm.analysis.data_sheets import draw_box_sizes, draw_class_counts, draw_suspects
    contents = {report.split: report.content for report in reports if report.content.infos}
    if any(content.classes for content in contents.values()):
        draw_class_counts(contents).savefig(out / 'classes.png')
    if any(content.boxes is not None and len(content.boxes) for content in contents.values()):
        draw_box_sizes(contents).savefig(out / 'box_sizes.png')
    for number, report in enumerate(reports):
        suspects = report.suspects()
        if suspects:
            draw_suspects(report.content, suspects).save(
                out / f'suspects_{report.split}_{number}.png')


if __name__ == '__main__':
    main()
