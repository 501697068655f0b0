"""``spartan-mm COMMAND``: all that the package does, a word for each."""
import argparse
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Any, NoReturn

from .errors import UsageError
from .text import printable
from .version import __version__

#: What each command does. It lives in ``commands/``, with an underscore for the hyphen.
COMMANDS = {
    'train': 'train a model on a folder of data, or as its config describes',
    'test': 'evaluate a checkpoint as its config describes',
    'infer': 'detect or classify in pictures, folders and videos',
    'serve': 'answer pictures over HTTP with boxes or classes',
    'demo': 'open a page to try a model on pictures',
    'check-data': 'check the datasets of a config before a long run',
    'to-coco': "write YOLO's or Pascal VOC's labels as COCO files",
    'report': 'write the report of a training, one HTML page',
    'compare': 'compare models: sizes, speed, accuracy',
    'flops': 'count parameters and operations, module by module',
    'benchmark': 'measure time and memory of models and their forms',
    'cam': 'show where in a picture a model finds what it says',
    'receptive-field': 'measure how much each pixel counts for the centre of a layer',
    'interactions': 'measure how strongly patches of a picture interact in a classifier',
    'spectra': 'show which frequencies the mixers of a SpaRTAN let through',
    'browse': 'show what a training sees, after its augmentations',
    'curves': 'draw the curves of trainings side by side',
    'errors': 'show the worst errors of a test',
    'confusion': 'draw the confusion matrix of a test',
    'convert': "convert the originals' checkpoints to ours, and back",
    'publish': 'make a checkpoint fit to be given away',
    'prune': 'leave out of a trained model what matters least',
    'deploy': 'write a checkpoint in the form for inference',
    'export': 'write a model for other runtimes: ONNX, OpenVINO, TensorRT and more',
    'replay': 'run a batch once more that stopped a training by a NaN',
    'list': 'list the models by name',
}


class Parser(argparse.ArgumentParser):
    """A parser whose flags of many values take those that fit, and leave what follows.

    NOTE: argparse's own gives both words of `--size 640 CONFIG` to the flag.
    """

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:
        words, last, place = [*(sys.argv[1:] if args is None else args)], [], 0
        rest = words[words.index('--'):] if '--' in words else []
        del words[len(words) - len(rest):]
        while place < len(words):
            action, end = self._option_string_actions.get(words[place]), place + 1
            while end < len(words) and action and _fits(action, words[end]):
                end += 1
            if end == place + 1:
                place += 1
                continue
            # At the end nothing follows.
            last += words[place:end]
            del words[place:end]
        return super().parse_known_args([*words, *last, *rest], namespace)

    def error(self, message: str) -> NoReturn:
        super().error(printable(message))


def _fits(action: argparse.Action, word: str) -> bool:
    """Whether a word is surely a value of a flag that takes many."""
    if action.nargs != '+':
        return False
    if action.choices is not None:
        return word in action.choices
    if action.type is None:
        return '=' in word and '=' in str(action.metavar)
    try:
        action.type(word)
        return True
    except (ValueError, argparse.ArgumentTypeError):
        return False


def make_parser(command: str) -> argparse.ArgumentParser:
    """The parser of one command; its module alone is imported."""
    module = import_module(f'.commands.{command.replace("-", "_")}', __package__)
    parser = Parser(
        prog=f'spartan-mm {command}', description=module.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    module.add_arguments(parser)
    parser.set_defaults(run=module.run, parser=parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        argv: The command's name and its flags; None for those of the process.

    Returns:
        The status: 0, 1 if the command found faults, 2 if flags do not go together or with the
        config. Other errors, those of argparse included, leave by SystemExit.
    """
    argv = [*(sys.argv[1:] if argv is None else argv)]
    parser = Parser(
        prog='spartan-mm', usage='%(prog)s COMMAND ...', add_help=False,
        description=make_overview(), formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('-h', '--help', action='help', help=argparse.SUPPRESS)
    parser.add_argument('--version', action='version', version=__version__,
                        help=argparse.SUPPRESS)
    parser.add_argument('command', choices=COMMANDS, metavar='COMMAND', help=argparse.SUPPRESS)
    # Whatever is printed, no encoding fails on it.
    for stream in (sys.stdout, sys.stderr):
        getattr(stream, 'reconfigure', dict)(errors='backslashreplace')
    command = parser.parse_args(argv[:1] or ['--help']).command
    try:
        return _run(command, argv[1:])
    except KeyboardInterrupt:
        print('stopped by Ctrl-C', file=sys.stderr)
        return 130


def make_overview() -> str:
    """Every command in a line."""
    width = max(map(len, COMMANDS))
    lines = [f'  {name:{width}}  {text}' for name, text in COMMANDS.items()]
    return '\n'.join(['SpaRTAN and RT-DETR for OpenMMLab.', '', *lines, '',
                      'spartan-mm COMMAND --help shows an example and the flags.'])


def _run(command: str, flags: Sequence[str]) -> int:
    # These imports take seconds, in which Ctrl-C may come.
    from mmengine.dist import get_world_size

    from .engine.launch import reporting
    with reporting():
        args = make_parser(command).parse_args(flags, argparse.Namespace(words=flags))
        try:
            return args.run(args) or 0
        except UsageError as error:
            if get_world_size() > 1:
                raise  # The other processes have to end, too.
            print(f'error: {error}', file=sys.stderr)
            return 2


if __name__ == '__main__':
    sys.exit(main())
