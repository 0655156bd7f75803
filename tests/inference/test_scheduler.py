"""Waiting prompts join the running requests in groups, where that is faster."""

import threading
import time
from collections.abc import Callable, Sequence

from memjax.inference import scheduler as scheduler_module
from memjax.inference.engine import Engine
from memjax.inference.requests import Made, Request
from memjax.inference.scheduler import Scheduler, Ticket, Update, batches


def test_prompts_of_one_padded_length_are_read_together_and_one_or_two_alone():
    lengths = [20, 100, 21, 22, 101, 23, 24, 20, 20, 17, 30]
    found = batches(lengths, rows=4)
    assert found == [[0, 2, 3, 5], [6, 7, 8, 9], [10], [1], [4]]
    assert batches(lengths[:9], rows=4) == [[0, 2, 3, 5], [6, 7, 8], [1], [4]]
    assert batches([], rows=4) == []


class Scripted(Engine):
    """An engine without a model that records its calls; requests get `num_tokens` tokens, odd ones a single one."""

    def __init__(self, num_slots: int = 8, num_tokens: int = 3) -> None:
        self.num_slots, self.num_tokens = num_slots, num_tokens
        self.calls: list[str] = []
        self.during_insert: Callable[[], object] = lambda: None
        self.left: dict[int, int] = {}
        self.fresh: list[int] = []

    def insert(self, requests: Sequence[Request], *, prefill_rows: int | None = None) -> list[int]:
        self.calls.append(f"read {len(requests)} in {prefill_rows}")
        slots = [slot for slot in range(self.num_slots) if slot not in self.left][: len(requests)]
        for slot, request in zip(slots, requests, strict=True):
            self.left[slot] = 1 if request.number % 2 else self.num_tokens
        self.fresh += slots
        hook, self.during_insert = self.during_insert, lambda: None
        hook()
        return slots

    def tokens_left(self) -> list[int]:
        return list(self.left.values())

    def release(self, slot: int) -> None:
        self.calls.append(f"release {slot}")
        del self.left[slot]

    def reset(self) -> None:
        self.calls.append("reset")
        self.left, self.fresh = {}, []

    def step(self, max_tokens: int) -> dict[int, Made]:
        self.calls.append(f"write {max_tokens}")
        found, self.fresh = {slot: Made([]) for slot in self.left if max_tokens or slot in self.fresh}, []
        for slot, made in found.items():
            self.left[slot] -= 1
            made.tokens = [7]
            if not self.left[slot]:
                del self.left[slot]
                made.finish = "length"
        return found


def ticket(number: int = 0) -> Ticket:
    return Ticket(request=Request(prompt_ids=[1], max_tokens=3, number=number))


def calls_until_all_end(
    first: list[Ticket], meanwhile: list[Ticket], num_slots: int = 8
) -> tuple[list[str], list[list[Ticket]]]:
    """Runs the tickets to their end; returns the engine's calls and the tickets of each round of updates."""
    engine, handed_out, num_left, ended = Scripted(num_slots), [], len(first) + len(meanwhile), threading.Event()

    def listen(updates: list) -> None:
        nonlocal num_left
        handed_out.append([ticket for ticket, _ in updates])
        num_left -= sum(update.is_last for _, update in updates)
        if not num_left:
            ended.set()

    scheduler = Scheduler(engine, listen, max_waiting=99)
    if meanwhile:
        engine.during_insert = lambda: scheduler.submit(meanwhile)
    scheduler.submit(first)
    scheduler.start()
    assert ended.wait(30)
    assert scheduler.stop(30.0)
    return engine.calls, handed_out


def test_prompts_that_come_while_others_are_read_join_before_the_next_tokens_if_they_are_enough(monkeypatch):
    # Nine requests run: they pause again for two more prompts, but not for one.
    monkeypatch.setattr(scheduler_module, "_READ_AFTER_SECONDS", 3600.0)
    first = [ticket() for _ in range(9)]
    calls, _ = calls_until_all_end(first, [ticket(), ticket()], num_slots=16)
    assert calls[:7] == ["read 8 in 8", "read 1 in 1", "write 0", "read 1 in 1", "read 1 in 1", "write 0", "write 1"]
    calls, _ = calls_until_all_end(first, [ticket()], num_slots=16)
    assert calls[:4] == ["read 8 in 8", "read 1 in 1", "write 0", "write 1"]
    assert calls.count("read 1 in 1") == 2


def test_a_single_prompt_waits_only_for_a_moment():
    engine = Scripted(num_slots=16, num_tokens=10**9)
    scheduler, updates, _ = scheduler_with(engine, 0)
    scheduler.submit([ticket() for _ in range(9)])
    scheduler.start()
    deadline = time.monotonic() + 30
    while not updates and time.monotonic() < deadline:
        time.sleep(0.001)
    late = ticket()
    scheduler.submit([late])
    while not any(one is late for one, _ in updates) and time.monotonic() < deadline:
        time.sleep(0.001)
    assert scheduler.stop(30.0)
    assert any(one is late for one, _ in updates)
    assert len(engine.tokens_left()) == 10, "no request had ended"


def test_running_texts_continue_between_prompts_that_are_only_scored(monkeypatch):
    monkeypatch.setattr(scheduler_module, "_CHUNK_SECONDS", 0.05)
    engine, enough = Scripted(num_tokens=10**9), threading.Event()

    def scored() -> Ticket:
        return Ticket(request=Request(prompt_ids=[1], max_tokens=0), prompt_top=0)

    def listen(updates: list[tuple[Ticket, Update]]) -> None:
        # Every scoring client asks again at once.
        for _ in [one for one, _ in updates if not one.request.max_tokens]:
            scheduler.submit([scored()])
        if sum(call not in ("read 1 in 1", "write 0") for call in engine.calls) >= 5:
            enough.set()

    # At 10 ms each, reading everything that may be read at once would take 20 s.
    scheduler = Scheduler(engine, listen, max_waiting=99, score=lambda prompt, top: time.sleep(0.01) or [])
    scheduler.submit([ticket()])
    scheduler.submit([scored()])
    scheduler.start()
    assert enough.wait(10)
    assert scheduler.stop(30.0)


def test_prompts_that_are_only_scored_wait_for_no_slot_and_no_others(monkeypatch):
    monkeypatch.setattr(scheduler_module, "_READ_AFTER_SECONDS", 3600.0)
    engine, scored = Scripted(num_tokens=10**9), Ticket(request=Request(prompt_ids=[1], max_tokens=0), prompt_top=0)
    is_scored = threading.Event()

    def listen(updates: list[tuple[Ticket, Update]]) -> None:
        if any(one is scored for one, _ in updates):
            is_scored.set()
        elif len(engine.left) == 8 and not scored.owner:
            scored.owner = "submitted"
            scheduler.submit([scored])

    scheduler = Scheduler(engine, listen, max_waiting=99, score=lambda prompt, top: [])
    scheduler.submit([ticket() for _ in range(8)])
    scheduler.start()
    assert is_scored.wait(30)
    assert scheduler.stop(30.0)


def test_tokens_are_written_up_to_the_last_end_that_is_near():
    most = []
    for left in ([100, 90], [100, 20, 31, 7], [3, 2], [100]):
        engine = Scripted(num_slots=4)
        engine.left = dict(enumerate(left))
        scheduler = Scheduler(engine, lambda updates: None, max_waiting=1)
        scheduler._running = dict.fromkeys(engine.left, ticket())
        most.append(scheduler._chunk())
    assert most == [32, 31, 8, 32]


def test_finished_texts_are_delivered_first():
    tickets = [ticket(number) for number in range(4)]
    _, handed_out = calls_until_all_end(tickets, [])
    assert handed_out[0] == [tickets[1], tickets[3], tickets[0], tickets[2]]


def scheduler_with(
    engine: Scripted, num_tickets: int
) -> tuple[Scheduler, list[tuple[Ticket, Update]], threading.Event]:
    """A scheduler, its updates, and an event that is set once so many tickets have received their last update."""
    updates: list[tuple[Ticket, Update]] = []
    ended = threading.Event()

    def listen(some: list[tuple[Ticket, Update]]) -> None:
        updates.extend(some)
        if sum(update.is_last for _, update in updates) == num_tickets:
            ended.set()

    return Scheduler(engine, listen, max_waiting=99), updates, ended


def test_nothing_is_read_or_written_any_more_after_a_stop_while_prompts_are_read():
    engine, is_reading, is_stopping = Scripted(), threading.Event(), threading.Event()
    scheduler, _, _ = scheduler_with(engine, 0)

    def during_insert() -> None:
        scheduler.submit([ticket() for _ in range(4)])
        is_reading.set()
        is_stopping.wait(30)

    engine.during_insert = during_insert
    scheduler.submit([ticket()])
    scheduler.start()
    assert is_reading.wait(30)
    assert not scheduler.stop(0.0)
    is_stopping.set()
    assert scheduler.stop(30.0)
    assert engine.calls == ["read 1 in 1", "write 0"]


def test_a_text_that_is_cancelled_while_its_prompt_is_read_gives_its_slot_back_before_more_is_written():
    engine, tickets = Scripted(), [ticket() for _ in range(3)]
    scheduler, updates, ended = scheduler_with(engine, 2)
    engine.during_insert = lambda: scheduler.cancel(tickets[1])
    scheduler.submit(tickets)
    scheduler.start()
    assert ended.wait(30)
    assert scheduler.stop(30.0)
    assert engine.calls[:3] == ["read 3 in 8", "write 0", "release 1"]
    assert [sum(one is ticket for one, _ in updates) for ticket in tickets] == [3, 1, 3]


def test_a_failure_while_prompts_are_read_reaches_each_text_that_is_lost_once_and_no_other(capsys):
    engine, lost, later = Scripted(), [ticket(), ticket()], ticket()
    scored = Ticket(request=Request(prompt_ids=[1], max_tokens=0), prompt_top=0)
    scheduler, updates, ended = scheduler_with(engine, 4)

    def during_insert() -> None:
        scheduler.submit([later])
        raise RuntimeError("RESOURCE_EXHAUSTED")

    engine.during_insert = during_insert
    scheduler.submit([scored, *lost])
    scheduler.start()
    assert ended.wait(30)
    assert scheduler.stop(30.0)
    assert scheduler.num_failures == 1
    assert engine.calls[:3] == ["read 1 in 1", "reset", "read 1 in 1"]
    ends = {id(one): update.error for one, update in updates if update.is_last}
    reason = "the device is out of memory"
    assert ends == {id(scored): None, id(lost[0]): reason, id(lost[1]): reason, id(later): None}
    assert sum(update.is_last for _, update in updates) == 4
    assert "RESOURCE_EXHAUSTED" in capsys.readouterr().err
