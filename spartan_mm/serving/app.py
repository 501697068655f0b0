"""What a server answers: ``/predict``, ``/health``, ``/ready``, ``/metrics`` and ``/``."""
import asyncio
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Annotated, Any

from ..requirements import require
from ..text import first_line, printable
from ..version import __version__
from .batching import Batcher
from .limits import Refusal
from .metrics import Metrics

require('fastapi', '0.110', 'web')
require('python_multipart', '0.0.13', 'web')

from fastapi import FastAPI, Query, Request, Response  # noqa: E402
from fastapi.exceptions import RequestValidationError  # noqa: E402
from fastapi.responses import JSONResponse, PlainTextResponse  # noqa: E402
from starlette.exceptions import HTTPException  # noqa: E402
from starlette.formparsers import MultiPartException, MultiPartParser  # noqa: E402
from starlette.requests import ClientDisconnect  # noqa: E402

#: So many of the largest bodies may be in memory at a time.
BODIES = 32

#: Of a body that is too large, as much more is read and dropped, so that its sender can listen.
DROPPED = 8

# What is counted for clients that went away; no standard's status, but nginx's.
GONE = 499


def make_app(batcher: Batcher, score_threshold: float = 0.3, top: int = 5) -> FastAPI:
    """Make the application.

    Args:
        batcher: The model.
        score_threshold: The least score of a detection, unless a request says otherwise.
        top: Number of classes of a classifier, unless a request says otherwise.
    """
    model, limits, metrics = batcher.model, batcher.limits, Metrics()
    bodies = _Bodies(batcher)
    key = 'detections' if model.task == 'detection' else 'predictions'

    @asynccontextmanager
    async def run_batches(app: FastAPI) -> AsyncIterator[None]:
        running = asyncio.create_task(batcher.run())
        yield
        running.cancel()
        batcher.close()

    # NOTE: the pages that FastAPI makes would load scripts from elsewhere.
    app = FastAPI(title=f'spartan-mm serve {model.name}', version=__version__, docs_url=None,
                  redoc_url=None, lifespan=run_batches)
    app.add_middleware(_Measured, metrics=metrics)
    for kind, respond in _RESPONSES.items():
        app.add_exception_handler(kind, respond)

    async def answer(request: Request, **options: Any) -> Response:
        if unknown := {*request.query_params} - {*options}:
            raise Refusal(422, f'there is no parameter {min(unknown)}: {model.task} has '
                               f'{", ".join(options)}')
        try:
            async with bodies.read(request) as body:
                content = await _take_file(request, body)
                picture, found = await _race(batcher(content), _leave(request),
                                             seconds=limits.seconds)
            records = model.describe(found, **dict(dict(score=score_threshold, top=top), **options))
            # NaN cannot be written.
            return JSONResponse({'width': picture.width, 'height': picture.height, key: records})
        except ClientDisconnect:
            return Response(status_code=GONE)
        except TimeoutError:
            raise Refusal(504, f'there was no answer within {limits.seconds:g} s: try again later, '
                               'or send fewer pictures at a time') from None
        except Refusal:
            raise
        except Exception as error:  # of the model
            print(printable(f'error: {type(error).__name__}: {first_line(error)}'),
                  file=sys.stderr, flush=True)
            raise Refusal(500, f'the model fails on this picture: {first_line(error)}') from error

    # Each task has its own parameter.
    if model.task == 'detection':
        async def predict(request: Request, score: Annotated[float, Query(
                ge=0, le=1, description='least score of a detection')] = score_threshold
                ) -> Response:
            return await answer(request, score=score)
    else:
        async def predict(request: Request, top: Annotated[int, Query(
                ge=1, description='how many classes')] = top) -> Response:
            return await answer(request, top=top)
    picture = dict(schema=dict(type='string', format='binary'))
    form = dict(schema=dict(type='object', properties=dict(image=picture['schema'])))
    app.post('/predict', openapi_extra=dict(requestBody=dict(required=True, content={
        'image/*': picture, 'multipart/form-data': form})))(predict)

    @app.get('/health')
    async def check_health() -> dict[str, str]:
        return dict(status='alive')

    @app.get('/ready')
    async def check_ready() -> dict[str, str]:
        batcher.check_open()
        return dict(status='ready')

    @app.get('/metrics', response_class=PlainTextResponse)
    async def tell_metrics() -> str:
        return metrics.write(in_work=batcher.in_work, batches_total=batcher.batches,
                             pictures_total=batcher.pictures)

    @app.get('/')
    async def describe() -> dict[str, Any]:
        return dict(model=model.name, task=model.task, classes=[*model.classes],
                    limits=vars(limits), spartan_mm=__version__)

    return app


class _Bodies:
    """Reads the bodies of requests, and counts how much of them is in memory."""

    def __init__(self, batcher: Batcher) -> None:
        self._batcher, self._held = batcher, 0

    @asynccontextmanager
    async def read(self, request: Request) -> AsyncIterator[bytearray]:
        """Read a body, which is let go in the end.

        Raises:
            Refusal: It is too long or too slow, there are too many, or the server is stopping.
        """
        body, limits = bytearray(), self._batcher.limits
        try:
            try:
                await _race(self._fill(body, request), self._stop(), seconds=limits.seconds)
            except TimeoutError:
                raise Refusal(408, f'the request did not arrive within {limits.seconds:g} s: send '
                                   'a smaller picture', {'Connection': 'close'}) from None
            yield body
        finally:
            self._held -= len(body)

    async def _fill(self, body: bytearray, request: Request) -> None:
        most, length = self._batcher.limits.max_bytes, 0
        async for chunk in request.stream():
            length += len(chunk)
            if length <= most:
                if self._held + len(chunk) > BODIES * most:
                    raise Refusal(503, 'the server receives as much as it has room for: try again '
                                       'in a second', {'Retry-After': '1', 'Connection': 'close'})
                body += chunk
                self._held += len(chunk)
            elif length > DROPPED * most:
                break
        if length > most:
            raise Refusal(413, f'the request has more than {most / 2**20:g} MiB: send a smaller '
                               'picture', {'Connection': 'close'})

    async def _stop(self) -> None:
        await self._batcher.stopping.wait()
        self._batcher.check_open()


async def _take_file(request: Request, body: bytearray) -> bytes:
    """Take the picture of a body, which is the picture or a form with one file.

    Raises:
        Refusal: It is a form, and has another number of files or is none.
    """
    if not request.headers.get('content-type', '').lower().startswith('multipart/form-data'):
        return bytes(body)

    async def pieces() -> AsyncIterator[bytes]:
        for place in range(0, len(body), 2**16):
            yield bytes(body[place:place + 2**16])
            await asyncio.sleep(0)  # others have their turn

    parser = MultiPartParser(request.headers, pieces(), max_files=1, max_fields=16)
    parser.spool_max_size = len(body) + 1  # never on the disk
    try:
        form = await parser.parse()
    except (MultiPartException, KeyError) as error:
        raise Refusal(400, f'the form cannot be read: {first_line(error)}') from None
    files = [value for value in form.values() if not isinstance(value, str)]
    try:
        if not files:
            raise Refusal(400, 'the form has no file: send the picture as one, as '
                               '`curl -F image=@photo.jpg` does')
        return await files[0].read()
    finally:
        await form.close()


async def _leave(request: Request) -> None:
    """Wait until a client goes away."""
    while (await request.receive())['type'] != 'http.disconnect':
        pass
    raise ClientDisconnect


async def _race(work: Awaitable[Any], guard: Awaitable[None], seconds: float) -> Any:
    """Wait for some work, unless time is up or a guard raises first.

    Raises:
        TimeoutError: Time is up.
    """
    tasks = [asyncio.ensure_future(each) for each in (work, guard)]
    try:
        done, _ = await asyncio.wait(tasks, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        if not done:
            raise TimeoutError
        return (tasks[0] if tasks[0] in done else tasks[1]).result()
    finally:
        for task in tasks:
            task.cancel()
        # What was raised at the same time is nobody's.
        await asyncio.gather(*tasks, return_exceptions=True)


class _Measured:
    """Middleware that counts the requests for predictions."""

    def __init__(self, app: Callable, metrics: Metrics) -> None:
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: dict, receive: Callable, send: Callable) -> None:
        status, start = GONE, time.perf_counter()

        async def note(message: dict) -> None:
            nonlocal status
            status = message.get('status', status)
            await send(message)

        try:
            await self._app(scope, receive, note)
        finally:
            if scope.get('path') == '/predict':
                self._metrics.add(status, time.perf_counter() - start)


def _refuse(status: int, message: str, headers: Any = None) -> JSONResponse:
    return JSONResponse(dict(error=message), status, headers)


async def _respond_to_refusal(_: Request, error: Refusal) -> JSONResponse:
    return _refuse(error.status, str(error), error.headers)


async def _respond_to_parameters(_: Request, error: RequestValidationError) -> JSONResponse:
    first = error.errors()[0]
    return _refuse(422, printable(f'{first["loc"][-1]}={first["input"]}: {first["msg"]}'))


async def _respond_to_http(request: Request, error: HTTPException) -> JSONResponse:
    return _refuse(error.status_code, printable(
        f'{request.method} {request.url.path}: {error.detail}; POST a picture to /predict, or GET '
        '/health, /ready, /metrics or /'), error.headers)


_RESPONSES = {Refusal: _respond_to_refusal, RequestValidationError: _respond_to_parameters,
              HTTPException: _respond_to_http}
