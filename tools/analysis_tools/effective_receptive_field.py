"""Measure the effective receptive field of models: how much each pixel counts for a layer's centre.

After Luo et al. (NeurIPS 2016); spartan_mm/analysis/receptive_field.py has the details, and why the
figures are not comparable with RepLKNet's tables. DIR gets effective_receptive_field.png, a panel
for each model, and effective_receptive_field.json: the sides of the squares that hold 20, 30, 50
and 99 % of the contributions. All models see the same images, cut to a square of one size.

    effective_receptive_field.py images/ spartan_t=t.pth mmpretrain:resnet18_8xb32_in1k=r18.pth
"""

import argparse
import json
import os
import sys
from pathlib import Path

# A checkout that is not installed; what is installed comes first.
sys.path.append(os.fspath(Path(__file__).resolve().parents[2]))

import torch  # noqa: E402
from rich.progress import track  # noqa: E402

from spartan_mm.analysis.interaction_order import choose_images  # noqa: E402
from spartan_mm.analysis.layers import LayerError  # noqa: E402
from spartan_mm.analysis.model_inputs import (  # noqa: E402
    add_model_arguments,
    has_weights,
    load_with_weights,
    split_checkpoint,
)
from spartan_mm.analysis.receptive_field import (  # noqa: E402
    SHARES,
    check_layer,
    draw_fields,
    measure_field,
    normalise,
    read_square,
    square_side,
)
from spartan_mm.engine.launch import UsageError, reporting  # noqa: E402
from spartan_mm.files import check_writable, write_whole  # noqa: E402
from spartan_mm.inference import InputError, find_images  # noqa: E402
from spartan_mm.zoo import UnknownModelError  # noqa: E402


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_arguments(parser, 'work_dirs/effective_receptive_field')
    parser.add_argument('--layer', nargs='+', default=[None], dest='layers', metavar='LAYER',
                        help='the layer whose centre counts, one for all models or one for each '
                             '(default: the last stage of the backbone); grad_cam.py --list-layers '
                             'prints all there are')
    parser.add_argument('--size', type=int, default=512, metavar='PIXELS',
                        help='side of the images (default: %(default)s)')
    parser.add_argument('--num-images', type=int, default=50, metavar='N',
                        help='number of images, drawn at random (default: %(default)s)')
    parser.add_argument('--random', action='store_true',
                        help='give models without a checkpoint random weights')
    parser.add_argument('--seed', type=int, default=0,
                        help='of the choice of images and of random weights (default: %(default)s)')
    args = parser.parse_args()
    for flag, value in (('--size', args.size), ('--num-images', args.num_images)):
        if value < 1:
            parser.error(f'{flag} {value}: must be at least 1')
    count = len(args.models)
    if args.names and len(args.names) != count:
        parser.error(f'--names: {len(args.names)} names for {count} models')
    if len(args.layers) not in (1, count):
        parser.error(f'--layer: {len(args.layers)} layers for {count} models')
    return args


def main() -> None:
    args = parse_args()
    with reporting(ImportError, InputError, LayerError, UnknownModelError):
        run(args)


def run(args: argparse.Namespace) -> None:
    out = args.out_dir
    source = find_images(args.images, out)
    check_writable(out / 'effective_receptive_field.png')
    images = [read_square(path, args.size)
              for path in choose_images(source.images, args.num_images, args.seed)]

    # What can be wrong with any model is found before the first is measured.
    models, records = {}, []
    layers = args.layers if len(args.layers) > 1 else args.layers * len(args.models)
    for number, (argument, layer) in enumerate(zip(args.models, layers, strict=True)):
        name, checkpoint = split_checkpoint(argument)
        torch.manual_seed(args.seed)
        named = load_with_weights(name, checkpoint, args.random, args.device)
        shown = args.names[number] if args.names else named.name
        trained = has_weights(name, checkpoint)
        shown += '' if trained else ' (random weights)'
        if shown in models:
            raise UsageError(f'two models are called {shown}: give each a name with --names')
        try:
            layer = check_layer(named.model, normalise(named.model, images[0]), layer)
        except UsageError as error:
            raise UsageError(f'{shown}: {error}') from error
        models[shown] = named.model
        records.append(dict(name=shown, model=name, checkpoint=checkpoint,
                            random_weights=not trained, layer=layer))
    fields = {}
    for record, (shown, model) in zip(records, models.items(), strict=True):
        fields[shown] = measure_field(model, (
            normalise(model, image) for image in track(images, description=shown)),
            record['layer'])
        record['sides'] = {f'{share:g}': square_side(fields[shown], share) for share in SHARES}

    with write_whole(out / 'effective_receptive_field.png') as file:
        draw_fields(fields).savefig(file, format='png', bbox_inches='tight', pad_inches=0.1)
    with write_whole(out / 'effective_receptive_field.json') as file:
        file.write(json.dumps(dict(images=len(images), size=args.size, models=records),
                              indent=1).encode())
    print(f'sides of the squares, of {args.size} pixels, that hold a share of the contributions:')
    for record in records:
        sides = ', '.join(f'{100 * float(share):g} %: {side}'
                          for share, side in record['sides'].items())
        print(f'  {record["name"]}, {record["layer"]}: {sides}')
    print(f'see {out / "effective_receptive_field.png"} and '
          f'{out / "effective_receptive_field.json"}')


if __name__ == '__main__':
    main()
