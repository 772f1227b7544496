"""Packing and padding: every token once or counted as cut, targets one ahead, weights in their place, exact state."""

import json

import numpy as np
import pytest
from conftest import THOROUGH
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxchat.config import UserError
from jaxchat.data import pipelines
from jaxchat.data.conversations import ConversationRows, best_fit, length_buckets
from jaxchat.data.order import STREAMS, Division, Order
from jaxchat.data.packing import BUFFER, CroppedBestFit
from jaxchat.data.streams import PackedRows

ARRAYS = ("inputs", "targets", "weights", "segments")


def documents(lengths):
    """Documents whose tokens are all different: 1, 2, 3, …"""
    ends = np.cumsum([1, *lengths])
    return [np.arange(a, b, dtype=np.int32) for a, b in zip(ends, ends[1:], strict=False)]


def reading(docs):
    return lambda rows: [(docs[i], np.ones(len(docs[i]), np.int32)) for i in rows]


def packed(docs, rows, time, *, micro_batches=1, blocks=None, **how):
    division = Division(Order(blocks or [len(docs)], seed=1), rows)
    return PackedRows(reading(docs), division, micro_batches=micro_batches, time=time, **how)


def flat(batch):
    """The batch's arrays with the rows in the order that they were made in, [A·B, …]."""
    return {k: batch[k].swapaxes(0, 1).reshape(-1, batch[k].shape[-1]) for k in ARRAYS if k in batch}


def total(batch, name):
    return int(batch["totals"][name].sum())


def one_pass(dataset):
    batches = []
    for batch in dataset:
        batches.append(batch)
        if not total(batch, "left"):
            return batches


def assert_same(got, want):
    assert got.keys() == want.keys()
    for name in got.keys() - {"totals"}:
        np.testing.assert_array_equal(got[name], want[name], strict=True)
    for name in want["totals"]:
        np.testing.assert_array_equal(got["totals"][name], want["totals"][name])


def assert_resumes(dataset, steps, at):
    """Set to the state before batch `at`, through JSON, a fresh iterator gives the very batches from there on."""
    batches, states, seen = iter(dataset), [], []
    for _ in range(steps):
        states.append(json.dumps(batches.get_state()))
        seen.append(next(batches))
    resumed = iter(dataset)
    next(resumed)  # one that is under way can be set too
    resumed.set_state(json.loads(states[at]))
    for want in seen[at:]:
        assert_same(next(resumed), want)


LENGTHS = [3, 0, 11, 1, 2, 0, 7, 30, 1, 1, 5, 4, 0, 9, 2]
FEW = settings(max_examples=100 if THOROUGH else 40)
some_lengths = st.lists(st.integers(0, 40), min_size=1, max_size=60).filter(lambda lengths: sum(lengths) > 1)


@FEW
@given(some_lengths, st.sampled_from([1, 2, 3, 8, 34]), st.integers(1, 12), st.data())
def test_one_pass_supervises_every_token_once(lengths, rows, time, data):
    """Each stream's rows, one after the other, are its documents one after the other; the streams are all of them."""
    docs = documents(lengths)
    dataset = packed(docs, rows, time, once=True)
    division, batches = dataset.division, one_pass(dataset)
    assert sorted(division.index(s, i) for s in range(division.streams) for i in range(division.size(s))) == list(
        range(len(docs))
    )
    for s in range(division.streams):
        stream = np.concatenate([docs[division.index(s, i)] for i in range(division.size(s))])
        mine = slice(s * division.rows_per_stream, (s + 1) * division.rows_per_stream)
        inputs, targets, weights = (np.concatenate([flat(b)[k][mine].ravel() for b in batches]) for k in ARRAYS[:3])
        count = max(0, len(stream) - 1)
        assert inputs[:count].tolist() == stream[:count].tolist() and targets[:count].tolist() == stream[1:].tolist()
        assert weights.tolist() == [1.0] * count + [0.0] * (len(weights) - count)
    for batch in map(flat, batches):
        inside = batch["weights"][:, 1:] > 0
        np.testing.assert_array_equal(batch["inputs"][:, 1:][inside], batch["targets"][:, :-1][inside])
    taken = [total(batch, "taken") for batch in batches]
    assert taken[0] == 0 and taken == sorted(taken)
    assert sum(total(batch, "targets") for batch in batches) == sum(b["weights"].sum() for b in batches)
    if division.streams == 1:
        assert total(batches[-1], "empty_documents") <= lengths.count(0)
    assert_resumes(dataset, len(batches), data.draw(st.integers(0, len(batches) - 1)))
    after = iter(dataset)
    for _ in batches:
        next(after)
    assert not next(after)["weights"].any()  # what follows changes nothing


@FEW
@given(some_lengths, st.sampled_from([1, 2, 6]), st.integers(1, 12), st.integers(0, 7))
def test_endless_packing_goes_on_into_the_next_epoch(lengths, rows, time, at):
    docs = documents([n + 1 for n in lengths])
    dataset = packed(docs, rows, time)
    batches = iter(dataset)
    seen = [flat(next(batches)) for _ in range(8)]
    division = dataset.division
    for s in range(division.streams):
        mine = slice(s * division.rows_per_stream, (s + 1) * division.rows_per_stream)
        got = np.concatenate([b["targets"][mine].ravel() for b in seen])
        stream = np.concatenate([docs[division.index(s, i)] for i in range(len(got) + 2)])
        assert got.tolist() == stream[1 : 1 + len(got)].tolist() and all(b["weights"].all() for b in seen)
    assert_resumes(dataset, 8, at)


@FEW
@given(some_lengths, st.sampled_from([1, 4]), st.integers(2, 30), st.integers(0, 5))
def test_best_fit_against_a_plain_one(lengths, rows, time, at):
    """Row after row from a buffer in plain lists: the same tokens in the same rows, and the dropped are counted."""
    docs = documents([n + 1 for n in lengths])
    dataset = packed(docs, rows, time, packing="bos_bestfit")
    division, batches = dataset.division, iter(dataset)
    seen = [next(batches) for _ in range(6)]

    def cost(doc):
        return min(len(doc), time + 1)  # one that no row could hold takes a whole one

    for s in range(division.streams):
        buffer, place, dropped, wanted = [], 0, 0, []
        for _ in range(6 * division.rows_per_stream):
            row, segments = [], []
            while len(row) < time + 1:
                while len(buffer) < BUFFER:
                    buffer.append(docs[division.index(s, place)].tolist())
                    place += 1
                room = time + 1 - len(row)
                fitting = [doc for doc in buffer if cost(doc) <= room]
                doc = max(fitting, key=cost) if fitting else min(buffer, key=cost)
                buffer.pop(next(i for i, other in enumerate(buffer) if other is doc))
                dropped += max(0, len(doc) - room)
                segments += [segments[-1] + 1 if segments else 1] * len(doc[:room])
                row += doc[:room]
            wanted.append((row, segments))
        mine = slice(s * division.rows_per_stream, (s + 1) * division.rows_per_stream)
        got = [np.concatenate([flat(b)[k][mine] for b in seen]).tolist() for k in ("inputs", "targets", "segments")]
        assert got[0] == [row[:-1] for row, _ in wanted] and got[1] == [row[1:] for row, _ in wanted]
        assert got[2] == [segments[:-1] for _, segments in wanted]
        assert sum(b["totals"]["cut_tokens"].swapaxes(0, 1).ravel()[mine].sum() for b in seen) == dropped
    assert all(batch["weights"].all() for batch in seen)
    assert_resumes(dataset, 6, at)


def test_nanochats_packing_against_a_plain_one(monkeypatch):
    """nanochat's rule in plain lists: the longest that fits, else the shortest is cut; all tokens are seen by all."""
    monkeypatch.setattr(CroppedBestFit, "buffer", 20)
    docs, time = documents([3, 9, 40, 5, 17, 2, 18, 6, 11, 4, 30, 8, 13] * 3), 16
    dataset = packed(docs, 2, time, packing="nanochat")
    batches = iter(dataset)
    seen = [next(batches) for _ in range(40)]
    for s in range(2):
        buffer, place, dropped, wanted = [], 0, 0, []
        for _ in range(40):
            row = []
            while len(row) < time + 1:
                while len(buffer) < 20:
                    buffer.append(docs[dataset.division.index(s, place)].tolist())
                    place += 1
                room = time + 1 - len(row)
                fitting = [doc for doc in buffer if len(doc) <= room]
                doc = max(fitting, key=len) if fitting else min(buffer, key=len)
                buffer.pop(next(i for i, other in enumerate(buffer) if other is doc))
                row, dropped = row + doc[:room], dropped + max(0, len(doc) - room)
            wanted.append(row)
        assert [flat(b)["inputs"][s].tolist() for b in seen] == [row[:-1] for row in wanted]
        assert [flat(b)["targets"][s].tolist() for b in seen] == [row[1:] for row in wanted]
        assert sum(b["totals"]["cut_tokens"].ravel()[s] for b in seen) == dropped > 0
    assert all(b["weights"].all() and "segments" not in b for b in seen)
    assert_resumes(dataset, 6, 3)


def test_best_fit_leaves_out_empty_documents_and_its_state_stays_small():
    docs = documents([0, 3, 0, 5, 9] * 40)
    dataset = packed(docs, 32, 16, packing="bos_bestfit")
    batches = iter(dataset)
    for _ in range(20):
        batch = next(batches)
    assert total(batch, "empty_documents") > 16 and dataset.division.streams == STREAMS
    assert len(json.dumps(batches.get_state())) < 16 * 1024


def test_best_fit_lets_no_long_document_wait_for_ever():
    """A tenth of the documents are longer than any row: they must not come to fill the buffer."""
    docs = documents(([5, 3, 9, 4, 12, 2, 7, 6, 3] * 10 + [60] * 10) * 30)
    dataset = packed(docs, 4, 16, packing="bos_bestfit")
    batches = iter(dataset)
    for _ in range(300):
        next(batches)
        for stream, (_, _, *waiting) in batches.get_state().items():
            too_long = sum(len(docs[dataset.division.index(int(stream), place)]) > 17 for place in waiting)
            assert too_long < BUFFER / 2


@pytest.mark.parametrize("packing", ["stream", "bos_bestfit"])
@pytest.mark.parametrize("micro_batches, processes", [(2, 1), (1, 2), (2, 3), (4, 3), (1, 12), (12, 1)])
def test_batches_do_not_depend_on_the_split(packing, micro_batches, processes):
    """12 rows, from streams of 1 row (of many documents) or 3 (of 4): split into micro-batches and processes."""
    for docs in (documents(range(1, 90)), documents([5, 9, 2, 4])):
        whole = iter(packed(docs, 12, 8, packing=packing))
        micro_rows = 12 // micro_batches
        bounds = np.linspace(0, micro_rows, processes + 1).astype(int)
        if micro_rows % processes:
            continue
        shares = [
            iter(packed(docs, 12, 8, packing=packing, micro_batches=micro_batches, share=(int(a), int(b))))
            for a, b in zip(bounds, bounds[1:], strict=False)
        ]
        for _ in range(6):
            want, parts = next(whole), [next(share) for share in shares]
            got = {k: np.concatenate([part[k] for part in parts], axis=1) for k in want.keys() - {"totals"}}
            assert got["inputs"].shape == (micro_batches, micro_rows, 8)
            for name, array in flat(got).items():
                np.testing.assert_array_equal(array, flat(want)[name])
            for name in want["totals"]:
                assert sum(total(part, name) for part in parts) == total(want, name)


def test_state_of_another_number_of_streams_is_refused():
    docs = documents(LENGTHS)
    batches = iter(packed(docs, 2, 6))
    next(batches)
    with pytest.raises(ValueError, match="2 streams for a step of 4"):
        iter(packed(docs, 4, 6)).set_state(batches.get_state())


def test_only_empty_documents_do_not_hang():
    with pytest.raises(UserError, match="documents read are empty"):
        next(iter(packed(documents([0, 0, 0]), 1, 4)))
    with pytest.raises(UserError, match="documents read are empty"):
        next(iter(packed(documents([0, 0, 0]), 1, 4, packing="bos_bestfit")))
    assert total(next(iter(packed(documents([0, 0, 0]), 1, 4, once=True))), "targets") == 0


@given(st.lists(st.integers(1, 20), max_size=30), st.integers(20, 30))
def test_best_fit_places_do_not_overlap(lengths, room):
    taken = set()
    for (row, start), length in zip(best_fit(lengths, room), lengths, strict=True):
        tokens = {(row, start + i) for i in range(length)}
        assert start + length <= room and not tokens & taken
        taken |= tokens
    rows = {row for row, _ in taken}
    assert len(rows) <= max(1, 2 * sum(lengths) / room + 1)  # no two rows could be one


def conversations(lengths):
    """(ids, mask) of conversations: different tokens, a mask that is 0 at first and then mixed."""
    random = np.random.default_rng(0)
    return [(ids, random.integers(0, 2, len(ids)) * (np.arange(len(ids)) > 0)) for ids in documents(lengths)]


some_conversations = st.lists(st.integers(2, 90), min_size=1, max_size=25)


@given(some_conversations, st.booleans(), st.integers(1, 8), st.sampled_from([1, 2, 4]), st.sampled_from([40, 64, 100]))
def test_every_conversation_is_in_a_row_or_counted_as_cut(lengths, pack, steps_of, micro_rows, time):
    """Its tokens stand side by side, alone in their segment, weighted by its mask; all else has weight 0."""
    found = conversations(lengths)
    examples = steps_of * micro_rows
    order = Order([len(found)], seed=2)
    how = {"examples": examples, "micro_rows": micro_rows, "time": time, "num_examples": len(found), "packed": pack}
    dataset = ConversationRows(lambda rows: (found[i] for i in rows), order, **how)
    batches = list(dataset)
    assert len(batches) == -(-len(found) // examples)
    for n, batch in enumerate(batches):
        rows, supervised = flat(batch), 0
        np.testing.assert_array_equal(rows["targets"][:, :-1], rows["inputs"][:, 1:])
        assert batch["inputs"].shape[1] == micro_rows and rows["inputs"].shape[1] in length_buckets(time)
        for place in range(n * examples, min((n + 1) * examples, len(found))):
            ids, mask = (a[: time + 1] for a in found[order.index(place)])
            tokens = np.concatenate([rows["inputs"], rows["targets"][:, -1:]], axis=1)
            row, start = (int(a[0]) for a in np.nonzero(tokens == ids[0]))
            assert tokens[row, start : start + len(ids)].tolist() == ids.tolist()
            where = (row, slice(start, start + len(ids) - 1))
            assert rows["weights"][where].tolist() == mask[1:].tolist()
            supervised += mask[1:].sum()
            if pack:
                (segment,) = set(rows["segments"][where])
                inputs = min(len(ids), rows["inputs"].shape[1] - start)
                assert (rows["segments"] == segment).sum() == inputs and segment > 0
            else:
                assert start == 0 and (rows["targets"][row, len(ids) - 1 :] == 0).all()
        assert rows["weights"].sum() == supervised
        assert total(batch, "taken") == n * examples
        assert total(batch, "left") == (n < len(batches) - 1)
    assert total(batches[-1], "cut") == sum(length > time + 1 for length in lengths)
    assert_resumes(dataset, len(batches), len(batches) // 2)


def test_a_step_with_nothing_supervised_is_counted():
    ids = np.arange(100, dtype=np.int32)
    late = np.where(np.arange(100) < 50, 0, 1)  # the answer comes after the cut
    rows = ConversationRows(
        lambda rows: ((ids, late) for _ in rows), Order([2], 0), examples=2, micro_rows=2, time=32, num_examples=2
    )
    (batch,) = iter(rows)
    assert batch["inputs"].shape == (1, 2, 32) and not batch["weights"].any()
    assert total(batch, "cut") == 2 and total(batch, "nothing_supervised") == 2


def test_buckets_are_few():
    assert length_buckets(48) == [48]
    assert length_buckets(128) == [64, 96, 128]
    assert length_buckets(500) == [64, 96, 128, 192, 256, 384, 500]
    assert len(length_buckets(2048)) == 11


@given(st.lists(st.integers(1, 9), min_size=1, max_size=12), st.integers(0, 5), st.sampled_from([1, 2, 6, 32, 51]))
def test_orders_and_deals_see_every_row_once_an_epoch(blocks, seed, rows):
    n = sum(blocks)
    order = Order(blocks, seed)
    epochs = [[order.index(n * e + i) for i in range(n)] for e in range(3)]
    assert all(sorted(epoch) == list(range(n)) for epoch in epochs)
    again = Order(blocks, seed)
    assert [again.index(i) for i in reversed(range(3 * n))] == sum(epochs, [])[::-1]
    block_of = np.repeat(np.arange(len(blocks)), blocks)
    for epoch in epochs:  # a block is read to its end before the next
        assert 1 + np.count_nonzero(np.diff(block_of[epoch])) == len(blocks)
    division = Division(order, rows)
    assert rows == division.streams * division.rows_per_stream and division.streams <= min(STREAMS, n)
    for e in range(3):
        spans = [
            [division.index(s, e * division.size(s) + i) for i in range(division.size(s))]
            for s in range(division.streams)
        ]
        assert sum(spans, []) == epochs[e]
    assert max(map(division.size, range(division.streams))) - min(map(division.size, range(division.streams))) <= 1


def test_epochs_and_seeds_differ():
    order, other = Order([50, 50], 3), Order([50, 50], 4)
    epochs = [[o.index(100 * e + i) for i in range(100)] for o in (order, other) for e in range(2)]
    assert len({tuple(epoch) for epoch in epochs}) == 4


@pytest.mark.parametrize("devices", [1, 8, 16, 64, 256])
def test_the_default_step_is_cut_for_any_number_of_devices(devices):
    """The README's commands as they stand: 524,288 tokens in rows of 2,048, and 32 conversations."""
    rows = pipelines.rows_of_step(524288, 2048)
    batch, micro = pipelines.cut_step(rows, devices, -1, 32)
    assert rows == 256 == batch * devices * micro and batch == min(32, 256 // devices)
    batch, micro = pipelines.cut_step(32, devices, -1, 4, fills=True)
    assert batch == max(1, min(4, 32 // devices)) and batch * devices * micro == max(32, devices)


def test_a_step_that_cannot_be_cut_names_the_device_batch():
    assert pipelines.cut_step(2**31, 2, -1, 32) == (32, 2**25)  # at once, however many divisors could be tried
    assert pipelines.cut_step(12, 2, -1, 4) == (3, 2) and pipelines.cut_step(12, 2, 6, 4) == (6, 1)
    with pytest.raises(UserError, match="--device_batch_size=4 on 2 devices .* 12 rows .* may be 1, 2, 3, 6, or -1"):
        pipelines.cut_step(12, 2, 4, 32)
    with pytest.raises(UserError, match="12 rows, which 5 devices cannot share evenly; use a number of devices that"):
        pipelines.cut_step(12, 5, -1, 32)
    assert pipelines.cut_step(12, 5, -1, 4, fills=True) == (3, 1) == pipelines.cut_step(12, 5, 3, 4, fills=True)
    with pytest.raises(UserError, match="--device_batch_size=4: a step has 3 rows a device; lower it"):
        pipelines.cut_step(12, 5, 4, 4, fills=True)
    for total, remedy in ((1000, "give 512$"), (1, "give at least 512")):
        with pytest.raises(UserError, match=f"_size={total} is not a multiple of the row length, 512; {remedy}"):
            pipelines.rows_of_step(total, 512)


@pytest.mark.parametrize("rows", [1, 3, 8])
def test_validation_is_the_same_for_any_number_of_rows(rows):
    docs = documents(LENGTHS)
    batches = pipelines.packed_validation(reading(docs), range(len(docs)), rows=rows, time=4, max_tokens=50)
    stream = np.concatenate(docs)[:51].tolist()
    supervised = [
        (int(i), int(t))
        for b in batches
        for i, t, w in zip(b["inputs"].ravel(), b["targets"].ravel(), b["weights"].ravel(), strict=True)
        if w
    ]
    assert supervised == list(zip(stream, stream[1:], strict=False))
    assert all(b["inputs"].shape == (rows, 4) for b in batches)
