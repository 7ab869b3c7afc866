"""What the server counts, in Prometheus' text format (prometheus.io, "Exposition formats", version 0.0.4). No text of anyone's is in it."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Sequence

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
TO_FIRST = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)  # seconds
PER_TOKEN = (0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0, 2.5)


class Histogram:
    """How many observations lie at or below each bound, their number and their sum."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float) -> None:
        self._counts[bisect_left(self._bounds, value)] += 1
        self._sum += value

    def lines(self, name: str) -> Iterable[str]:
        total = 0
        for bound, count in zip([*map(str, self._bounds), "+Inf"], self._counts, strict=True):
            total += count
            yield f'{name}_bucket{{le="{bound}"}} {total}'
        yield f"{name}_sum {self._sum:.6f}"
        yield f"{name}_count {total}"


class Metrics:
    """Counted since the server began."""

    def __init__(self) -> None:
        self.requests: Counter[tuple[str, int]] = Counter()  # by route and status; 499 for a client that went away
        self.tokens_in = 0
        self.tokens_out = 0
        self.to_first = Histogram(TO_FIRST)
        self.per_token = Histogram(PER_TOKEN)

    def text(self, *, ready: bool, running: int, waiting: int, cache: float, restarts: int) -> str:
        """All of it, with what is so at this moment."""
        lines: list[str] = []

        def tell(name: str, kind: str, meaning: str, samples: Iterable[str]) -> None:
            lines.extend([f"# HELP {name} {meaning}", f"# TYPE {name} {kind}", *samples])

        def one(name: str, kind: str, meaning: str, value: float) -> None:
            tell(name, kind, meaning, [f"{name} {value:g}" if isinstance(value, float) else f"{name} {value}"])

        found = sorted(self.requests.items())
        samples = [f'trimtab_requests_total{{route="{route}",status="{status}"}} {count}' for (route, status), count in found]
        tell("trimtab_requests_total", "counter", "Requests answered, refused or given up.", samples)
        one("trimtab_tokens_in_total", "counter", "Tokens of prompts.", self.tokens_in)
        one("trimtab_tokens_out_total", "counter", "Tokens of answers.", self.tokens_out)
        one("trimtab_running", "gauge", "Prompts that the engine works on.", running)
        one("trimtab_waiting", "gauge", "Prompts that wait for their turn.", waiting)
        one("trimtab_cache_share", "gauge", "Share of the memory for keys and values that is taken, 0 to 1.", cache)
        one("trimtab_ready", "gauge", "1 while the engine answers.", int(ready))
        one("trimtab_engine_restarts_total", "counter", "Times that the engine was started again.", restarts)
        first, each = "trimtab_time_to_first_token_seconds", "trimtab_time_per_token_seconds"
        tell(first, "histogram", "From the whole request to the first token.", self.to_first.lines(first))
        tell(each, "histogram", "Mean time between an answer's tokens.", self.per_token.lines(each))
        return "\n".join(lines) + "\n"
