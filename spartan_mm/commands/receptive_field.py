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
from ..analysis.style import write_figure
from ..files import write_json
from ..text import printable
from .arguments import add_layers, add_looked_at, add_sample, layer_of_each, positive, take_sample


def add_arguments(parser: ArgumentParser) -> None:
    """Add the flags."""
    add_looked_at(parser, 'work_dirs/effective_receptive_field')
    add_sample(parser, 50)
    add_layers(parser, 'the layer whose centre counts')
    parser.add_argument('--size', type=positive, default=512, metavar='PIXELS',
                        help='side of the images (default: %(default)s)')


def run(args: Namespace) -> None:
    """Measure, draw and print the sides of the squares."""
    layers = layer_of_each(args)
    target, source, models = take_sample(args, 'effective_receptive_field.png')
    images = [field.read_square(path, args.size) for path in source.images]
    # What can be wrong with any model is found before the first is measured.
    layers = [field.choose_layer(given.named.model, given.normalize(images[0]), layer, given.title)
              for given, layer in zip(models, layers, strict=True)]
    fields, records = {}, []
    for given, layer in zip(models, layers, strict=True):
        seen = map(given.normalize, track(images, description=given.title))
        found = fields[given.title] = field.measure_field(given.named.model, seen, layer)
        sides = {f'{share:g}': field.find_square(found, share)[2] for share in field.SHARES}
        records.append(dict(name=given.title, **given.origin, layer=layer, sides=sides))

    write_figure(target, field.draw_fields(fields), bbox_inches='tight', pad_inches=0.1)
    write_json(target.with_suffix('.json'),
               dict(images=len(images), size=args.size, models=records))
    print(f'sides of the squares, of {args.size} pixels, that hold a share of the contributions:')
    for record in records:
        sides = ', '.join(f'{100 * float(share):g} %: {side}'
                          for share, side in record['sides'].items())
        print(printable(f'  {record["name"]}, {record["layer"]}: {sides}'))
    print(printable(f'see {target} and {target.with_suffix(".json")}'))
