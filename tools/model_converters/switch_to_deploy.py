"""Write a checkpoint in deploy form: the same detections or classes from less computation.

    python tools/model_converters/switch_to_deploy.py CONFIG CHECKPOINT OUT

OUT serves tools/test.py, tools/infer.py and spartan_mm.get_model as CHECKPOINT does; it cannot be
trained further.
"""

import argparse
import os
import sys

# A checkout that is not installed; what is installed comes first.
sys.path.append(os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))

from spartan_mm.deploy import deploy_checkpoint  # noqa: E402
from spartan_mm.engine import launch  # noqa: E402
from spartan_mm.zoo import get_model  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('config', metavar='CONFIG', help="the model's config, a file or a name")
    parser.add_argument('checkpoint', metavar='CHECKPOINT', help='its weights')
    parser.add_argument('out', metavar='OUT', help='file to write')
    args = parser.parse_args()
    with launch.reporting():
        model = get_model(launch.load_config(args.config))
        before = sum(parameter.numel() for parameter in model.parameters())
        deploy_checkpoint(model, args.checkpoint, args.out)
    after = sum(parameter.numel() for parameter in model.parameters())
    print(f'{args.out}: {before / 1e6:.2f} M parameters became {after / 1e6:.2f} M')


if __name__ == '__main__':
    main()
