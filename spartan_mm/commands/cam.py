"""Show where in images classifiers and detectors find what they say: class activation maps.

    spartan-mm cam zebra.jpg rtdetr_spartan_t=detector.pth
    spartan-mm cam zoo/ spartan_t=t.pth mmpretrain:resnet18_8xb32_in1k=r18.pth
    spartan-mm cam zoo.jpg published.pth --class zebra ostrich --layer backbone.stages.2

DIR gets an overlay for each image, class and model, results.json, and grid.png: images (and
classes) below each other, models side by side.

What is explained is, of a classifier, the logit of a class; of a detector, the sum of the log odds
of the scores of its detections, of one class or of all;
spartan_mm/analysis/look_inside/class_activation.py has the details.
"""
from argparse import ArgumentParser, Namespace
from pathlib import Path

from ..analysis.look_inside.class_activation import (
    METHODS,
    Explainer,
    explain_images,
    load_explained,
)
from ..analysis.look_inside.inputs import split_checkpoint, title_models
from ..analysis.look_inside.layers import LayerError, describe_layers
from ..analysis.models import load_named_model
from ..files import check_writable
from ..inference import IMAGE_SUFFIXES, find_images
from ..text import printable
from .arguments import add, add_layers, add_looked_at, layer_of_each, positive, report_failures


def add_arguments(parser: ArgumentParser) -> None:
    """Add the flags."""
    add_looked_at(parser, 'work_dirs/grad_cam')
    parser.add_argument('--class', nargs='+', default=[None], dest='classes', metavar='CLASS',
                        help='names or indices of the classes to explain (default: what a '
                             'classifier predicts, detections of all classes)')
    add_layers(parser, 'the layer to look at')
    parser.add_argument('--list-layers', action='store_true',
                        help='print the layers of the models and what each gives, and do no more; '
                             'needs no weights')
    parser.add_argument('--method', choices=METHODS,
                        help='default: gradcam for classifiers, layercam for detectors')
    add(parser, '--score-thr',
        help='least score of a detection that is explained (default: %(default)s)')
    parser.add_argument('--top', type=positive, metavar='N',
                        help='explain the N best detections (default: all)')


def run(args: Namespace) -> int:
    """Explain the images, or list the layers."""
    for model in args.models:
        if Path(model).suffix.lower() in IMAGE_SUFFIXES:
            args.parser.error(f'{model} is an image where a model was expected: put several images '
                              'into a folder and name that')
    layers = layer_of_each(args)
    try:
        return list_layers(args) if args.list_layers else explain(args, layers)
    except LayerError as error:
        raise LayerError(f'{error}; --list-layers prints all there are') from error


def list_layers(args: Namespace) -> int:
    """Print the layers of the models."""
    for model in args.models:
        named = load_named_model(split_checkpoint(model)[0])
        print(f'{printable(named.name)}:')
        for line in describe_layers(named.model, named.shape or (224, 224)):
            print(f'  {line}')
    return 0


def explain(args: Namespace, layers: list[str | None]) -> int:
    """Explain the images."""
    source = find_images(args.input, args.out_dir)
    check_writable(args.out_dir / 'results.json')
    explainers = {}
    for title, model, layer in zip(title_models(args.models, args.names), args.models, layers,
                                   strict=True):
        explained = load_explained(*split_checkpoint(model), args.device)
        explainers[title] = Explainer(explained, layer, args.method, args.score_thr, args.top)
    failures = explain_images(explainers, source.images, args.out_dir, args.classes)
    print(printable(f'{len(source.images) - len(failures)} images explained; see {args.out_dir}'))
    return report_failures(failures.values())
