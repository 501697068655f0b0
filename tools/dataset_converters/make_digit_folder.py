"""Make the folder of digits: handwritten digits, a folder for each class, no download."""
import argparse

from spartan_mm.datasets import make_digit_folder


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument('root', nargs='?', default='data/digit_folder', help='folder to make')
    parser.add_argument('--seed', type=int, default=0, help='seed of what is held out')
    args = parser.parse_args()

    root = make_digit_folder(args.root, args.seed)
    for split in ('train', 'val'):
        print(f'{root / split}: {len(list((root / split).glob("*/*.png")))} pictures')


if __name__ == '__main__':
    main()
