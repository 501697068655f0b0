"""Measure the effective receptive field of models: how much each pixel counts for a layer's centre.

    spartan-mm receptive-field images/ spartan_t=t.pth mmpretrain:resnet18_8xb32_in1k=r18.pth

After Luo et al. (NeurIPS 2016); spartan_mm/analysis/look_inside/receptive_field.py has the details,
and why the figures are not comparable with RepLKNet's tables. DIR gets
effective_receptive_field.png, a panel for each model, and effective_receptive_field.json: the sides
of the squares that hold 20, 30, 50 and 99 % of the contributions. All models see the same images,
cut to a square of one size.
"""
from argparse import ArgumentParser, Namespace

from rich.progress import track

from ..analysis.look_inside import receptive_field as field
from ..analysis.look_inside.inputs import choose_images, load_models
from ..analysis.style import write_figure
from ..errors import UsageError
from ..files import check_writable, write_json
from ..inference import find_images
from .arguments import (
    add_device,
    add_images,
    add_layers,
    add_looked_at,
    add_out_dir,
    add_random,
    add_seed,
    layer_of_each,
    positive,
)


def add_arguments(parser: ArgumentParser) -> None:
    """Add the flags."""
    add_looked_at(parser)
    add_out_dir(parser, 'work_dirs/effective_receptive_field')
    add_layers(parser, 'the layer whose centre counts')
    parser.add_argument('--size', type=positive, default=512, metavar='PIXELS',
                        help='side of the images (default: %(default)s)')
    add_images(parser, 50, 'number of images, drawn at random', '--num-images')
    add_random(parser)
    add_seed(parser)
    add_device(parser)


def run(args: Namespace) -> None:
    """Measure, draw and print the sides of the squares."""
    layers, target = layer_of_each(args), args.out_dir / 'effective_receptive_field.png'
    source = find_images(args.input, args.out_dir)
    check_writable(target)
    images = [field.read_square(path, args.size)
              for path in choose_images(source.images, args.images, args.seed)]
    models = load_models(args.models, args.names, args.random, args.device, args.seed)
    # What can be wrong with any model is found before the first is measured.
    records = []
    for given, layer in zip(models, layers, strict=True):
        model = given.named.model
        try:
            layer = field.check_layer(model, field.normalize(model, images[0]), layer)
        except UsageError as error:
            raise UsageError(f'{given.title}: {error}') from error
        records.append(dict(name=given.title, model=given.name, checkpoint=given.checkpoint,
                            random_weights=not given.trained, layer=layer))
    fields = {}
    for record, given in zip(records, models, strict=True):
        seen = (field.normalize(given.named.model, image)
                for image in track(images, description=given.title))
        found = fields[given.title] = field.measure_field(given.named.model, seen, record['layer'])
        record['sides'] = {f'{share:g}': field.square_side(found, share) for share in field.SHARES}

    write_figure(target, field.draw_fields(fields), bbox_inches='tight', pad_inches=0.1)
    write_json(target.with_suffix('.json'),
               dict(images=len(images), size=args.size, models=records))
    print(f'sides of the squares, of {args.size} pixels, that hold a share of the contributions:')
    for record in records:
        sides = ', '.join(f'{100 * float(share):g} %: {side}'
                          for share, side in record['sides'].items())
        print(f'  {record["name"]}, {record["layer"]}: {sides}')
    print(f'see {target} and {target.with_suffix(".json")}')
