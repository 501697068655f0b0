"""Show what the mixers of a SpaRTAN do to the low and the high frequencies of its feature maps.

    spartan-mm spectra images/ spartan_t=t.pth

Of each stage, the radial power spectrum of the SMixer's input and its two branches, and of the
CMixer's input and its wave after modulation and after refinement; see
spartan_mm/analysis/look_inside/spectra.py. DIR gets spectra.png and spectra.json.
"""
from argparse import ArgumentParser, Namespace

from rich.progress import track

from ..analysis.look_inside.inputs import ImageReader, choose_images, digest_weights, load_models
from ..analysis.look_inside.spectra import CUTOFF, WINDOWS, collect, draw_spectra, find_backbone
from ..analysis.style import write_figure
from ..files import check_writable, write_json
from ..inference import find_images
from ..text import count
from .arguments import add_device, add_images, add_looked_at, add_out_dir, add_random, add_seed


def add_arguments(parser: ArgumentParser) -> None:
    """Add the flags."""
    add_looked_at(parser, several=False)
    add_out_dir(parser, 'work_dirs/spectra')
    add_images(parser, 32, 'number of images, drawn at random', '--num-images')
    parser.add_argument('--window', choices=WINDOWS, default='hann',
                        help='hann fades maps out towards their borders, which would otherwise '
                             'look like edges (default: %(default)s)')
    add_random(parser)
    add_seed(parser)
    add_device(parser)


def run(args: Namespace) -> None:
    """Collect the spectra, draw and print them."""
    target = args.out_dir / 'spectra.png'
    source = find_images(args.input, args.out_dir)
    check_writable(target)
    images = choose_images(source.images, args.images, args.seed)
    given, = load_models([args.model], None, args.random, args.device, args.seed)
    backbone = find_backbone(given.named.model, given.name)
    read = ImageReader(given.named)
    stages = collect(backbone, (read(path) for path in track(images, description='collecting')),
                     args.window)

    write_figure(target, draw_spectra(stages, f'{given.title}, {count(len(images), "image")}'))
    write_json(target.with_suffix('.json'), dict(
        model=given.name, checkpoint=given.checkpoint, random_weights=not given.trained,
        weights=digest_weights(given.named.model), images=len(images), window=args.window,
        cutoff=CUTOFF, stages=stages))
    print('share of power above half the Nyquist frequency:')
    for stage in stages:
        white = stage['white_noise_share']
        print(f'stage {stage["stage"]}, {"×".join(map(str, stage["maps"][0]))}: '
              + ('maps too small' if white is None else f'{100 * white:.1f} % in white noise'))
        for mixer in ('smixer', 'cmixer'):
            for part, values in stage.get(mixer, {}).items():
                print(f'  {mixer} {part:<22}{100 * values["share_above_half_nyquist"]:6.1f} %')
    print(f'see {target} and {target.with_suffix(".json")}')
