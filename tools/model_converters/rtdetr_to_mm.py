"""Convert an RT-DETR checkpoint into one that this package's configs load.

SRC is a checkpoint of the official PyTorch code, version 1 or 2, of which the averaged weights are
taken where the file has them (`ema.module`), the trained ones (`model`) otherwise; or the folder of
a model of transformers (RTDetrForObjectDetection), with config.json and model.safetensors.

An official file does not say at which decoder layer a model is evaluated: for R50-m (the third of
six) set model.decoder.eval_idx=2, all others are evaluated at their last. Nor does it say whether a
model of version 2 samples discretely, which is not supported.
"""
import argparse
import sys
from pathlib import Path

# A checkout that is not installed; what is installed comes first.
sys.path.append(str(Path(__file__).resolve().parents[2]))

from spartan_mm.converters.commands import convert_rtdetr_file  # noqa: E402
from spartan_mm.converters.common import run_command  # noqa: E402

if __name__ == '__main__':
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('src', metavar='SRC',
                        help='official checkpoint (.pth, .safetensors), or folder of transformers')
    parser.add_argument('dst', metavar='DST', help='file to write, .pth or .safetensors')
    run_command(convert_rtdetr_file, **vars(parser.parse_args()))
