"""Measure how strongly the patches of images interact in classifiers, by the size of their context.

    spartan-mm interactions images/ spartan_t=t.pth mmpretrain:resnet18_8xb32_in1k=r18.pth

The paper's Figure 1, after Deng et al. (ICLR 2022); see
spartan_mm/analysis/look_inside/interaction_order.py. DIR gets interaction_order.png, a curve for
each model, and interaction_order.json, which grows with each image: after an interruption, or with
more models or images, the same command goes on there.

The defaults are the published settings, meant for a GPU: 881,600 masked images for each image (and
50 images). For a first look, --grid 8 --pairs 20 --contexts 10 --orders 0 0.25 0.5 0.75 1 takes
2,560. The cost is stated before anything is measured.
"""
from argparse import ArgumentParser, Namespace
from functools import partial

from rich.progress import MofNCompleteColumn, Progress, TimeElapsedColumn

from ..analysis.look_inside import interaction_order as interactions
from ..analysis.style import write_figure
from ..errors import UsageError
from ..text import printable
from .arguments import add, add_looked_at, add_sample, take_sample


def add_arguments(parser: ArgumentParser) -> None:
    """Add the flags."""
    add_looked_at(parser, 'work_dirs/interaction_order')
    add_sample(parser, None)
    for flag, default, help in (
            ('--grid', 16, 'patches along each side'),
            ('--pairs', 200, 'pairs of patches in an image'),
            ('--contexts', 100, 'contexts for each pair and order'),
            ('--distance', 2, 'patches between a pair along either side, at most; 0 for any')):
        parser.add_argument(flag, type=int, default=default, metavar='N',
                            help=f'{help} (default: %(default)s)')
    parts = ' '.join(f'{part:g}' for part in interactions.FRACTIONS)
    parser.add_argument('--orders', type=float, nargs='+', default=interactions.FRACTIONS,
                        metavar='PART', help='sizes of the contexts, in parts of the number of '
                                             f'patches less 2 (default: {parts})')
    parser.add_argument('--baseline', choices=interactions.BASELINES, default='zero',
                        help='what patches that are left out are filled with: zero after '
                             "normalization, or the image's mean (default: %(default)s)")
    parser.add_argument('--target', choices=interactions.TARGETS, default='predicted',
                        help='the class whose log odds count; the true one is that of the '
                             'subfolder of INPUT, in alphabetical order (default: %(default)s)')
    add(parser, '--batch-size', default=256,
        help='masked images in one pass (default: %(default)s)')


def run(args: Namespace) -> None:
    """Measure, draw and print how long it took."""
    settings = interactions.Settings(
        args.grid, args.pairs, args.contexts, tuple(args.orders), args.distance or None,
        args.baseline, args.target, args.seed)
    target, source, models = take_sample(args, 'interaction_order.png')
    results = interactions.Results(target.with_suffix('.json'), settings)
    for given in models:
        if given.named.task != 'classification':
            raise UsageError(f'{given.origin["model"]} is no classifier; interactions are measured '
                             'on the log odds of a class')

    images, cost = source.images, settings.cost
    passes, total = -(-cost // args.batch_size), cost * len(images) * len(models)
    print(f'cost: {cost:,} masked images for each image and model, in '
          f'{passes:,} pass{"" if passes == 1 else "es"} of up to {args.batch_size}; {total:,} '
          f'for images × models = {len(images)} × {len(models)}')
    columns = *Progress.get_default_columns(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns) as bar:
        task = bar.add_task('measuring', total=total)
        curves = interactions.measure(models, images, source.root, results, args.batch_size,
                                      partial(bar.advance, task))

    write_figure(target, interactions.draw_strengths(curves, settings, len(images)))
    for given in models:
        records = results.of_model(given)['images'].values()
        seconds = sum(record['seconds'] for record in records) / len(records)
        print(printable(f'{given.title}: {seconds:.1f} s for each image'))
    print(printable(f'see {target} and {results.path}'))
