"""What a server has done, in numbers."""
import statistics
from collections import Counter, deque

#: Quantiles of latencies are those of so many answers, the last ones.
LAST = 1000


class Metrics:
    """Counts requests by status, and keeps how long answers took."""

    def __init__(self) -> None:
        self.requests: Counter[int] = Counter()
        self.seconds = 0.
        self._last: deque[float] = deque(maxlen=LAST)

    def add(self, status: int, seconds: float) -> None:
        """Count a request, with the HTTP status of its answer and how long it took."""
        self.requests[status] += 1
        if status == 200:
            self.seconds += seconds
            self._last.append(seconds)

    def write(self, **numbers: float) -> str:
        """Write all, and other numbers by name, in Prometheus's text format."""
        name = 'spartan_mm_requests_total'
        lines = [f'# TYPE {name} counter', *(
            f'{name}{{status="{status}"}} {number}'
            for status, number in sorted(self.requests.items()))]
        name = 'spartan_mm_answer_seconds'
        lines.append(f'# TYPE {name} summary')
        if len(self._last) > 1:
            cuts = statistics.quantiles(self._last, n=100, method='inclusive')
            lines += [f'{name}{{quantile="{cut / 100}"}} {cuts[cut - 1]:.6f}'
                      for cut in (50, 95, 99)]
        lines += [f'{name}_sum {self.seconds:.6f}', f'{name}_count {self.requests[200]}']
        for key, number in numbers.items():
            kind = 'counter' if key.endswith('_total') else 'gauge'
            lines += [f'# TYPE spartan_mm_{key} {kind}', f'spartan_mm_{key} {number}']
        return '\n'.join(lines) + '\n'
