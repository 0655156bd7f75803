"""Measures what larger tables cost, all models of a part in one process: `cost_case.py CASE RESULT`.

One process, so that XLA tunes a matrix product once for all models that have it. cost.py starts the processes.
"""

import itertools
import json
import pathlib
import statistics
import sys
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from memjax.config.load import load
from memjax.config.run import RunConfig
from memjax.inference.engine import Engine
from memjax.inference.programs import LONGEST_CHUNK
from memjax.inference.requests import Request
from memjax.models.counts import training_flops
from memjax.models.decoder import Decoder
from memjax.models.parts import DecoderParts

sys.path.insert(0, str(pathlib.Path(__file__).parent))
import timing
from energy import EnergyMeter
from random_table import random_model
from step_case import whole_step

Row = dict[str, Any]
Sample = tuple[float, int, float]
"""A moment in seconds, tokens of a text that were written by then, and the joules that the GPU has used."""


def of_tokens(case: Row) -> Iterator[Row]:
    """Each model's time and energy of a token, at every batch size."""
    meter = EnergyMeter.find()
    for one in case["models"]:
        config = load(RunConfig, pathlib.Path(one["preset"]), one["settings"])
        parts = DecoderParts.of(config.model)
        flops = training_flops(parts, case["prompt"]).total
        found = {"part": "tokens", "model": one["model"], "slots": slots_of(config), "FLOPs": flops}
        model = random_model(parts, None, None)
        for batch in case["batches"]:
            yield found | {"batch": batch} | timing.attempt(lambda: token_row(model, case, batch, meter))  # noqa: B023
        del model


def token_row(model: Decoder, case: Row, batch: int, meter: EnergyMeter | None) -> Row:
    """The median chunk's time of a token, and the energy of a token after a second of work."""
    started = time.perf_counter()
    engine = engine_of(model, case, batch)
    samples_of_text(engine, case, batch, meter, LONGEST_CHUNK)
    row: Row = {"compile s": time.perf_counter() - started}
    texts, began = [], time.perf_counter()
    while not texts or time.perf_counter() - began < case["least seconds"]:
        texts.append(samples_of_text(engine, case, batch, meter, case["new"]))
    chunks = [
        (end - start) / (after - before)
        for text in texts
        for (start, before, _), (end, after, _) in itertools.pairwise(text)
    ]
    milliseconds = statistics.median(chunks) * 1e3
    row |= {"ms a token": milliseconds, "tokens/s": round(batch / milliseconds * 1e3)}
    if meter is not None:
        warm = [[sample for sample in text if sample[0] - began > case["warm seconds"]] for text in texts]
        row |= {"joules a token": energy_of_token(warm, batch), "energy by": meter.source}
        if row["joules a token"]:
            row["watts"] = row["joules a token"] * batch / milliseconds * 1e3
    return row


def engine_of(model: Decoder, case: Row, batch: int) -> Engine:
    """An engine whose cache does not grow while a text is written."""
    longest = case["prompt"] + 1 + LONGEST_CHUNK + case["new"]
    return Engine(model, num_slots=batch, prefill_rows=batch, min_capacity=1 << (longest - 1).bit_length())


def samples_of_text(engine: Engine, case: Row, batch: int, meter: EnergyMeter | None, new: int) -> list[Sample]:
    """Samples after every chunk of a batch of texts, without the first chunk."""
    prompts = np.random.default_rng(0).integers(3, case["vocab_size"], size=(batch, case["prompt"])).tolist()
    engine.insert([Request(prompt_ids=prompt, max_tokens=1 + LONGEST_CHUNK + new) for prompt in prompts])
    engine.step(0)
    engine.step(LONGEST_CHUNK)
    samples = []
    while True:
        written = len(samples) * LONGEST_CHUNK
        samples.append((time.perf_counter(), written, meter.joules() if meter else 0.0))
        if written >= new:
            return samples
        engine.step(LONGEST_CHUNK)


def energy_of_token(texts: list[list[Sample]], batch: int) -> float | None:
    """Joules a token between the counter's first and last move in each text; None where it moved too rarely."""
    joules, tokens = 0.0, 0
    for text in texts:
        moves = [later for earlier, later in itertools.pairwise(text) if later[2] != earlier[2]]
        if len(moves) > 1:
            joules += moves[-1][2] - moves[0][2]
            tokens += (moves[-1][1] - moves[0][1]) * batch
    return joules / tokens if tokens else None


def of_steps(case: Row) -> Iterator[Row]:
    """Each model's training step."""
    for one in case["models"]:
        config = load(RunConfig, pathlib.Path(one["preset"]), one["settings"])
        found = timing.attempt(lambda: whole_step(config, jax.devices()[:1], case))  # noqa: B023
        kept = {name: found[name] for name in ("tokens/s", "compile s", "note") if name in found}
        step = {"ms a step": found["ms"]} if "ms" in found else {}
        yield {"part": "steps", "model": one["model"], "slots": slots_of(config)} | step | kept


def slots_of(config: RunConfig) -> int:
    """Rows of the model's table; 0 without a memory."""
    return config.model.memory.num_slots if config.model.memory else 0


def main() -> None:
    """Writes the case's rows as JSON, and prints them, one by one."""
    case, result = json.loads(sys.argv[1]), pathlib.Path(sys.argv[2])
    rows: list[Row] = []
    for row in of_tokens(case) if case["kind"] == "tokens" else of_steps(case):
        rows.append(row)
        result.write_text(json.dumps({"rows": rows, "environment": timing.environment()}))
        print(row, flush=True)


if __name__ == "__main__":
    main()
