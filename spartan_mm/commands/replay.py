"""Run a batch once more that stopped a training by a NaN or infinite loss or gradient.

    spartan-mm replay rtdetr_spartan_t work_dirs/x/nonfinite/iter_12_rank_0.pth

The training says where it kept the batch: nonfinite/ in its work dir. Weights, images and random
numbers are the ones of that moment. Printed are the terms of the loss, then and now, the first
layer that makes something not finite of finite inputs, and the gradients that are not finite.
"""
from argparse import ArgumentParser, Namespace

from ..text import printable
from .arguments import add


def add_arguments(parser: ArgumentParser) -> None:
    """Add the flags."""
    parser.add_argument('config', metavar='CONFIG', help='config file of the training')
    parser.add_argument('dump', metavar='DUMP', help='what the training kept')
    add(parser, '--device', help="such as 'cpu' or 'cuda:0' (default: as the training)")


def run(args: Namespace) -> None:
    """Replay, and print what came out."""
    from ..engine.replay import replay
    result = replay(args.config, args.dump, args.device)
    about = result.about
    print(printable(f'iteration {about["iteration"]} of epoch {about["epoch"]}: {about["what"]} '
                    'was not finite'))
    for then, now in zip(about['passes'], result.terms, strict=True):
        print(printable(f'images: {", ".join(then["images"])}'))
        width = max(map(len, now))
        print(f'  {"term":<{width}} {"then":>12} {"now":>12}')
        for name, value in then['terms'].items():
            print(printable(f'  {name:<{width}} {value:12.6g} {now[name]:12.6g}'))
    print('the terms are those of the training' if not result.differences() else
          f'other than in the training: {", ".join(result.differences())}')
    print(f'first output that is not finite: {", ".join(result.first_broken) or "none"}')
    print(f'{len(result.broken_gradients)} gradients are not finite: '
          f'{", ".join(result.broken_gradients[:5]) or "none"}')
