"""Convert checkpoints of the original authors and of transformers to ours, and back.

    spartan-mm convert RELEASED_FILE checkpoints/spartan_t.pth --to mm

Of a training with averaging the averaged weights are taken. The architecture is read from the
tensors' shapes, and from config.json; what is missing, left over or has no place on the other side
fails with a list. There and back gives the same bits.

A converted classifier has `backbone.*` and `head.fc.*`. A detector takes its backbone with
`init_cfg=dict(type='CheckedPretrained', checkpoint=..., prefix='backbone.')`.

An official file of RT-DETR does not say at which decoder layer a model is evaluated: for R50-m (the
third of six) set model.decoder.eval_idx=2, all others are evaluated at their last. Nor does it say
whether a model of version 2 samples discretely, which is not supported. For transformers, class
names, image size and what else the weights do not show are taken from the checkpoint's own config;
`from_pretrained` of RTDetrForObjectDetection and of RTDetrImageProcessor load the folder.
"""
import importlib
from argparse import ArgumentParser, Namespace

from ..errors import CheckpointError
from ..weights.converters.convert import KINDS, convert, read_source


def add_arguments(parser: ArgumentParser) -> None:
    """Add the flags."""
    kinds = '; '.join(f'{name}: {reader}' for name, reader in KINDS.items())
    parser.add_argument('src', metavar='SRC',
                        help='file (.pth, .safetensors), or folder of transformers')
    parser.add_argument('dst', metavar='DST', help='file, or folder for transformers, to write')
    parser.add_argument('--to', choices=KINDS, required=True, help=f'who is to read it; {kinds}')
    parser.add_argument('--from', dest='kind', choices=KINDS,
                        help="what SRC is (default: told by its tensors' names)")


def run(args: Namespace) -> None:
    """Convert, and say what was done."""
    try:
        source = read_source(args.src, args.kind)
        if {'official', 'huggingface'} & {source.kind, args.to}:
            importlib.import_module('spartan_mm.detection')
        print(convert(source, args.dst, args.to))
    except CheckpointError as error:
        first, *others = error.args
        raise CheckpointError(f'{args.src} was not converted: {first}', *others) from error
