"""Packing and padding: every token once, in order, whatever the split; exact state; nothing lost, nothing stuck."""

import json

import numpy as np
import pytest

from jaxchat.config import UserError
from jaxchat.data import pipelines
from jaxchat.data.packing import PackedRows, PaddedRows, length_buckets
from jaxchat.data.sources import Shuffled


def documents(lengths, first=1):
    """Documents whose tokens are all different: 1, 2, 3, …"""
    ends = np.cumsum([first, *lengths])
    return [np.arange(a, b, dtype=np.int32) for a, b in zip(ends, ends[1:], strict=False)]


def tokenizing(docs):
    def tokenize(indices):
        return [(docs[i % len(docs)], np.ones(len(docs[i % len(docs)]), np.int32)) for i in indices]

    return tokenize


def rows_of(batches):
    """Every row's supervised (input, target) pairs in order of time, as {row: [(i, t), …]}."""
    rows = {}
    for batch in batches:
        inputs, targets, weights = (batch[n].reshape(-1, batch[n].shape[-1]) for n in ("inputs", "targets", "weights"))
        for r in range(len(inputs)):
            pairs = zip(inputs[r], targets[r], weights[r], strict=True)
            rows.setdefault(r, []).extend((int(i), int(t)) for i, t, w in pairs if w)
    return rows


LENGTHS = [3, 0, 11, 1, 2, 0, 7, 30, 1, 1, 5, 4, 0, 9, 2]


@pytest.mark.parametrize("rows", [1, 2, 4])
def test_one_pass_supervises_every_token_once(rows):
    docs = documents(LENGTHS)
    packed = list(PackedRows(tokenizing(docs), rows=rows, micro_batches=1, time=5, num_documents=len(docs)).__iter__())
    for r, pairs in rows_of(packed).items():
        stream = np.concatenate(docs[r::rows]).tolist()
        assert pairs == list(zip(stream, stream[1:], strict=False))
    assert [batch["last"] for batch in packed] == [False] * (len(packed) - 1) + [True]
    progress = [batch["progress"] for batch in packed]
    assert progress[0] == 0 and progress == sorted(progress) and progress[-1] < 1
    assert packed[-1]["counts"]["empty_documents"] == 3


def test_batches_do_not_depend_on_micro_batches():
    docs = documents(LENGTHS)
    whole = iter(PackedRows(tokenizing(docs), rows=4, micro_batches=1, time=8))
    split = iter(PackedRows(tokenizing(docs), rows=4, micro_batches=2, time=8))
    for _ in range(6):
        a, b = next(whole), next(split)
        assert b["inputs"].shape == (2, 2, 8)
        for name in ("inputs", "targets", "weights"):
            np.testing.assert_array_equal(a[name].reshape(4, 8), b[name].reshape(4, 8))


def test_endless_packing_goes_on_where_the_documents_end():
    docs = documents([4, 3])
    batches = iter(PackedRows(tokenizing(docs), rows=1, micro_batches=1, time=5))
    seen = [next(batches)["targets"].ravel().tolist() for _ in range(3)]
    assert sum(seen, []) == ([1, 2, 3, 4, 5, 6, 7] * 3)[1:16]


@pytest.mark.parametrize("make", ["packed", "padded"])
def test_state_is_exact_and_fits_in_json(make):
    docs = documents(LENGTHS)

    def fresh():
        if make == "packed":
            return iter(PackedRows(tokenizing(docs), rows=2, micro_batches=1, time=6))
        return iter(PaddedRows(tokenizing(docs), examples=2, micro_batches=1, time=8, num_examples=40))

    batches, states, seen = fresh(), [], []
    for _ in range(12):
        states.append(json.dumps(batches.get_state()))
        seen.append(next(batches))
    for k in range(12):
        resumed = fresh()
        resumed.set_state(json.loads(states[k]))
        for want in seen[k:]:
            got = next(resumed)
            assert got["counts"] == want["counts"] and got["progress"] == want["progress"]
            for name in ("inputs", "targets", "weights"):
                np.testing.assert_array_equal(got[name], want[name])


def test_state_of_another_batch_size_is_refused():
    docs = documents(LENGTHS)
    state = iter(PackedRows(tokenizing(docs), rows=2, micro_batches=1, time=6)).get_state()
    with pytest.raises(ValueError, match="2 rows for a batch of 4"):
        iter(PackedRows(tokenizing(docs), rows=4, micro_batches=1, time=6)).set_state(state)


def test_only_empty_documents_do_not_hang():
    packed = PackedRows(tokenizing(documents([0, 0, 0])), rows=1, micro_batches=1, time=4)
    with pytest.raises(UserError, match="empty"):
        next(iter(packed))


def test_padded_rows_supervise_what_the_mask_says():
    ids = np.array([9, 1, 2, 3, 4, 5], np.int32)
    mask = np.array([0, 0, 1, 1, 0, 1], np.int32)
    rows = PaddedRows(
        lambda indices: [(ids, mask)] * len(indices), examples=2, micro_batches=1, time=64, num_examples=3
    )
    first, second = list(iter(rows))
    assert first["inputs"].shape == (1, 2, 64)
    np.testing.assert_array_equal(first["inputs"][0, 0, :5], ids[:-1])
    np.testing.assert_array_equal(first["targets"][0, 0, :5], ids[1:])
    np.testing.assert_array_equal(first["weights"][0, 0, :5], mask[1:])
    assert first["weights"].sum() == 6 and first["weights"][0, :, 5:].sum() == 0
    assert second["weights"][0, 0].sum() == 3 and second["weights"][0, 1].sum() == 0  # the row that is filled up
    assert (first["last"], second["last"]) == (False, True)


def test_long_conversations_are_cut_and_counted():
    ids, mask = np.arange(100, dtype=np.int32), np.ones(100, np.int32)
    late = np.where(np.arange(100) < 50, 0, 1)  # the answer comes after the cut: nothing supervised is left
    rows = PaddedRows(lambda i: [(ids, mask), (ids, late)], examples=2, micro_batches=1, time=32, num_examples=2)
    (batch,) = iter(rows)
    assert batch["inputs"].shape == (1, 2, 32)
    np.testing.assert_array_equal(batch["targets"][0, 0], ids[1:33])
    assert batch["counts"] == {"cut": 2, "nothing_supervised": 1} and batch["weights"][0, 1].sum() == 0


def test_buckets_are_few():
    assert length_buckets(48) == [48]
    assert length_buckets(128) == [64, 96, 128]
    assert length_buckets(500) == [64, 96, 128, 192, 256, 384, 500]
    assert len(length_buckets(2048)) == 11


def test_orders_see_every_row_once_an_epoch():
    order = Shuffled(range(10), [4, 6], seed=3)
    epochs = [[order.index(10 * e + i) for i in range(10)] for e in range(3)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    again = Shuffled(range(10), [4, 6], seed=3)
    assert [again.index(i) for i in range(25, 15, -1)] == sum(epochs, [])[16:26][::-1]
    assert [Shuffled(range(10), [10], seed=4).index(i) for i in range(10)] != epochs[0]


@pytest.mark.parametrize("total, nearest", [(1000, 1024), (700, 512), (1, 512), (0, 512), (1279, 1024), (1281, 1536)])
def test_impossible_batch_names_the_nearest(total, nearest):
    with pytest.raises(UserError, match=rf"--total={total} .* the nearest that is: {nearest}$"):
        pipelines.micro_batches(total, 512, "total", "tokens")
    assert pipelines.micro_batches(nearest, 512, "total", "tokens") == nearest // 512


@pytest.mark.parametrize("rows", [1, 3, 8])
def test_validation_is_the_same_for_any_number_of_rows(rows):
    docs = documents(LENGTHS)
    batches = pipelines.packed_validation(tokenizing(docs), len(docs), rows=rows, time=4, max_tokens=50)
    stream = np.concatenate(docs)[:51].tolist()
    supervised = [
        (int(i), int(t))
        for b in batches
        for i, t, w in zip(b["inputs"].ravel(), b["targets"].ravel(), b["weights"].ravel(), strict=True)
        if w
    ]
    assert supervised == list(zip(stream, stream[1:], strict=False))
    assert all(b["inputs"].shape == (rows, 4) for b in batches)
