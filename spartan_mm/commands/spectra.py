"""Show what the mixers of a SpaRTAN do to the low and the high frequencies of its feature maps.

    spartan-mm spectra images/ spartan_t=t.pth

Of each stage, the radial power spectrum of the SMixer's input and its two branches, and of the
CMixer's input and its wave after modulation and after refinement; see
spartan_mm/analysis/look_inside/spectra.py. DIR gets spectra.png and spectra.json.
"""
from argparse import ArgumentParser, Namespace

from rich.progress import track

from ..analysis.look_inside import spectra
from ..analysis.style import write_figure
from ..files import write_json
from ..text import count, printable
from .arguments import add_looked_at, add_sample, take_sample


def add_arguments(parser: ArgumentParser) -> None:
    """Add the flags."""
    add_looked_at(parser, 'work_dirs/spectra', several=False)
    add_sample(parser, 32)
    parser.add_argument('--window', choices=spectra.WINDOWS, default='hann',
                        help='hann fades maps out towards their borders, which would otherwise '
                             'look like edges (default: %(default)s)')


def run(args: Namespace) -> None:
    """Collect the spectra, draw and print them."""
    target, source, (given, ) = take_sample(args, 'spectra.png')
    backbone = spectra.find_backbone(given.named.model, given.origin['model'])
    seen = map(given.read, track(source.images, description='collecting'))
    stages = spectra.describe(spectra.collect(backbone, seen, args.window))

    images = len(source.images)
    title = f'{given.title}, {count(images, "image")}'
    write_figure(target, spectra.draw_spectra(stages, title))
    write_json(target.with_suffix('.json'), dict(
        **given.origin, weights=given.digest, images=images, window=args.window,
        cutoff=spectra.CUTOFF, stages=stages))
    print('share of power above half the Nyquist frequency:')
    for stage in stages:
        white = stage['white_noise_share']
        print(f'stage {stage["stage"]}, {"×".join(map(str, stage["maps"][0]))}: '
              + ('maps too small' if white is None else f'{100 * white:.1f} % in white noise'))
        for mixer in ('smixer', 'cmixer'):
            for part, values in stage.get(mixer, {}).items():
                print(f'  {mixer} {part:<22}{100 * values["share_above_half_nyquist"]:6.1f} %')
    print(printable(f'see {target} and {target.with_suffix(".json")}'))
