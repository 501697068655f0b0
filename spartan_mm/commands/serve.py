"""Serve a detector or classifier over HTTP: a picture in, boxes or classes as JSON out.

    spartan-mm serve rtdetr_spartan_t.pth
    curl --data-binary @photo.jpg http://127.0.0.1:8000/predict

Also of a form: curl -F image=@photo.jpg. GET /health, /ready and /metrics say how the server is.
Pictures that come together go through the model together. Nobody but this machine reaches it,
unless --host says so: it has neither passwords nor encryption.
"""
import ipaddress
from argparse import ArgumentParser, Namespace

from ..text import printable
from .arguments import add, positive


def add_arguments(parser: ArgumentParser) -> None:
    """Add the flags."""
    parser.add_argument('config', metavar='FILE',
                        help='a checkpoint that holds its config, as published ones do; an '
                             'exported .onnx, .xml or .tflite; or the config file or name of a '
                             'model')
    parser.add_argument('checkpoint', nargs='?', metavar='CHECKPOINT',
                        help='checkpoint file or URL, if FILE is a config')
    parser.add_argument('--host', default='127.0.0.1', metavar='HOST',
                        help='whom to listen to: 0.0.0.0 for everybody (default: %(default)s, '
                             'this machine)')
    parser.add_argument('--port', type=int, default=8000, metavar='PORT',
                        help='0 for any that is free (default: %(default)s)')
    add(parser, '--device')
    add(parser, '--match-classes')
    parser.add_argument('--threads', type=positive, metavar='N',
                        help='of the CPU that compute (default: as many as the library takes)')
    add(parser, '--score-thr')
    parser.add_argument('--top', type=positive, default=5, metavar='N',
                        help='number of classes that a classifier names (default: %(default)s)')
    add(parser, '--batch-size', default=8,
        help='the most pictures in one pass (default: %(default)s)')
    parser.add_argument('--queue', type=positive, default=64, metavar='N',
                        help='the most pictures in work; more are refused, with Retry-After '
                             '(default: %(default)s)')
    parser.add_argument('--timeout', type=positive, default=30, metavar='SECONDS',
                        help='how long a request may take to arrive, and then its answer (default: '
                             '%(default)s)')
    parser.add_argument('--max-mib', type=positive, default=16, metavar='MIB',
                        help='the largest request (default: %(default)s)')
    parser.add_argument('--max-pixels', type=positive, default=50_000_000, metavar='N',
                        help='the largest picture (default: %(default)s)')


def run(args: Namespace) -> None:
    """Load the model, and serve it."""
    from ..serving import Limits, load_served, serve
    from ..serving.server import bind
    limits = Limits(args.batch_size, args.queue, args.timeout, args.max_mib * 2**20,
                    args.max_pixels)
    with bind(args.host, args.port) as taken:
        model = load_served(args.config, args.checkpoint, args.device, args.match_classes,
                            args.threads)
        if not ipaddress.ip_address(taken.getsockname()[0].partition('%')[0]).is_loopback:
            print(printable(f'note: whoever reaches {args.host} can use this server, which has '
                            'neither passwords nor encryption'))
        serve(model, taken, limits, args.score_thr, args.top)
