"""Convert an RT-DETR trained or converted here for the official code or for transformers.

The reverse of rtdetr_to_mm.py, to the last bit. Class names, image size and what else the weights
do not show are taken from the checkpoint's own config, where it has one. What has no place in the
other code fails with a list of it.

`--to official` writes a file for version 1 of the official PyTorch code (entry `model`);
`--to huggingface` writes the folder that RTDetrForObjectDetection.from_pretrained and
RTDetrImageProcessor.from_pretrained load.
"""
import argparse
import sys
from pathlib import Path

# A checkout that is not installed; what is installed comes first.
sys.path.append(str(Path(__file__).resolve().parents[2]))

from spartan_mm.converters.commands import export_rtdetr_file  # noqa: E402
from spartan_mm.converters.common import run_command  # noqa: E402

if __name__ == '__main__':
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('src', metavar='SRC', help='our checkpoint, .pth or .safetensors')
    parser.add_argument('dst', metavar='DST', help='file, or folder for transformers, to write')
    parser.add_argument('--to', choices=('official', 'huggingface'), required=True,
                        help='who is to read it')
    run_command(export_rtdetr_file, **vars(parser.parse_args()))
