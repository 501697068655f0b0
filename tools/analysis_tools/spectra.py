"""Show what the mixers of a SpaRTAN do to the low and the high frequencies of its feature maps.

Of each stage, the radial power spectrum of the SMixer's input and its two branches, and of the
CMixer's input and its wave after modulation and after refinement; see
spartan_mm/analysis/spectra.py. DIR gets spectra.png and spectra.json.
"""

import argparse
import json
import os
import sys
from pathlib import Path

# A checkout that is not installed; what is installed comes first.
ROOT = Path(__file__).resolve().parents[2]
sys.path.append(os.fspath(ROOT))

import torch  # noqa: E402
from rich.progress import track  # noqa: E402

from spartan_mm.analysis.interaction_order import choose_images  # noqa: E402
from spartan_mm.analysis.model_inputs import (  # noqa: E402
    ImageReader,
    digest_weights,
    has_weights,
    load_with_weights,
    split_checkpoint,
)
from spartan_mm.analysis.spectra import (  # noqa: E402
    CUTOFF,
    WINDOWS,
    collect,
    draw_spectra,
    find_backbone,
)
from spartan_mm.engine.launch import reporting  # noqa: E402
from spartan_mm.files import check_writable, write_whole  # noqa: E402
from spartan_mm.inference import InputError, find_images  # noqa: E402
from spartan_mm.zoo import UnknownModelError  # noqa: E402


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('images', help='an image, or a folder; it is searched with its subfolders')
    parser.add_argument('model', metavar='MODEL[=CHECKPOINT]',
                        help="a model of this package, a config file, or 'xt' or 't' for the "
                             'backbone alone, with its checkpoint; or a checkpoint that holds its '
                             'config')
    parser.add_argument('--out-dir', type=Path, default=Path('work_dirs/spectra'), metavar='DIR',
                        help='where to write (default: %(default)s)')
    parser.add_argument('--num-images', type=int, default=32, metavar='N',
                        help='number of images, drawn at random (default: %(default)s)')
    parser.add_argument('--window', choices=WINDOWS, default='hann',
                        help='hann fades maps out towards their borders, which would otherwise '
                             'look like edges (default: %(default)s)')
    parser.add_argument('--random', action='store_true',
                        help='give a model without a checkpoint random weights')
    parser.add_argument('--seed', type=int, default=0,
                        help='of the choice of images and of random weights (default: %(default)s)')
    parser.add_argument('--device',
                        help="such as 'cpu' or 'cuda:0' (default: a GPU if there is one)")
    args = parser.parse_args()
    if args.num_images < 1:
        parser.error(f'--num-images {args.num_images}: must be at least 1')
    return args


def main() -> None:
    args = parse_args()
    with reporting(ImportError, InputError, UnknownModelError):
        run(args)


def run(args: argparse.Namespace) -> None:
    out = args.out_dir
    source = find_images(args.images, out)
    check_writable(out / 'spectra.png')
    images = choose_images(source.images, args.num_images, args.seed)
    name, checkpoint = split_checkpoint(args.model)
    torch.manual_seed(args.seed)
    named = load_with_weights(name, checkpoint, args.random, args.device)
    backbone = find_backbone(named.model, name)

    read = ImageReader(named)
    stages = collect(backbone, (read(path) for path in track(images, description='collecting')),
                     args.window)

    weights = '' if has_weights(name, checkpoint) else ', random weights'
    plural = 's' if len(images) > 1 else ''
    figure = draw_spectra(stages, f'{named.name}{weights}, {len(images)} image{plural}')
    with write_whole(out / 'spectra.png') as file:
        figure.savefig(file, format='png')
    record = dict(
        model=name, checkpoint=checkpoint, random_weights=bool(weights),
        weights=digest_weights(named.model), images=len(images), window=args.window,
        cutoff=CUTOFF, stages=stages)
    with write_whole(out / 'spectra.json') as file:
        file.write(json.dumps(record, indent=1).encode())

    print('share of power above half the Nyquist frequency:')
    for stage in stages:
        white = stage['white_noise_share']
        print(f'stage {stage["stage"]}, {"×".join(map(str, stage["maps"][0]))}: '
              + ('maps too small' if white is None else f'{100 * white:.1f} % in white noise'))
        for mixer in ('smixer', 'cmixer'):
            for part, values in stage.get(mixer, {}).items():
                print(f'  {mixer} {part:<22}{100 * values["share_above_half_nyquist"]:6.1f} %')
    print(f'see {out / "spectra.png"} and {out / "spectra.json"}')


if __name__ == '__main__':
    main()
