"""Convert a SpaRTAN checkpoint of the authors into one that mmpretrain and mmdet load.

The result holds a classifier: `backbone.*` and `head.fc.*`. A detector takes its backbone with
`init_cfg=dict(type='Pretrained', checkpoint=..., prefix='backbone.')`.
"""
import argparse
import sys

from spartan_mm.converters import common
from spartan_mm.converters.spartan import convert_spartan


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('src', metavar='SRC', help="the authors' checkpoint")
    parser.add_argument('dst', metavar='DST', help='file to write')
    args = parser.parse_args()

    try:
        state_dict = common.pick_state_dict(common.load_checkpoint(args.src))
        state_dict, arch = convert_spartan(state_dict)
        common.save_checkpoint(dict(state_dict=state_dict, meta=dict(arch=arch)), args.dst)
    except common.ConversionError as error:
        sys.exit(f'{args.src} was not converted: {error}')

    print(f'architecture: {arch}')
    print(f'{len(state_dict)} tensors written to {args.dst}')


if __name__ == '__main__':
    main()
