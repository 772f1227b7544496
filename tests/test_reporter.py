"""What a step line and metrics.jsonl tell of a step, without a model being trained."""

import sys
from types import SimpleNamespace

import numpy as np
import pytest

from jaxchat.config import ModelConfig
from jaxchat.model.flops import flops_per_token
from jaxchat.train.metrics import MetricsLog
from jaxchat.train.reporter import Reporter
from jaxchat.train.stages import loss_text


@pytest.mark.parametrize("row_tokens", [256, 2048])
def test_flops_are_of_the_rows_as_long_as_they_are(row_tokens, capsys):
    """Rows of 256 tokens, too, in a model of 2,048; peak of the two GPUs 2 × 989e12 FLOP/s."""
    model, written = ModelConfig(), []
    devices = np.array([SimpleNamespace(device_kind="NVIDIA H100")] * 2)
    mesh = SimpleNamespace(devices=devices, size=2)
    flags = SimpleNamespace(on_nonfinite="stop")
    stage = SimpleNamespace(model=SimpleNamespace(config=model, mesh=mesh), num_steps=9, flags=flags)
    stage.headline = loss_text
    reporter = Reporter(stage, SimpleNamespace(write=lambda step, values: written.append(values)))
    metrics = {"loss": 3.0, "progress": 0.0, "nonfinite": 0.0, "lr_multiplier": 1.0, "empty_steps": 0.0}
    assert reporter.step(1, 1024, 0.0, metrics | {"cut": 3, "nothing_supervised": 5, "overdue": 1}, row_tokens) == {}
    reporter.flush()
    assert "conversations cut so far 3  without an answer 5" in capsys.readouterr().out
    [values] = written
    assert values["cut"] == 3 and "overdue" not in values
    assert values["step_flops"] == 1024 * flops_per_token(model, row_tokens)
    assert values["mfu"] == pytest.approx(values["step_flops"] / values["step_seconds"] / (2 * 989e12))


def test_wandb_continues_a_resumed_run(tmp_path, monkeypatch):
    """The id is kept in the run's folder; a run from the start has a new one."""
    began = []
    fake = SimpleNamespace(init=lambda **how: began.append(how) or SimpleNamespace(finish=lambda: None))
    monkeypatch.setitem(sys.modules, "wandb", fake)
    for step in (0, 5, 0):
        MetricsLog(tmp_path, {}, resume_step=step, run="mine", tensorboard=False).close()
    first, resumed, anew = (how["id"] for how in began)
    assert first == resumed != anew and all(how["resume"] == "allow" for how in began)
