"""Show where in images classifiers and detectors find what they say: class activation maps.

    grad_cam.py zebra.jpg rtdetr_spartan_t=detector.pth
    grad_cam.py zoo/ spartan_t=t.pth mmpretrain:resnet18_8xb32_in1k=r18.pth
    grad_cam.py zoo.jpg published.pth --class zebra ostrich --layer backbone.stages.2

DIR gets an overlay for each image, class and model, results.json, and grid.png: images (and
classes) below each other, models side by side.

What is explained is, of a classifier, the logit of a class; of a detector, the sum of the log odds
of the scores of its detections, of one class or of all; spartan_mm/analysis/class_activation.py has
the details.
"""

import argparse
import os
import sys
from pathlib import Path

# A checkout that is not installed; what is installed comes first.
sys.path.append(os.fspath(Path(__file__).resolve().parents[2]))

from spartan_mm.analysis.class_activation import (  # noqa: E402
    METHODS,
    Explainer,
    UnknownClassError,
    explain_images,
    load_explained,
)
from spartan_mm.analysis.layers import LayerError, describe_layers  # noqa: E402
from spartan_mm.analysis.model_inputs import add_model_arguments, split_checkpoint  # noqa: E402
from spartan_mm.analysis.named_models import load_named_model  # noqa: E402
from spartan_mm.engine.launch import UsageError, read_share, reporting  # noqa: E402
from spartan_mm.files import check_writable  # noqa: E402
from spartan_mm.inference import IMAGE_SUFFIXES, InputError, find_images  # noqa: E402
from spartan_mm.zoo import UnknownModelError  # noqa: E402


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_arguments(parser, 'work_dirs/grad_cam')
    parser.add_argument('--class', nargs='+', default=[None], dest='classes', metavar='CLASS',
                        help='names or indices of the classes to explain (default: what a '
                             'classifier predicts, detections of all classes)')
    parser.add_argument('--layer', nargs='+', default=[None], dest='layers', metavar='LAYER',
                        help='the layer to look at, one for all models or one for each (default: '
                             'the last stage of the backbone)')
    parser.add_argument('--list-layers', action='store_true',
                        help='print the layers of the models and what each gives, and do no more; '
                             'needs no weights')
    parser.add_argument('--method', choices=METHODS,
                        help='default: gradcam for classifiers, layercam for detectors')
    parser.add_argument('--score-thr', type=read_share, default=0.3, metavar='SCORE',
                        help='least score of a detection that is explained (default: %(default)s)')
    parser.add_argument('--top', type=int, metavar='N',
                        help='explain the N best detections (default: all)')
    args = parser.parse_args()
    for model in args.models:
        if Path(model).suffix.lower() in IMAGE_SUFFIXES:
            parser.error(f'{model} is an image where a model was expected: put several images '
                         'into a folder and name that')
    count = len(args.models)
    if args.names and len(set(args.names)) != count:
        parser.error(f'--names: {len(set(args.names))} different names for {count} models')
    if len(args.layers) not in (1, count):
        parser.error(f'--layer: {len(args.layers)} layers for {count} models')
    if args.top is not None and args.top < 1:
        parser.error(f'--top {args.top}: must be at least 1')
    return args


def main() -> None:
    args = parse_args()
    with reporting(ImportError, InputError, UnknownClassError, UnknownModelError):
        try:
            list_layers(args) if args.list_layers else run(args)
        except LayerError as error:
            raise UsageError(f'{error}; --list-layers prints all there are') from error


def list_layers(args: argparse.Namespace) -> None:
    """Print the layers of the models."""
    for model in args.models:
        name, _ = split_checkpoint(model)
        named = load_named_model(name)
        print(f'{named.name}:')
        for line in describe_layers(named.model, named.shape or (224, 224)):
            print(f'  {line}')


def run(args: argparse.Namespace) -> None:
    source = find_images(args.images, args.out_dir)
    check_writable(args.out_dir / 'results.json')
    names = args.names or name_models(args.models)
    layers = args.layers if len(args.layers) > 1 else args.layers * len(names)
    explainers = {}
    for name, model, layer in zip(names, args.models, layers, strict=True):
        config, checkpoint = split_checkpoint(model)
        explainers[name] = Explainer(load_explained(config, checkpoint, args.device), layer,
                                     args.method, args.score_thr, args.top)
    failures = explain_images(explainers, source.images, args.out_dir, args.classes)
    print(f'{len(source.images) - len(failures)} images explained; see {args.out_dir}')
    if failures:
        sys.exit('\n'.join(f'error: {failure}' for failure in failures.values()))


def name_models(models: list[str]) -> list[str]:
    """Call models as their configs, or as their checkpoints where configs have the same name."""
    parts = [split_checkpoint(model) for model in models]
    stems = [Path(name).stem.rpartition(':')[2] for name, _ in parts]
    names = [stem if stems.count(stem) == 1 else Path(checkpoint or name).stem
             for stem, (name, checkpoint) in zip(stems, parts, strict=True)]
    if len(set(names)) < len(names):
        raise UsageError(f'several models are called {", ".join(names)}: give each a name with '
                         '--names')
    return names


if __name__ == '__main__':
    main()
