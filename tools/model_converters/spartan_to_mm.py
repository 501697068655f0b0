"""Convert a SpaRTAN checkpoint of the authors into one that mmpretrain and mmdet load.

The result holds a classifier: `backbone.*` and `head.fc.*`. A detector takes its backbone with
`init_cfg=dict(type='CheckedPretrained', checkpoint=..., prefix='backbone.')`.
"""
import argparse
import sys
from pathlib import Path

# A checkout that is not installed; what is installed comes first.
sys.path.append(str(Path(__file__).resolve().parents[2]))

from spartan_mm.converters.commands import convert_spartan_file  # noqa: E402
from spartan_mm.converters.common import run_command  # noqa: E402

if __name__ == '__main__':
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('src', metavar='SRC', help="the authors' checkpoint, .pth or .safetensors")
    parser.add_argument('dst', metavar='DST', help='file to write, .pth or .safetensors')
    run_command(convert_spartan_file, **vars(parser.parse_args()))
