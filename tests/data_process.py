"""A process of the data tests: for each line of stdin, a spec in JSON, it writes the batches that it makes and "done".

Runs as the tests' processes and, of these, as Grain's workers: so nothing is done unless it is the main program.
"""

import json
import sys
from pathlib import Path

import numpy as np


def make_batches(pipeline: str, folder: Path, share, workers: int):
    from jaxchat.data import pipelines
    from jaxchat.data.sources import ParquetText, find_shards
    from jaxchat.tokenizer import Tokenizer

    tokenizer = Tokenizer.load(folder / "tokenizer")
    how = {"time": 64, "seed": 5, "share": share}
    if pipeline in ("base", "bestfit"):
        texts = ParquetText(find_shards(folder / "base_data", "train"))
        packing = "stream" if pipeline == "base" else "bos_bestfit"
        return pipelines.base_batches(
            texts, tokenizer, rows=24, micro_batches=3, packing=packing, workers=workers, **how
        )
    tasks = pipelines.load_tasks(f"{folder / 'talk.jsonl'}", "", "train_tasks", documents=True)
    if pipeline == "mid":
        return pipelines.mid_batches(tasks, tokenizer, rows=24, micro_batches=3, endless=False, workers=workers, **how)
    packing = "padded" if pipeline == "sft" else "bestfit"
    examples = {"examples": 8, "micro_rows": 8, "num_examples": 8 * 400}
    return pipelines.sft_batches(tasks, tokenizer, packing=packing, **examples, **how)


def main(spec: dict):
    """Run from the state that is given, if any, for `steps` steps; keep the state after `save_at` of them."""
    batches = make_batches(spec["pipeline"], Path(spec["folder"]), spec["share"], spec["workers"])
    if spec["state"]:
        batches.set_state(spec["state"])
    arrays, state = {}, None
    for step in range(spec["steps"]):
        batch = next(batches)
        totals = batch.pop("totals")
        for name, array in {**batch, **{f"total_{k}": v for k, v in totals.items()}}.items():
            arrays[f"{step}.{name}"] = array
        if step + 1 == spec["save_at"]:
            state = batches.get_state()
    batches.close()
    np.savez(spec["out"], **arrays)
    Path(spec["out"]).with_suffix(".json").write_text(json.dumps(state))


if __name__ == "__main__":
    for line in sys.stdin:
        main(json.loads(line))
        print("done", flush=True)
