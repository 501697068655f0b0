"""The process that serves: its socket, its signals, and clients that say nothing."""
import asyncio
import io
import socket
from typing import Any

import h11
from PIL import Image

from ..errors import UsageError
from ..requirements import require
from ..text import count
from .app import make_app
from .batching import Batcher
from .limits import Limits
from .models import ServedModel

require('uvicorn', '0.25', 'web')

import uvicorn  # noqa: E402
from uvicorn.protocols.http.h11_impl import H11Protocol  # noqa: E402

#: How long, in seconds, the head of a request may take.
HEAD_SECONDS = 10.


class _Protocol(H11Protocol):
    """HTTP that closes connections on which no whole head of a request comes in time.

    NOTE: uvicorn's own waits for ever, and every connection is a file that is open.
    """

    _deadline = 0.

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        self._deadline = self.loop.time() + HEAD_SECONDS
        self._close_in_time()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.conn.their_state is h11.IDLE and not self.transport.is_closing():
            self._close_in_time()

    def on_response_complete(self) -> None:
        self._deadline = self.loop.time() + HEAD_SECONDS
        super().on_response_complete()

    def _close_in_time(self) -> None:
        # The timer that uvicorn stops when data come.
        self.timeout_keep_alive_task = self.loop.call_at(
            self._deadline, self.timeout_keep_alive_handler)


class _Server(uvicorn.Server):
    """Stops at a signal when what is in work is done, at a second one at once."""

    def __init__(self, config: uvicorn.Config, batcher: Batcher, ready: str) -> None:
        super().__init__(config)
        self._batcher, self._ready = batcher, ready
        self._loop: asyncio.AbstractEventLoop | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)
        print(self._ready, flush=True)

    # NOTE: without uvicorn's own, which kills the process in the end by the signal.
    def handle_exit(self, sig: int, frame: Any) -> None:
        self.force_exit = self.should_exit
        self.should_exit = True
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._batcher.stopping.set)


def bind(host: str, port: int) -> socket.socket:
    """Take a port, on which nobody is listened to yet.

    Args:
        host: A name or an address of this machine.
        port: 0 for any that is free.

    Raises:
        UsageError: It cannot be had.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        taken = socket.socket(family, kind, protocol)
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        taken.bind(address)
    except (OSError, OverflowError, UnicodeError) as error:
        raise UsageError(f'port {port} of {host} cannot be had: '
                         f'{getattr(error, "strerror", None) or error}; take another --host or '
                         '--port') from error
    return taken


def serve(model: ServedModel, taken: socket.socket, limits: Limits, score_threshold: float = 0.3,
          top: int = 5) -> None:
    """Serve until SIGTERM or Ctrl-C.

    Args:
        model: What is served.
        taken: Where, see :func:`bind`.
        limits: See there.
        score_threshold: The least score of a detection, unless a request says otherwise.
        top: Number of classes of a classifier, unless a request says otherwise.

    Raises:
        InputError: The model does not run.
    """
    batcher, blank = Batcher(model, limits), io.BytesIO()
    Image.new('RGB', (640, 640)).save(blank, 'PNG')
    batcher.warm_up(blank.getvalue())
    host, port = taken.getsockname()[:2]
    classes = f', {count(len(model.classes), "class")}' if model.classes else ''
    ready = (f'{model.name} ({model.task}{classes}) is served at http://'
             f'{f"[{host}]" if ":" in host else host}:{port}/predict; Ctrl-C stops it')
    config = uvicorn.Config(
        make_app(batcher, score_threshold, top), http=_Protocol, ws='none', lifespan='on',
        log_config=None, log_level='error', access_log=False, server_header=False,
        timeout_graceful_shutdown=round(limits.seconds) + 1)
    _Server(config, batcher, ready).run(sockets=[taken])
    print('stopped', flush=True)
