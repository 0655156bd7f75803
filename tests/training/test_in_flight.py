"""What the host knows about steps that the device is still computing."""

import jax
import jax.numpy as jnp
import pytest

from memjax.training.in_flight import InFlight, NotFinite, Step


def step(number: int, *, healthy: bool = True) -> Step:
    metrics = {"train/loss": jnp.float32(1), "train/grad_norm": jnp.float32(2), "healthy": jnp.bool_(healthy)}
    return Step(number, {}, device_metrics=metrics)


def test_the_newest_step_stays_under_way_while_the_next_is_made_ready(monkeypatch):
    in_flight = InFlight()
    in_flight.push(step(1))

    def get(_):
        raise AssertionError("the loop waits for the newest step")

    monkeypatch.setattr(jax, "device_get", get)
    assert list(in_flight.finished()) == []
    assert len(in_flight) == 1


def test_rows_come_in_order_with_what_the_host_and_the_device_know():
    in_flight = InFlight()
    for number in (1, 2):
        in_flight.push(step(number))
    late = step(3)
    late.host_metrics["eval/validation/loss"] = 0.5
    late.add({"memory/L1/used": jnp.float32(0.25)})
    in_flight.push(late)
    rows = [row for _, row in in_flight.finished(keep=0)]
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert rows[2]["eval/validation/loss"] == 0.5
    assert rows[2]["memory/L1/used"] == 0.25
    assert "healthy" not in rows[0]
    assert all(row["throughput/step_seconds"] >= 0 for row in rows)


def test_a_non_finite_step_drops_those_after_it():
    in_flight = InFlight()
    for number in (1, 2, 3):
        in_flight.push(step(number, healthy=number < 2))
    finished = in_flight.finished(keep=0)
    assert next(finished)[0].number == 1
    with pytest.raises(NotFinite, match=r"step 2: a value is not finite \(loss 1, gradient norm 2\)"):
        next(finished)
    assert len(in_flight) == 0


def test_a_step_whose_run_cannot_be_recorded_yet_keeps_its_place():
    def record() -> None:
        raise OSError(28, "No space left on device")

    in_flight = InFlight(record)
    in_flight.push(step(1))
    for _ in range(2):
        with pytest.raises(OSError, match="No space"):
            list(in_flight.finished(keep=0))
        assert len(in_flight) == 1
