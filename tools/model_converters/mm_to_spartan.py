"""Convert a SpaRTAN classifier trained or converted here into a checkpoint of the authors' code.

The reverse of spartan_to_mm.py, to the last bit. The weights are the file's entry `model`.
"""
import argparse
import sys
from pathlib import Path

# A checkout that is not installed; what is installed comes first.
sys.path.append(str(Path(__file__).resolve().parents[2]))

from spartan_mm.converters.commands import export_spartan_file  # noqa: E402
from spartan_mm.converters.common import run_command  # noqa: E402

if __name__ == '__main__':
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('src', metavar='SRC', help='our checkpoint, .pth or .safetensors')
    parser.add_argument('dst', metavar='DST', help='file to write, .pth or .safetensors')
    run_command(export_spartan_file, **vars(parser.parse_args()))
