"""Kill trainings at random moments, go on with them, and say how many end bit-equal: all should.

Small trainings of both tasks are killed in turn: at random times by SIGKILL or SIGTERM, in the
middle of writing a checkpoint, and after the disk was full. Each is resumed until it has ended, and
compared with one that ran through: weights, averaged weights, optimizer, schedules, random states.
"""

import argparse
import shutil
import sys
import tempfile
from pathlib import Path

# A checkout that is not installed; what is installed comes first.
ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT))

from rich.progress import MofNCompleteColumn, Progress, TimeElapsedColumn  # noqa: E402

import spartan_mm.classification  # noqa: E402, F401 - for the forks, which find it imported
import spartan_mm.detection  # noqa: E402, F401
from spartan_mm.analysis.soak import Soak, Trial  # noqa: E402


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--kills', type=int, default=30, help='how many (default: %(default)s)')
    parser.add_argument('--seed', type=int, default=0,
                        help='seed of what is killed when (default: %(default)s)')
    parser.add_argument('--work-dir', type=Path, metavar='DIR',
                        help='empty folder for everything (default: a temporary one, kept if a '
                             'training does not end as it should)')
    args = parser.parse_args()
    if args.kills < 1:
        parser.error('--kills must be at least 1')
    if args.work_dir and args.work_dir.exists() and any(args.work_dir.iterdir()):
        parser.error(f'--work-dir {args.work_dir} is not empty')
    return args


def main() -> None:
    args = parse_args()
    root = args.work_dir or Path(tempfile.mkdtemp(prefix='soak_'))
    soak = Soak(ROOT / 'tools' / 'train.py', root.resolve(), args.seed)
    tasks, trials, kills = list(soak.configs), [], 0
    columns = *Progress.get_default_columns(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, disable=not sys.stderr.isatty()) as progress:
        bar = progress.add_task('kills', total=args.kills)
        try:
            for task in tasks:
                soak.run_whole(task)
        except RuntimeError as error:
            sys.exit(f'error: {error}')
        while kills < args.kills:
            number = len(trials)
            trial = soak.run_trial(tasks[number % 2], number + 1,
                                   min(args.kills - kills, number % 3 + 1))
            trials.append(trial)
            kills += len(trial.kills)
            progress.update(bar, completed=kills)
            progress.console.print(describe(trial), highlight=False, markup=False, soft_wrap=True)

    equal = [trial for trial in trials if trial.differences == []]
    print(f'{len(equal)} of {len(trials)} trainings, killed {kills} times, ended bit-equal')
    if len(equal) < len(trials):
        sys.exit(f'error: {len(trials) - len(equal)} did not; their logs are in {root}')
    if args.work_dir is None:
        shutil.rmtree(root)


def describe(trial: Trial) -> str:
    if trial.differences is None:
        end = f'failed, see {trial.log}'
    elif trial.differences:
        end = f'{len(trial.differences)} differences, such as {trial.differences[0]}'
    else:
        end = 'bit-equal'
    return f'{trial.task}: {"; ".join(trial.kills) or "ended before it was killed"}: {end}'


if __name__ == '__main__':
    main()
