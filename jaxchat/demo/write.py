"""Write the demo's training data: parquet shards for base, JSON lines for mid, SFT and RL."""

from itertools import count, islice
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from jaxchat import files
from jaxchat.config import UserError
from jaxchat.data.sources import parquet_files
from jaxchat.demo import texts
from jaxchat.demo.chance import Chance
from jaxchat.demo.sums import Sum
from jaxchat.demo.world import World, solution

ROW_GROUP = 512
PROSE_IN_TEN = 3  # of ten rows for mid are prose like base's: without prose, mid forgets base's facts


def write_sums(path: str | Path, rows: int, *, held_out: bool = False, digits: int = 4):
    """Write `rows` arithmetic problems to `path` as JSON lines, for reinforcement learning.

    digits: number of digits of each number, except that one factor of a product always has two.
    held_out: whether to word the questions in the ways that are held out for evaluation.
    """
    smallest, largest = 10 ** (digits - 1), 10**digits - 1

    def problem(i: int) -> list[dict]:
        chance = Chance(f"sums:{held_out}:{i}")
        sign = chance.of("+-*")
        a = chance.between(smallest, largest)
        b = chance.between(10, 99) if sign == "*" else chance.between(smallest, largest)
        found = Sum(max(a, b), sign, min(a, b))
        written = f"{found.a} {chance.of(texts.SIGNS[sign])} {found.b}"
        question = texts.phrased(chance, texts.SUM_FRAMES.pick(held_out), e=written)
        answer = solution(found)
        return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]

    files.write_lines(Path(path), map(problem, range(rows)))


def write_world(
    world: World,
    directory: str | Path,
    *,
    base_shards: int = 4,
    base_rows: int = 8_000,
    base_val_rows: int = 1_024,
    mid_rows: int = 60_000,
    sft_rows: int = 16_000,
    val_rows: int = 1_000,
) -> dict[str, int]:
    """Write base_data/shard_*.parquet and tasks/world_{mid,sft,val}.jsonl under `directory`.

    Return {file name: number of rows}. No document or conversation is in two files.
    base_rows: documents in each of the `base_shards` training shards.
    base_val_rows: documents in one further shard, for validation.
    Raises UserError if base_data already holds other parquet files, which training would read as well.
    """
    base_data, tasks = Path(directory) / "base_data", Path(directory) / "tasks"
    shards = {f"shard_{n:05d}.parquet": base_rows for n in range(base_shards)}
    shards[f"shard_{base_shards:05d}.parquet"] = base_val_rows
    others = [path.name for path in parquet_files(base_data) if path.name not in shards]
    if others:
        raise UserError(
            f"{base_data} already holds {len(others)} other parquet files ({others[0]}, …), which training "
            "would read too; choose an empty base directory"
        )
    base_data.mkdir(parents=True, exist_ok=True)
    tasks.mkdir(parents=True, exist_ok=True)

    documents = (world.document(i) for i in count())
    conversations = (world.conversation(i) for i in count())

    def mixed(rows):
        for row in range(rows):
            yield next(documents if row % 10 < PROSE_IN_TEN else conversations)

    for name, rows in shards.items():
        table = pa.table({"text": list(islice(documents, rows))})
        with files.atomic(base_data / name) as part:
            pq.write_table(table, part, row_group_size=ROW_GROUP, compression="zstd")
    files.write_lines(tasks / "world_mid.jsonl", mixed(mid_rows))  # a conversation's messages, or a document
    files.write_lines(tasks / "world_sft.jsonl", islice(conversations, sft_rows))
    files.write_lines(tasks / "world_val.jsonl", islice(conversations, val_rows))
    return shards | {"world_mid.jsonl": mid_rows, "world_sft.jsonl": sft_rows, "world_val.jsonl": val_rows}
