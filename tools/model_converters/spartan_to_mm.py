"""Convert a SpaRTAN checkpoint of the authors into one that mmpretrain and mmdet load.

The result holds a classifier: `backbone.*` and `head.fc.*`. A detector takes its backbone with
`init_cfg=dict(type='Pretrained', checkpoint=..., prefix='backbone.')`.
"""
import sys
from pathlib import Path

# A checkout that is not installed; what is installed comes first.
sys.path.append(str(Path(__file__).resolve().parents[2]))

from spartan_mm.converters.common import run_command  # noqa: E402
from spartan_mm.converters.spartan import convert_spartan  # noqa: E402

if __name__ == '__main__':
    run_command(convert_spartan, __doc__)
