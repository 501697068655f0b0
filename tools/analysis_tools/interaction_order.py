"""Measure how strongly the patches of images interact in classifiers, by the size of their context.

The paper's Figure 1, after Deng et al. (ICLR 2022); see spartan_mm/analysis/interaction_order.py.
DIR gets interaction_order.png, a curve for each model, and interaction_order.json, which grows with
each image: after an interruption, or with more models or images, the same command goes on there.

The defaults are the published settings, meant for a GPU: 881,600 masked images for each image (and
50 images). For a first look, --grid 8 --pairs 20 --contexts 10 --orders 0 0.25 0.5 0.75 1 takes
2,560. The cost is stated before anything is measured.
"""

import argparse
import os
import sys
from pathlib import Path

# A checkout that is not installed; what is installed comes first.
ROOT = Path(__file__).resolve().parents[2]
sys.path.append(os.fspath(ROOT))

import torch  # noqa: E402
from rich.progress import (  # noqa: E402
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from spartan_mm.analysis import interaction_order  # noqa: E402
from spartan_mm.analysis.interaction_order import (  # noqa: E402
    BASELINES,
    FRACTIONS,
    TARGETS,
    Results,
    Settings,
    Subject,
    choose_images,
    draw_strengths,
)
from spartan_mm.analysis.model_inputs import (  # noqa: E402
    ImageReader,
    add_model_arguments,
    digest_weights,
    has_weights,
    load_with_weights,
    split_checkpoint,
)
from spartan_mm.engine.launch import UsageError, reporting  # noqa: E402
from spartan_mm.files import check_writable, write_whole  # noqa: E402
from spartan_mm.inference import InputError, find_images  # noqa: E402
from spartan_mm.zoo import UnknownModelError  # noqa: E402


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_arguments(parser, 'work_dirs/interaction_order')
    parser.add_argument('--num-images', type=int, metavar='N',
                        help='number of images, drawn at random (default: all)')
    parser.add_argument('--grid', type=int, default=16, metavar='N',
                        help='patches along each side (default: %(default)s)')
    parser.add_argument('--pairs', type=int, default=200, metavar='N',
                        help='pairs of patches in an image (default: %(default)s)')
    parser.add_argument('--contexts', type=int, default=100, metavar='N',
                        help='contexts for each pair and order (default: %(default)s)')
    parser.add_argument('--orders', type=float, nargs='+', default=FRACTIONS, metavar='PART',
                        help='sizes of the contexts, in parts of the number of patches less 2 '
                             f'(default: {" ".join(f"{part:g}" for part in FRACTIONS)})')
    parser.add_argument('--distance', type=int, default=2, metavar='N',
                        help='largest distance in a pair, in patches along either side; 0 for any '
                             '(default: %(default)s)')
    parser.add_argument('--baseline', choices=BASELINES, default='zero',
                        help='what patches that are left out are filled with: zero after '
                             "normalisation, or the image's mean (default: %(default)s)")
    parser.add_argument('--target', choices=TARGETS, default='predicted',
                        help='the class whose log odds count; the true one is that of the '
                             'subfolder of IMAGES, in alphabetical order (default: %(default)s)')
    parser.add_argument('--batch-size', type=int, default=256, metavar='N',
                        help='masked images in one pass (default: %(default)s)')
    parser.add_argument('--random', action='store_true',
                        help='give models without a checkpoint random weights')
    parser.add_argument('--seed', type=int, default=0,
                        help='of images, pairs, contexts and random weights (default: %(default)s)')
    args = parser.parse_args()
    for flag, value in (('--batch-size', args.batch_size), ('--num-images', args.num_images)):
        if value is not None and value < 1:
            parser.error(f'{flag} {value}: must be at least 1')
    if args.names and len(args.names) != len(args.models):
        parser.error(f'--names: {len(args.names)} for {len(args.models)} models')
    return args


def load_subjects(args: argparse.Namespace) -> list[Subject]:
    """Load the models."""
    subjects = []
    for index, argument in enumerate(args.models):
        name, checkpoint = split_checkpoint(argument)
        torch.manual_seed(args.seed)
        named = load_with_weights(name, checkpoint, args.random, args.device)
        if named.task != 'classification':
            raise UsageError(f'{name} is no classifier; interactions are measured on the log odds '
                             'of a class')
        shown = args.names[index] if args.names else named.name
        if not has_weights(name, checkpoint):
            shown += ' (random weights)'
        if shown in [subject.name for subject in subjects]:
            raise UsageError(f'two models are called {shown}: give each a name with --names')
        subjects.append(Subject(shown, named.model, ImageReader(named),
                                digest_weights(named.model)))
    return subjects


def main() -> None:
    args = parse_args()
    with reporting(ImportError, InputError, UnknownModelError):
        run(args)


def run(args: argparse.Namespace) -> None:
    settings = Settings(args.grid, args.pairs, args.contexts, tuple(args.orders),
                        args.distance or None, args.baseline, args.target, args.seed)
    out = args.out_dir
    source = find_images(args.images, out)
    check_writable(out / 'interaction_order.png')
    images = choose_images(source.images, args.num_images, args.seed)
    results = Results(out / 'interaction_order.json', settings)
    subjects = load_subjects(args)

    passes = -(-settings.cost // args.batch_size)
    total = settings.cost * len(images) * len(subjects)
    print(f'cost: {settings.cost:,} masked images for each image and model, in '
          f'{passes:,} pass{"" if passes == 1 else "es"} of up to {args.batch_size}; {total:,} '
          f'for images × models = {len(images)} × {len(subjects)}')
    with Progress(TextColumn('measuring'), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
                  TimeRemainingColumn()) as bar:
        task = bar.add_task('', total=total)
        curves = interaction_order.measure(
            subjects, images, source.root, settings, results, args.batch_size,
            lambda count: bar.advance(task, count))

    with write_whole(out / 'interaction_order.png') as file:
        draw_strengths(curves, settings, len(images)).savefig(file, format='png')
    for subject in subjects:
        records = results.of_model(subject)['images'].values()
        seconds = sum(record['seconds'] for record in records) / len(records)
        print(f'{subject.name}: {seconds:.1f} s for each image')
    print(f'see {out / "interaction_order.png"} and {results.path}')


if __name__ == '__main__':
    main()
