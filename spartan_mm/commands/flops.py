"""Count a model's parameters and operations, as a whole and module by module.

    spartan-mm flops rtdetr_spartan_t --deploy        both forms, and the modules of the deploy form
    spartan-mm flops spartan_t --size 224 --depth 4
    spartan-mm flops timm:resnet18

Neither data nor weights are needed.
"""
from argparse import ArgumentParser, Namespace

import torch

from ..analysis.sizes import COUNTED, DEPLOY_FORM, count_model, forms_table, tree
from ..files import check_writable, write_json
from ..text import printable
from .arguments import add, add_any_model


def add_arguments(parser: ArgumentParser) -> None:
    """Add the flags."""
    add_any_model(parser)
    add(parser, '--size', '--shape',
        help="of the image (default: as in the config's test pipeline)")
    parser.add_argument('--deploy', action='store_true', help='the inference form, too')
    parser.add_argument('--depth', type=int, default=2, metavar='N',
                        help='how far down the modules are listed; -1 for all of them (default: '
                             '%(default)s)')
    add(parser, '--json', help='write the numbers of all modules to it, too')


def run(args: Namespace) -> None:
    """Count, and print what was counted."""
    if args.json:
        check_writable(args.json, args.config)
    counts = [count_model(args.config, args.size)]
    if args.deploy and counts[0].form != DEPLOY_FORM:
        counts.append(count_model(args.config, args.size, deploy=True))
    last = counts[-1]
    print(f'{printable(last.name)} ({last.source})\n\n{forms_table(counts)}\n'
          f'{last.form}, module by module\n\n'
          f'{tree(last, None if args.depth < 0 else args.depth)}\n'
          f'{COUNTED} torch {torch.__version__}')
    if args.json:
        write_json(args.json, [count.to_dict() for count in counts])
