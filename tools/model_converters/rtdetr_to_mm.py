"""Convert an official RT-DETR checkpoint (PyTorch, v1) into one that this package's configs load.

A file does not say at which decoder layer a model is evaluated: for R50-m (the third of six) set
model.decoder.eval_idx=2, all others are evaluated at their last.

The averaged weights are taken where the file has them (`ema.module`), the trained ones (`model`)
otherwise. The backbone is a ResNet-vd 18, 34, 50 or 101, or the authors' SpaRTAN.
"""
import sys
from pathlib import Path

# A checkout that is not installed; what is installed comes first.
sys.path.append(str(Path(__file__).resolve().parents[2]))

from spartan_mm.converters.common import run_command  # noqa: E402
from spartan_mm.converters.rtdetr import convert_rtdetr  # noqa: E402

if __name__ == '__main__':
    run_command(convert_rtdetr, __doc__, entries=('ema.module', 'model'))
