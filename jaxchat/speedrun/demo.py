"""The commands of the demo. launch.demo runs them in one process, launch.speedrun in subprocesses."""

from pathlib import Path

TAG = "demo"
VOCAB_SIZE, DEPTH, LENGTH = 512, 3, 256
STEP_TOKENS = 2048
STEPS = {"base": 220, "mid": 1370, "sft": 200}


def commands(tasks: Path, *, seed: int, rows: int, steps: dict[str, int]) -> dict[str, list[str]]:
    """Return the demo's commands in order, as {name of a module in launch: command-line flags}.

    tasks: folder of world_mid.jsonl, world_sft.jsonl and world_val.jsonl. rows: device batch size of base and
    mid training. SFT uses twice this size. steps: {stage: number of optimizer steps}.
    """
    common = [f"--model_tag={TAG}", f"--seed={seed}", "--device_type=cpu"]
    batch = [f"--device_batch_size={rows}", f"--total_batch_size={STEP_TOKENS}"]
    batch += ["--eval_every=320", "--eval_tokens=32768"]
    rate = ["--matrix_lr=0.04"]  # twice the default, because the steps are few (dev/LOG.md)
    validation = f"--val_tasks={tasks / 'world_val.jsonl'}"
    return {
        "tok_train": [f"--vocab_size={VOCAB_SIZE}", "--max_chars=2000000", "--overwrite"],
        "base_train": [
            *[f"--depth={DEPTH}", f"--max_seq_len={LENGTH}", f"--num_iterations={steps['base']}"],
            *["--warmdown_ratio=0.5", "--sample_every=-1", *batch, *common, *rate],
        ],
        "mid_train": [
            *[f"--train_tasks={tasks / 'world_mid.jsonl'}", validation, f"--num_iterations={steps['mid']}"],
            *[*batch, *common, *rate],
        ],
        "chat_sft": [
            *[f"--train_tasks={tasks / 'world_sft.jsonl'}", validation, f"--num_iterations={steps['sft']}"],
            *[f"--device_batch_size={2 * rows}", "--max_seq_len=128", "--packing=bestfit"],
            # at twice this rate, SFT forgets the facts that only prose states (dev/LOG.md)
            *["--target_examples_per_step=64", "--init_lr_frac=0.2", "--eval_steps=10"],
            *["--eval_metrics_every=-1", *common],
        ],
    }
