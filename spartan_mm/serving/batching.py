"""Pictures that come together go through the model together."""
import asyncio
import os
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from ..errors import InputError
from ..text import count, first_line
from .limits import Limits, Refusal
from .models import Prepared, ServedModel, check_picture

#: How long, in seconds, an idle model waits for a second picture.
WINDOW = 0.005

#: The most pictures that are decoded at a time, each in a thread.
READERS = min(4, os.cpu_count() or 1)


class Batcher:
    """Reads pictures in some threads and runs the model in another; counts what is in work.

    Batches have 1, 2, 4, 8 ... pictures, so that few sizes are ever compiled. A batch that fails
    goes through the model once more, picture by picture: a fault hits the one that has it.

    Args:
        model: What runs.
        limits: See there.

    Attributes:
        in_work: Pictures that are read, wait, or are in the model.
        batches: How many batches there were.
        pictures: How many pictures were in them.
        stopping: Whether new pictures are refused; an event that others may wait for.
    """

    def __init__(self, model: ServedModel, limits: Limits) -> None:
        self.model, self.limits = model, limits
        self.in_work = self.batches = self.pictures = 0
        self.stopping = asyncio.Event()
        self._most = min(limits.batch_size, model.max_batch or limits.batch_size)
        self._waiting: deque[tuple[Prepared, asyncio.Future]] = deque()
        self._arrived = asyncio.Event()
        self._readers = ThreadPoolExecutor(READERS, 'reader')
        self._runner = ThreadPoolExecutor(1, 'model')

    def warm_up(self, content: bytes) -> None:
        """Run the model on a picture in batches of every size.

        Raises:
            InputError: It fails.
        """
        size, picture = 1, self.model.prepare(content)
        while size <= self._most:
            try:
                self.model.find([picture] * size)
            except Exception as error:  # of any library
                remedy = f'; set --batch-size {size // 2}' if size > 1 else ''
                raise InputError(f'{self.model.name} fails on {count(size, "picture")} in a batch: '
                                 f'{first_line(error)}{remedy}') from error
            size *= 2

    async def __call__(self, content: bytes) -> tuple[Prepared, Any]:
        """Find what is in a picture.

        Returns:
            The picture and what the model found.

        Raises:
            Refusal: It cannot be read, there is too much in work, or the server is stopping.
        """
        self.check_open()
        if self.in_work >= self.limits.queue:
            raise Refusal(503, f'the server has {count(self.in_work, "picture")} in work, as many '
                               'as it takes: try again in a second', {'Retry-After': '1'})
        loop = asyncio.get_running_loop()
        self.in_work += 1
        # The threads' queue keeps what it was given, also when nobody waits for it any more.
        held = [content]
        del content
        try:
            picture = await loop.run_in_executor(self._readers, self._read, held)
            result = loop.create_future()
            self._waiting.append((picture, result))
            self._arrived.set()
            return picture, await result
        finally:
            held.clear()
            self.in_work -= 1

    def check_open(self) -> None:
        """Refuse, if the server is stopping."""
        if self.stopping.is_set():
            raise Refusal(503, 'the server is stopping: try again, there may be a new one',
                          {'Retry-After': '1', 'Connection': 'close'})

    async def run(self) -> None:
        """Run batches until cancelled."""
        loop = asyncio.get_running_loop()
        while True:
            await self._arrived.wait()
            if len(self._waiting) < self._most:
                await asyncio.sleep(WINDOW)
            # Those whose clients are gone are cancelled.
            jobs = [job for job in self._waiting if not job[1].done()]
            size = 1
            while 2 * size <= min(len(jobs), self._most):
                size *= 2
            batch, self._waiting = jobs[:size], deque(jobs[size:])
            if not self._waiting:
                self._arrived.clear()
            if batch:
                found = await loop.run_in_executor(
                    self._runner, self._find, [picture for picture, _ in batch])
                self.batches, self.pictures = self.batches + 1, self.pictures + len(batch)
                for (_, result), each in zip(batch, found, strict=True):
                    if not result.done():
                        (result.set_exception if isinstance(each, Exception)
                         else result.set_result)(each)

    def close(self) -> None:
        """Let the threads end when they are done with what they do."""
        for threads in (self._readers, self._runner):
            threads.shutdown(wait=False, cancel_futures=True)

    def _read(self, held: list[bytes]) -> Prepared:
        content = held.pop()
        check_picture(content, self.limits.max_pixels)
        try:
            return self.model.prepare(content)
        except ValueError as error:  # of inputs, which explain themselves
            raise Refusal(400, str(error)) from error

    def _find(self, pictures: Sequence[Prepared]) -> list[Any]:
        try:
            return self.model.find(pictures)
        except Exception as error:  # of any library; a server outlives it
            if len(pictures) == 1:
                return [error]
            return [found for picture in pictures for found in self._find([picture])]
