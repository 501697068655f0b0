"""Open a page to try a model on: drop a picture, or take one with the camera.

    spartan-mm demo X-<hash>.pth
    spartan-mm demo hf://ORG/NAME
    spartan-mm demo                      # the detector that `make demo` trained

The page shows boxes, classes, a slider for the least score, how long it took, and where in the
picture the model finds what it says. It is open to this machine alone unless --host says otherwise,
needs no internet, and sends nothing anywhere.
"""
import signal
import sys
from argparse import ArgumentParser, Namespace
from pathlib import Path

from .. import demo, zoo
from ..engine.launch import choose_device
from ..errors import UsageError
from ..inference import IMAGE_SUFFIXES, Classifier, Detector, load_model
from ..page import Viewer, serve, wait
from ..runtime import SUFFIXES, Runtime, RuntimeFileError
from ..text import printable
from .arguments import add

#: The most pictures that are offered to try.
_MAX_EXAMPLES = 8


def add_arguments(parser: ArgumentParser) -> None:
    """Add the flags."""
    parser.add_argument('model', nargs='?', metavar='MODEL',
                        help='a checkpoint that holds its config, as published ones do: a file, a '
                             'URL or hf://ORG/NAME; a config file or the name of a model, with '
                             'CHECKPOINT; or an exported .onnx, .xml or .tflite (default: the '
                             'last checkpoint of the training demo)')
    parser.add_argument('checkpoint', nargs='?', metavar='CHECKPOINT',
                        help='checkpoint, if it is not in the place of the model')
    parser.add_argument('--examples', type=Path, metavar='DIR',
                        help=f'pictures to try, the first {_MAX_EXAMPLES} of a folder')
    parser.add_argument('--host', default='127.0.0.1',
                        help='address to listen at; 0.0.0.0 opens the page to the whole network, '
                             'without a password (default: %(default)s)')
    parser.add_argument('--port', type=int, metavar='N',
                        help='port to listen at (default: the first from 7860 that is free)')
    add(parser, '--device')
    add(parser, '--match-classes')
    add(parser, '--score-thr', help='where the slider stands at first (default: %(default)s)')


def run(args: Namespace) -> None:
    """Serve the page until Ctrl-C."""
    if args.model is None:
        args.model, args.checkpoint, samples = _find_demo()
        args.examples = args.examples or samples
    examples = _find_examples(args.examples) if args.examples else []
    viewer = Viewer(_load(args), Path(args.checkpoint or args.model).name)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    with serve(viewer, args.host, args.port, args.score_thr, examples) as address:
        print(printable(f'{viewer.title} is at {address}; Ctrl-C ends it'), flush=True)
        wait()


def _find_examples(folder: Path) -> list[Path]:
    found = sorted(path for path in folder.glob('*') if path.suffix.lower() in IMAGE_SUFFIXES)
    if not found:
        raise UsageError(f'--examples {folder} holds no images ({", ".join(IMAGE_SUFFIXES)})')
    return found[:_MAX_EXAMPLES]


def _load(args: Namespace) -> Detector | Classifier | Runtime:
    if Path(args.model).suffix not in SUFFIXES:
        return load_model(args.model, args.checkpoint, choose_device(args.device),
                          args.match_classes)
    if args.checkpoint:
        raise UsageError(f'{args.model} is an exported model, which has its weights: leave '
                         f'{args.checkpoint} out')
    try:
        return Runtime(args.model)
    except RuntimeFileError as error:
        raise UsageError(str(error)) from error


def _find_demo() -> tuple[str, str, Path | None]:
    """Find what the training demo left: config, checkpoint and pictures."""
    folder = demo.find_home(zoo.root()) / 'work_dirs' / demo.DetectorDemo.name
    latest, config = folder / 'last_checkpoint', Path(demo.DetectorDemo.config_name).name
    if not latest.is_file():
        raise UsageError(f'there is no MODEL, and no detector of the training demo in {folder}: '
                         'name a model, or train that one first with `make demo` (tools/demo.py)')
    samples = folder / 'samples'
    return str(folder / config), latest.read_text().strip(), samples if samples.is_dir() else None
