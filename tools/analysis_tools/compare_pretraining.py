"""Does a classifier's backbone help a detector? Train it both ways, for the same iterations.

Trains the detector of digits from random weights and from the backbone of a classifier, with the
same seeds, data and schedule, and prints the AP of both after each epoch. `make
demo-classification` trains a classifier; it shares no digit with what the detector is validated on.
"""

import argparse
import json
import os
import sys
from pathlib import Path

from spartan_mm import demo as steps
from spartan_mm.analysis.report.curves import RunLog, draw_curves, read_log
from spartan_mm.datasets import make_digits

ROOT = Path(__file__).resolve().parents[2]
CONFIG = ROOT / 'configs' / 'detection' / 'rtdetr_spartan_xt_digits.py'
METRICS = {'coco/bbox_mAP': 'AP', 'coco/bbox_mAP_50': 'AP50'}
SCRATCH, PRETRAINED = 'from random weights', "from the classifier's backbone"


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    home = steps.find_home(ROOT)
    parser.add_argument('checkpoint', type=Path, help='the classifier')
    parser.add_argument('--epochs', type=int, default=1, metavar='N',
                        help='of 250 iterations each (default: %(default)s)')
    parser.add_argument('--seeds', type=int, nargs='+', default=[0], metavar='N',
                        help='a pair of trainings for each (default: 0)')
    parser.add_argument('--work-dir', type=Path, metavar='DIR',
                        default=home / 'work_dirs' / 'compare_pretraining')
    parser.add_argument('--data-root', type=Path, metavar='DIR', default=home / 'data' / 'digits',
                        help='the data of the detector, made if it is not there')
    parser.add_argument('--cfg-options', nargs='+', default=[], metavar='KEY=VALUE',
                        help='override settings of the config, for both')
    parser.add_argument('--num-train', type=int, default=2000, help='number of training pictures')
    parser.add_argument('--num-val', type=int, default=200, help='number of validation pictures')
    args = parser.parse_args()
    for name in ('checkpoint', 'work_dir', 'data_root'):
        setattr(args, name, getattr(args, name).resolve())
    if not args.checkpoint.is_file():
        parser.error(f'checkpoint {args.checkpoint} does not exist')
    return args


def train(commands: steps.Commands, args: argparse.Namespace, start: str, seed: int) -> RunLog:
    """Train the detector; return its log."""
    name = 'pretrained' if start == PRETRAINED else 'scratch'
    work_dir = args.work_dir / f'{name}_seed{seed}'
    root = commands.shown(args.data_root)
    annotations = Path(root, 'annotations', 'val.json')
    options = [f'train_cfg.max_epochs={args.epochs}',
               *(f'{split}_dataloader.dataset.data_root={root}' for split in ('train', 'val')),
               f'val_evaluator.ann_file={annotations}']
    if start == PRETRAINED:
        options += ['model.backbone.init_cfg.type=CheckedPretrained',
                    'model.backbone.init_cfg.prefix=backbone.',
                    f'model.backbone.init_cfg.checkpoint={commands.shown(args.checkpoint)}']
    commands.logs = work_dir / 'logs'
    commands.train(CONFIG, work_dir, ['--seed', str(seed), '--cfg-options', *options,
                                      *args.cfg_options], METRICS)
    return read_log(work_dir)


def main() -> int:
    args = parse_args()
    commands = steps.Commands(ROOT, args.work_dir)
    os.chdir(commands.home)
    make_digits(args.data_root, args.num_train, args.num_val)
    logs, results = {}, []
    try:
        for seed in args.seeds:
            for start in (SCRATCH, PRETRAINED):
                commands.console.line(f'\n--- {start}, seed {seed} ---')
                log = train(commands, args, start, seed)
                logs[f'{start}, seed {seed}'] = log
                results += [
                    dict(start=start, seed=seed, epoch=evaluation['step'],
                         **{name: evaluation[key] for key, name in METRICS.items()})
                    for evaluation in log.evaluations]
    except steps.StepError as error:
        print(f'error: {error}', file=sys.stderr)
        return steps.FAILED
    except KeyboardInterrupt:
        print('interrupted', file=sys.stderr)
        return steps.INTERRUPTED

    iterations = logs[f'{SCRATCH}, seed {args.seeds[0]}'].train[-1]['step']
    print(f'\n{iterations} iterations each\n\n| start | seed | epoch | AP | AP50 |')
    print('|---|---|---|---|---|')
    for result in results:
        print('| {start} | {seed} | {epoch} | {AP:.3f} | {AP50:.3f} |'.format(**result))
    content = dict(iterations=iterations, checkpoint=str(args.checkpoint), results=results)
    (args.work_dir / 'results.json').write_text(json.dumps(content, indent=1))
    draw_curves(logs).savefig(args.work_dir / 'curves.png')
    print(f'\nEverything lies in {args.work_dir}')
    return 0


if __name__ == '__main__':
    sys.exit(main())
