"""Measure time and memory of a model, alone or beside another one or another form of it.

    spartan-mm benchmark rtdetr_spartan_t --deploy --compile        latency of a detector
    spartan-mm benchmark t --train --batch-size 16 --against authors      beside its authors' code
    spartan-mm benchmark t --train --batch-size 256 --count       kernels and their bytes, untimed
    spartan-mm benchmark rtdetr_spartan_t --data                  its training pipeline

Forms that are measured beside each other take turns, so that ratios do not depend on what else is
running.
"""
from argparse import ArgumentParser, Namespace
from dataclasses import asdict

from ..analysis import benchmark
from ..analysis.benchmark import Form, Group, Workload
from ..analysis.input_speed import input_table, measure_input
from ..analysis.kernels import kernels_table
from ..files import check_writable, write_json
from ..text import Console
from .arguments import add, add_any_model, add_work

AUTHORS = 'authors'
MODES = ('default', 'reduce-overhead', 'max-autotune', 'max-autotune-no-cudagraphs')


def add_arguments(parser: ArgumentParser) -> None:
    """Add the flags."""
    add_any_model(parser)
    add(parser, '--json')

    form = parser.add_argument_group('form')
    against = parser.add_argument_group('beside it')
    against.add_argument('--against', metavar='CONFIG',
                         help=f"another model, or the same one; '{AUTHORS}' for this one with its "
                              "SpaRTAN computed as the authors' code does it")
    for group, prefix, what in ((form, '', 'the model'), (against, 'against-', 'the other one')):
        group.add_argument(f'--{prefix}deploy', action='store_true',
                           help=f'switch {what} to the inference form')
        group.add_argument(f'--{prefix}compile', nargs='?', const='default', choices=MODES,
                           metavar='MODE',
                           help=f"compile {what}, in a mode of torch.compile: {', '.join(MODES)}")
        group.add_argument(f'--{prefix}channels-last', action='store_true',
                           help=f'lay {what} out with the channels last')
        group.add_argument(f'--{prefix}fused', action='store_true',
                           help=f'give the SpaRTAN of {what} blocks that train faster on a CPU')

    work = parser.add_argument_group('work')
    work.add_argument('--train', action='store_true',
                      help='forward and backward pass instead of inference')
    work.add_argument('--parts', action='store_true',
                      help='share out the time of a training step to its parts, too')
    work.add_argument('--count', action='store_true',
                      help='count the kernels of a step and what they read and write, whatever the '
                           'device, and time nothing')
    work.add_argument('--multi-scale', action='store_true',
                      help="the sizes of the config's multi-scale training in turn")
    add_work(work)
    add(work, '--batch-size', '--batch',
        help='images in a step (default: 1; in training as in the config)')
    add(work, '--size', help="of the images (default: as in the config's test pipeline)")
    add(work, '--rounds', '--repeats')

    data = parser.add_argument_group('training pipeline')
    data.add_argument('--data', action='store_true',
                      help='measure it, on the data of the config, or on made-up pictures if that '
                           'is not there')
    data.add_argument('--workers', type=int, default=2, metavar='N',
                      help='of the data loader (default: %(default)s)')


def run(args: Namespace) -> None:
    """Measure or count, and print the table."""
    if not args.against and (args.against_deploy or args.against_compile
                             or args.against_channels_last or args.against_fused):
        args.parser.error('--against-deploy, --against-compile, --against-channels-last and '
                          '--against-fused say how --against CONFIG runs')
    if args.json:
        check_writable(args.json, args.config, *filter(None, [args.against]))
    console = Console()
    with benchmark.measuring(args.threads):
        if args.data:
            console.status(f'{args.config}: its pipeline')
            result = measure_input(args.config, args.workers)
            console.line(input_table([result]))
        elif args.count:
            counts = benchmark.count_group(make_group(args))
            console.line(kernels_table(counts))
            result = {label: asdict(found) for label, found in counts.items()}
        else:
            result = benchmark.run_group(make_group(args), console.status)
            console.line(f"{benchmark.machine_line(result['machine'])}\n\n"
                         f'{benchmark.table(result)}')
    if args.json:
        write_json(args.json, result)


def make_group(args: Namespace) -> Group:
    """Read from the flags what to measure."""
    workload = Workload(args.train, args.device or benchmark.default_device(), args.amp,
                        args.batch_size, (args.size, ) if args.size else None, args.multi_scale)
    forms = [Form(args.config, False, args.deploy, args.compile, args.channels_last, args.fused)]
    if args.against:
        authors = args.against == AUTHORS
        forms.append(Form(args.config if authors else args.against, authors, args.against_deploy,
                          args.against_compile, args.against_channels_last, args.against_fused))
    return Group(workload, tuple(forms), rounds=args.rounds, parts=args.parts)
