"""Tokenize documents and conversations in background threads, ahead of the consumer."""

import multiprocessing
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial

import numpy as np

from jaxchat.config import UserError
from jaxchat.data.sources import ParquetText
from jaxchat.tokenizer import Piece, Tokenizer, chat_pieces

# A function from row numbers to the (ids, mask), int32, of each row's document or conversation, in order; a
# document may be empty. It consumes row numbers ahead of the results that it yields.
Reader = Callable[[Iterable[int]], Iterator[tuple[np.ndarray, np.ndarray]]]
# A thread's unit of work: large enough to outweigh the cost of submitting it, small enough to divide a step.
CHUNK_CHARS, CHUNK_ROWS = 32768, 16
CHUNKS_AHEAD = 8  # chunks submitted ahead of the consumer, per thread


@cache
def _threads() -> tuple[ThreadPoolExecutor, int]:
    """Return the thread pool for tokenizing and its number of threads, which is 1 in a worker process."""
    count = 1 if multiprocessing.parent_process() else min(8, os.cpu_count() or 1)
    return ThreadPoolExecutor(count, "tokenize"), count


def _in_threads(work: Callable[[list], list], items: Iterable, size: Callable, full: int) -> Iterator:
    """Yield the elements of work(chunk) for successive chunks of `items`, computed ahead in threads.

    A chunk ends when the sizes of its items, given by size(item), add up to `full` or more.
    """
    threads, count = _threads()

    def guarded(chunk: list) -> list:
        try:
            return work(chunk)
        except Exception:
            raise
        except BaseException as problem:  # a panic in tiktoken's Rust would end Grain's thread silently
            raise RuntimeError(f"tokenizing failed: {problem!r}") from problem

    futures, chunk, filled = deque(), [], 0
    for item in items:
        chunk.append(item)
        filled += size(item)
        if filled >= full:
            futures.append(threads.submit(guarded, chunk))
            chunk, filled = [], 0
            if len(futures) > CHUNKS_AHEAD * count:
                yield from futures.popleft().result()
    futures.append(threads.submit(guarded, chunk))
    while futures:
        yield from futures.popleft().result()


def _text_tokens(tokenizer: Tokenizer, texts: list[str]) -> list[tuple[np.ndarray, np.ndarray]]:
    documents = []
    for text in texts:
        ids = tokenizer.encode_array(text)
        if len(ids):
            ids = np.concatenate([[np.int32(tokenizer.bos)], ids])
        documents.append((ids, np.ones(len(ids), np.int32)))
    return documents


def text_reader(texts: ParquetText, tokenizer: Tokenizer) -> Reader:
    """Return a function that takes row numbers of `texts` and yields the int32 (token ids, mask) of each row.

    The token ids begin with bos, and the mask is 1 everywhere. An empty text gives empty arrays.
    """
    work = partial(_text_tokens, tokenizer)
    return lambda rows: _in_threads(work, (texts[row] for row in rows), len, CHUNK_CHARS)


def _row_tokens(tasks, tokenizer: Tokenizer, numbers: list[int]) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return the (token ids, mask) of the rows `numbers` of `tasks`, which are conversations or documents."""
    results: list = [None] * len(numbers)
    conversations: dict[int, list[Piece]] = {}  # by position in the chunk
    for place, number in enumerate(numbers):
        try:
            row = tasks[number]
            if "text" in row:
                (results[place],) = _text_tokens(tokenizer, [row["text"]])
            else:
                conversations[place] = chat_pieces(row)
        except UserError as problem:
            raise UserError(f"{tasks.name_of(number)}: {problem}; correct or remove this row") from problem
    for place, result in zip(conversations, tokenizer.render_all([*conversations.values()]), strict=True):
        results[place] = result
    return results


def conversation_reader(tasks, tokenizer: Tokenizer) -> Reader:
    """Return a function that takes row numbers of `tasks` and yields the int32 (token ids, mask) of each row.

    The mask is 1 for tokens of the assistant, and for all tokens of a plain document.
    """
    work = partial(_row_tokens, tasks, tokenizer)
    return lambda rows: _in_threads(work, rows, lambda _: 1, CHUNK_ROWS)
