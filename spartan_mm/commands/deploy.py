"""Write a checkpoint in deploy form: the same detections or classes from less computation.

    spartan-mm deploy rtdetr_spartan_t work_dirs/X/epoch_70.pth deployed.pth

OUT serves `spartan-mm test`, `spartan-mm infer` and spartan_mm.get_model as CHECKPOINT does; it
cannot be trained further.
"""
from argparse import ArgumentParser, Namespace

from ..engine.launch import load_config
from ..model_index import check_predicts
from ..text import printable
from ..weights.saving import deploy_checkpoint
from ..zoo import get_model
from .arguments import add_config


def add_arguments(parser: ArgumentParser) -> None:
    """Add the flags."""
    add_config(parser)
    parser.add_argument('checkpoint', metavar='CHECKPOINT', help='its weights')
    parser.add_argument('out', metavar='OUT', help='file to write')


def run(args: Namespace) -> None:
    """Deploy, and say how much smaller the model became."""
    config = load_config(args.config, options=args.cfg_options)
    check_predicts(config, args.config)
    model = get_model(config)
    before = sum(parameter.numel() for parameter in model.parameters())
    deploy_checkpoint(model, args.checkpoint, args.out)
    after = sum(parameter.numel() for parameter in model.parameters())
    print(printable(f'{args.out}: {before / 1e6:.2f} M parameters became {after / 1e6:.2f} M'))
