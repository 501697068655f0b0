"""Make the digits dataset: handwritten digits on photographs, in COCO format, no download."""
import argparse

from spartan_mm.datasets import make_digits


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument('root', nargs='?', default='data/digits', help='folder to make')
    parser.add_argument('--num-train', type=int, default=2000, help='number of training pictures')
    parser.add_argument('--num-val', type=int, default=200, help='number of validation pictures')
    parser.add_argument('--seed', type=int, default=0, help='seed of everything that is drawn')
    parser.add_argument('--image-size', type=int, nargs=2, default=(320, 256),
                        metavar=('WIDTH', 'HEIGHT'), help='size of most pictures in pixels')
    args = parser.parse_args()

    paths = make_digits(args.root, args.num_train, args.num_val, args.seed, tuple(args.image_size))
    print(f'{paths.train_images}: annotations in {paths.train_annotations}')
    print(f'{paths.val_images}: annotations in {paths.val_annotations}')


if __name__ == '__main__':
    main()
