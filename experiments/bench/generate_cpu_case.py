"""Times loading a run and generating texts with whichever memjax is importable: `generate_cpu_case.py RUN RESULT`.

Started by generate_cpu.py, also with older checkouts, so it uses only what all of them have.
"""

import contextlib
import importlib
import json
import pathlib
import sys
import time
from collections.abc import Callable, Iterator

STARTED = time.perf_counter()
TOKENS = 256


def found() -> Callable[..., Iterator[int]]:
    """`generate`, from whichever module has it."""
    for module in ("inference.streaming", "inference.engine", "models.generate"):  # the last one before the engine
        with contextlib.suppress(ModuleNotFoundError):
            return importlib.import_module(f"memjax.{module}").generate
    raise ImportError("no memjax that generates")


def main() -> None:
    """Writes wall-clock and CPU seconds as JSON."""
    import memjax

    generate = found()

    def timed() -> tuple[float, float, float, float]:
        """Seconds to the first token and for all further ones, by both clocks; texts do not end early."""
        begun, busy = time.perf_counter(), time.process_time()
        tokens = generate(model, prompt, max_tokens=1 + TOKENS)
        next(tokens)
        first, first_busy = time.perf_counter(), time.process_time()
        count = sum(1 for _ in tokens)
        assert count == TOKENS, count
        return first - begun, first_busy - busy, time.perf_counter() - first, time.process_time() - first_busy

    model, _ = memjax.load(sys.argv[1])
    loaded, busy = time.perf_counter() - STARTED, time.process_time()
    prompt = list(range(3, 15))
    cold, warm = timed(), min(timed() for _ in range(3))
    result = {
        "load s": loaded,
        "load CPU s": busy,
        "first token s": cold[0],
        "first token CPU s": cold[1],
        "next text's first token ms": warm[0] * 1e3,
        "tokens/s": TOKENS / warm[2],
        "tokens/CPU s": TOKENS / warm[3],
    }
    pathlib.Path(sys.argv[2]).write_text(json.dumps(result))


if __name__ == "__main__":
    main()
