"""Leave out of a trained model what matters least: a smaller config and checkpoint.

    spartan-mm prune spartan_t work_dirs/X/epoch_300.pth --waves 0.5 --inner 0.25 --out-dir pruned
    spartan-mm train pruned/spartan_t_pruned.py        # fine-tunes it, with the schedule in there

What is written serves train, test, infer, publish, deploy and export as any other model. Some
accuracy is lost in general, and comes back in a training of some epochs with a low learning rate.

Waves are those behind the first C of a CMixer, which no argmax over its C input channels can pick:
without those left out, the rest computes what it did. The first C waves and the widths of the
stages are never changed, since that would change which channel is the strongest.
"""
import re
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from pathlib import Path

from ..engine.launch import load_config
from ..errors import UsageError
from ..text import printable
from ..weights.pruning import PRUNABLE, prune_checkpoint
from .arguments import add, add_config, share


def add_arguments(parser: ArgumentParser) -> None:
    """Add the flags."""
    add_config(parser)
    parser.add_argument('checkpoint', metavar='CHECKPOINT', help='its weights after training')
    for flag, help in dict(
            waves='waves that no argmax can pick, in each CMixer',
            inner='channels inside each SMixer',
            ffn='hidden channels of the feed-forward networks of neck and decoder',
            csp="channels between the 3x3 convolutions in the neck's fusion blocks").items():
        parser.add_argument(f'--{flag}', type=share, metavar='SHARE',
                            help=f'leave out this share, 0 to 1, of the {help}')
    parser.add_argument('--blocks', nargs='+', type=_block, metavar='BLOCK',
                        help='leave out these blocks of SpaRTAN, such as '
                             'backbone.stages.2.blocks.5, or so many of them that add least')
    add(parser, '--out-dir', default='pruned')


def run(args: Namespace) -> None:
    """Prune, and say what became smaller."""
    shares = {kind: value for kind in PRUNABLE if (value := getattr(args, kind)) is not None}
    blocks = args.blocks or 0
    if not shares and not blocks:
        raise UsageError('nothing to leave out is named; give one of '
                         f'{", ".join(f"--{kind}" for kind in (*PRUNABLE, "blocks"))}')
    if blocks and blocks[0].isdecimal():
        if len(blocks) > 1:
            raise UsageError('--blocks takes one number, or the names of blocks')
        blocks = int(blocks[0])
    stem = args.out_dir / f'{Path(args.config).stem}_pruned'
    pruned = prune_checkpoint(load_config(args.config, options=args.cfg_options), args.checkpoint,
                              stem, shares, blocks)
    for setting, (before, after) in pruned.changes.items():
        print(f'{setting}: {before} became {after}')
    before, after = pruned.parameters
    print(printable(f'{pruned.config}, {pruned.checkpoint}: {before / 1e6:.2f} M parameters became '
                    f'{after / 1e6:.2f} M'))


def _block(text: str) -> str:
    """Read the name of a block, or a number."""
    if re.fullmatch(r'\d+|(.+\.)?stages\.\d+\.blocks\.\d+', text, re.ASCII):
        return text
    raise ArgumentTypeError(f'{text} must be a number, or a name such as '
                            'backbone.stages.2.blocks.5')
