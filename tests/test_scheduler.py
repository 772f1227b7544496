"""Requests and slots: random schedules, order, ranges."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxchat.config import UserError
from jaxchat.infer.scheduler import Request, Scheduler, bucket

ACTIONS = st.one_of(
    st.tuples(st.just("submit"), st.integers(1, 40), st.integers(1, 9)),
    st.tuples(st.just("step"), st.booleans(), st.integers(1, 4)),
    st.tuples(st.just("cancel"), st.integers(0, 30), st.just(0)),
)


@settings(max_examples=1000)
@given(st.lists(ACTIONS, max_size=40), st.integers(1, 3), st.integers(1, 5), st.integers(1, 3))
def test_any_schedule_ends_every_request_once(actions, devices, slots, prefill_batch):
    """No slot is lost or given twice, those that came first begin first, and all that was asked for ends once."""
    scheduler = Scheduler(64, slots=slots, prefill_batch=prefill_batch, devices=devices)
    left, ended, begun, cancelled = {}, [], [], set()

    def step(full_batches, tokens):
        while ids := scheduler.admit(full_batches):
            begun.extend(ids)
            per_device = [scheduler.slot_of[id] // slots for id in ids]
            assert all(per_device.count(device) <= prefill_batch for device in per_device)
            assert len({scheduler.padded_length(scheduler.running[id]) for id in ids}) == 1
        assert len({*scheduler.slot_of.values()}) == len(scheduler.slot_of)
        assert scheduler.slot_of.keys() == scheduler.running.keys() and not scheduler.running.keys() & scheduler.waiting
        assert all(0 <= slot < devices * slots for slot in scheduler.slot_of.values())
        assert scheduler.running or not scheduler.waiting  # never stuck
        if not full_batches and scheduler.waiting:
            assert len(scheduler.running) == devices * slots
        for id in [*scheduler.running]:
            left[id] -= tokens
            if left[id] <= 0:
                assert scheduler.remove(id) and not scheduler.remove(id)
                ended.append(id)

    for action, first, second in actions:
        if action == "submit":
            id = scheduler.submit(Request([7] * first, second))
            assert id not in left
            left[id] = second
        elif action == "step":
            step(first, second)
        elif scheduler.remove(first):
            cancelled.add(first)
            ended.append(first)
    while scheduler.waiting or scheduler.running:
        step(True, 1)
    assert sorted(ended) == sorted(left) and begun == sorted(begun)
    assert {*begun} >= left.keys() - cancelled
    assert not scheduler.slot_of  # nothing is kept of what has ended


def test_devices_share_the_rows():
    scheduler = Scheduler(64, slots=4, prefill_batch=2, devices=3)
    for _ in range(7):
        scheduler.submit(Request([1], 1))
    scheduler.admit(), scheduler.admit()
    assert sorted(slot // 4 for slot in scheduler.slot_of.values()) == [0, 0, 0, 1, 1, 2, 2]


def test_patience_waits_for_a_whole_batch():
    scheduler = Scheduler(64, slots=4, prefill_batch=2)
    ids = [scheduler.submit(Request([1], 1)) for _ in range(6)]
    assert scheduler.admit(True) == ids[:2] and scheduler.admit(True) == ids[2:4] and scheduler.admit(True) == []
    scheduler.remove(ids[0])
    assert scheduler.admit(True) == []
    scheduler.remove(ids[5])
    assert scheduler.admit(True) == [ids[4]]  # all that waits


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": -0.1}, {"temperature": float("nan")}, {"temperature": 1e300}, {"top_k": -1},
        {"top_p": 0.0}, {"top_p": 1.1}, {"min_p": -0.1}, {"min_p": 1.5}, {"seed": -1}, {"seed": 2**32}, {"sample": -1},
        {"max_tokens": -1}, {"min_tokens": -1}, {"logprobs": 21}, {"logprobs": -1}, {"prompt_logprobs": True},
        {"stop_tokens": [1] * 7}, {"stop_tokens": [-1]}, {"stop_tokens": [2**40]}, {"stop_tokens": [1.0]},
        {"max_tokens": 1.5}, {"max_tokens": True}, {"top_k": 2.0}, {"top_p": "1"}, {"logprobs": True},
    ],
)  # fmt: skip
def test_settings_out_of_range(settings):
    Request(**({"prompt": [1], "max_tokens": 1, "seed": 2**32 - 1, "logprobs": 20, "top_p": 1.0, "top_k": 0}))
    with pytest.raises(UserError, match=r"must be|needs|at most"):
        Request(**({"prompt": [1], "max_tokens": 1} | settings))


def test_prompts_out_of_range():
    for length in (0, 65):
        with pytest.raises(UserError, match="1 to 64"):
            Scheduler(64, slots=1, prefill_batch=1).submit(Request([1] * length, 1))


def test_buckets():
    assert [bucket(n, 16, 100) for n in (1, 16, 17, 64, 65, 100)] == [16, 16, 32, 64, 100, 100]
