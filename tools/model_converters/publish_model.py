"""Make a checkpoint fit to be given away: STEM-<hash>.safetensors and STEM-<hash>.pth.

Both hold the weights that the model is evaluated with, the names of its classes and its config, and
are all that inference needs: tools/infer.py takes either in place of the config. What only the
training needs is left out, as is where things lie on this machine.
"""
import argparse
import sys
from pathlib import Path

# A checkout that is not installed; what is installed comes first.
sys.path.append(str(Path(__file__).resolve().parents[2]))

from spartan_mm.engine.checkpoint import CheckpointError  # noqa: E402
from spartan_mm.engine.publish import PublishError, publish  # noqa: E402


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('src', metavar='SRC', help='a checkpoint, path or URL')
    parser.add_argument('stem', metavar='STEM', help='where to write, without hash and suffix')
    parser.add_argument('--config', metavar='CONFIG',
                        help='config file, or the name of a model (default: the config in SRC)')
    parser.add_argument('--classes', nargs='+', metavar='NAME',
                        help="names of the classes, or 'coco' (default: those in SRC, else in the "
                             'config)')
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    classes = 'coco' if args.classes == ['coco'] else args.classes
    try:
        files = publish(args.src, args.stem, args.config, classes)
    except (OSError, CheckpointError, PublishError) as error:
        sys.exit(f'error: {args.src} was not published: {error}')
    for path in files:
        print(f'{path} ({path.stat().st_size / 1e6:.1f} MB)')


if __name__ == '__main__':
    main()
