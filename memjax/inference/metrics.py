"""Counters, gauges and histograms of the server, in Prometheus' text format."""

import bisect
import collections
import time
from collections.abc import Callable, Sequence

_FIRST_TOKEN = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_WHOLE = (0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
_WINDOW = 10.0
"""Seconds over which the token rate is averaged."""


class Histogram:
    """Counts durations, in seconds, by upper bounds."""

    def __init__(self, bounds: Sequence[float]):
        self.bounds, self.total, self.count = tuple(bounds), 0.0, 0
        self._counts = [0] * (len(bounds) + 1)

    def add(self, seconds: float) -> None:
        self._counts[bisect.bisect_left(self.bounds, seconds)] += 1
        self.total += seconds
        self.count += 1

    @property
    def mean(self) -> float:
        """Mean duration; 0 if there are none."""
        return self.total / self.count if self.count else 0.0

    def lines(self, name: str) -> list[str]:
        """The samples in Prometheus' text format."""
        found, so_far = [], 0
        for bound, count in zip([*map(str, self.bounds), "+Inf"], self._counts, strict=True):
            so_far += count
            found.append(f'{name}_bucket{{le="{bound}"}} {so_far}')
        return [*found, f"{name}_sum {self.total:.6f}", f"{name}_count {self.count}"]


class Metrics:
    """Counters of a server; not thread-safe, used only on its event loop."""

    def __init__(self) -> None:
        self.codes: collections.Counter[int] = collections.Counter()
        """Responses by status; 499: the client hung up."""
        self.prompt_tokens = 0
        self.reused_tokens = 0
        self.generated_tokens = 0
        self.first_token = Histogram(_FIRST_TOKEN)
        self.whole_request = Histogram(_WHOLE)
        self._recent: collections.deque[tuple[float, int]] = collections.deque()
        self._gauges: list[tuple[str, str, Callable[[], float]]] = []

    def gauge(self, name: str, help_text: str, value: Callable[[], float]) -> None:
        """Adds a gauge; `value` is called whenever the metrics are read."""
        self._gauges.append((name, help_text, value))

    def add_tokens(self, count: int) -> None:
        """Counts generated tokens."""
        self.generated_tokens += count
        self._recent.append((time.monotonic(), count))
        self._forget()

    @property
    def tokens_per_second(self) -> float:
        """Generated tokens per second over the last `_WINDOW` seconds."""
        self._forget()
        return sum(count for _, count in self._recent) / _WINDOW

    def _forget(self) -> None:
        while self._recent and self._recent[0][0] < time.monotonic() - _WINDOW:
            self._recent.popleft()

    def text(self) -> str:
        """All metrics in Prometheus' text format."""
        lines: list[str] = []

        def add(name: str, kind: str, help_text: str, samples: list[str]) -> None:
            lines.extend([f"# HELP {name} {help_text}", f"# TYPE {name} {kind}", *samples])

        name = "memjax_requests_total"
        by_code = [f'{name}{{code="{code}"}} {count}' for code, count in sorted(self.codes.items())]
        add(name, "counter", "Responses by status; 499: the client hung up.", by_code)
        for name, help_text, count in (
            ("memjax_prompt_tokens_total", "Prompt tokens.", self.prompt_tokens),
            ("memjax_reused_prompt_tokens_total", "Prompt tokens copied from the cache.", self.reused_tokens),
            ("memjax_generated_tokens_total", "Generated tokens.", self.generated_tokens),
        ):
            add(name, "counter", help_text, [f"{name} {count}"])
        rate = (
            "memjax_tokens_per_second",
            "Generated tokens per second, over the last 10 seconds.",
            lambda: self.tokens_per_second,
        )
        for name, help_text, value in [*self._gauges, rate]:
            add(name, "gauge", help_text, [f"{name} {value():g}"])
        for name, help_text, histogram in (
            ("memjax_time_to_first_token_seconds", "Time from a request to its first token.", self.first_token),
            ("memjax_request_seconds", "Time from a request to the end of its response.", self.whole_request),
        ):
            add(name, "histogram", help_text, histogram.lines(name))
        return "\n".join(lines) + "\n"
