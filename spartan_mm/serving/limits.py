"""How much of a server a client gets, and what it is told beyond that."""
from dataclasses import dataclass

from ..errors import ExplainedError


@dataclass(frozen=True)
class Limits:
    """What a server takes.

    Args:
        batch_size: The most pictures in one pass through the model.
        queue: The most pictures that are in work at a time, waiting ones included.
        seconds: How long a request may take to arrive, and its answer after that.
        max_bytes: Of the body of a request.
        max_pixels: Of a picture.
    """

    batch_size: int = 8
    queue: int = 64
    seconds: float = 30.
    max_bytes: int = 16 * 2**20
    max_pixels: int = 50_000_000


class Refusal(ExplainedError):
    """A request that gets no result.

    Args:
        status: Of HTTP.
        message: What is wrong, and what to do.
        headers: More of the answer's headers.
    """

    def __init__(self, status: int, message: str, headers: dict[str, str] | None = None) -> None:
        super().__init__(message)
        self.status, self.headers = status, headers
