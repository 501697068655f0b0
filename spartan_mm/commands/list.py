"""List the models by name, each with its task.

    spartan-mm list 'rtdetr_*'

Every command takes such a name in place of a config file.
"""
from argparse import ArgumentParser, Namespace

from .. import zoo
from .arguments import report_failures


def add_arguments(parser: ArgumentParser) -> None:
    """Add the flags."""
    parser.add_argument('pattern', nargs='?', default='*', metavar='PATTERN',
                        help="of the names, such as 'rtdetr_*' (default: all)")
    parser.add_argument('--task', choices=zoo.TASKS,
                        help='those of one task')


def run(args: Namespace) -> int:
    """Print names and tasks."""
    names = zoo.list_models(args.pattern, args.task)
    for name in names:
        print(f'{name:32} {zoo.task_of(name)}')
    return report_failures([] if names else [f"no model's name matches {args.pattern!r}"])
