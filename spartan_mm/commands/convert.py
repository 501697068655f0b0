"""Convert checkpoints of the original authors and of transformers to ours, and back.

    spartan-mm convert RELEASED_FILE checkpoints/spartan_t.pth --to mm
    spartan-mm convert backbone moganet RELEASED_FILE checkpoints/moganet_xt.pth

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

`backbone NAME SRC DST` reads a classifier of other authors, as `--from NAME --to mm` does.
UniRepLKNet is read and written in the form of a training and merged; the others in the former.
"""
import importlib
from argparse import ArgumentParser, Namespace

from ..errors import CheckpointError
from ..text import count
from ..weights.converters.backbones import ORIGINALS
from ..weights.converters.convert import KINDS, convert, read_source


def add_arguments(parser: ArgumentParser) -> None:
    """Add the flags."""
    kinds = '; '.join(f'{name}: {reader}' for name, reader in KINDS.items())
    parser.usage = ('%(prog)s SRC DST --to KIND [--from KIND]\n'
                    '       %(prog)s backbone NAME SRC DST')
    parser.add_argument('words', nargs='+', metavar='SRC DST',
                        help='file (.pth, .safetensors) or folder of transformers to read, and the '
                             'one to write; before them "backbone" and one of '
                             f'{", ".join(ORIGINALS)}')
    parser.add_argument('--to', choices=KINDS, help=f'who is to read it; {kinds}')
    parser.add_argument('--from', dest='kind', choices=KINDS,
                        help="what SRC is (default: told by its tensors' names)")


def run(args: Namespace) -> None:
    """Convert, and say what was done."""
    kind, to, words = args.kind, args.to, args.words
    if words[0] == 'backbone' and len(words) > 2:
        if kind or to:
            args.parser.error('backbone NAME says what SRC is and writes for mm: leave --from and '
                              '--to away')
        if words[1] not in ORIGINALS:
            args.parser.error(f'there is no backbone {words[1]!r}, choose from: '
                              f'{", ".join(ORIGINALS)}')
        (kind, *words), to = words[1:], 'mm'
    if len(words) != 2:
        args.parser.error(f'SRC and DST are needed, {count(len(words), "path")} given')
    if to is None:
        args.parser.error('the following arguments are required: --to')
    src, dst = words
    try:
        source = read_source(src, kind)
        if {'official', 'huggingface'} & {source.kind, to}:
            importlib.import_module('spartan_mm.detection')
        print(convert(source, dst, to))
    except CheckpointError as error:
        first, *others = error.args
        raise CheckpointError(f'{src} was not converted: {first}', *others) from error
