"""Print and log the numbers of each training step, one step late."""

import time

import jax

from jaxchat.config import UserError
from jaxchat.files import duration
from jaxchat.model.flops import flops_per_token, peak_flops
from jaxchat.train.metrics import MetricsLog, peak_bytes

HIDDEN = ("taken", "left", "targets", "overdue", "unread")  # totals that only the loop needs


class NotFinite(UserError):
    """Raised on all processes when the loss or gradient of a step is not finite."""


class Unread(UserError):
    """Raised on all processes when one of them can't read its rows of a step. No process applies it."""

    def __init__(self, step: int):
        super().__init__(f"another process can't read its rows of step {step}; its own message says why")
        self.step = step


class Reporter:
    """Print and log the numbers of each step one step late, so that fetching them delays no step."""

    def __init__(self, stage, log: MetricsLog):
        self._stage, self._log = stage, log
        self._pending = None
        self._shown = float("-inf")
        self._reported = 0
        self._skipped = 0
        self._spent = 0.0  # seconds in steps after the first, which compiles
        self._first_progress = 0.0  # progress before the second step
        mesh = stage.model.mesh
        peak = peak_flops(mesh.devices.flat[0])
        self._peak = peak * mesh.size if peak else None
        self.restart_clock()

    def restart_clock(self):
        self._clock = time.perf_counter()

    def step(self, step: int, tokens: int, waited: float, metrics: dict, row_tokens: int) -> dict[str, float]:
        """Report the previous step. Return its metrics, {name: float}, or {} at the first step.

        The arguments describe the current step and are stored until the next call.
        tokens: number of tokens, over all processes. waited: seconds spent waiting for data.
        metrics: {name: array}, perhaps not computed yet. row_tokens: tokens per row, padding included.
        """
        previous, self._pending = self._pending, (step, tokens, waited, metrics, row_tokens)
        return self._report(*previous) if previous else {}

    def flush(self):
        pending, self._pending = self._pending, None
        if pending:
            self._report(*pending, last=True)

    def _report(self, step, tokens, waited, metrics, row_tokens, last=False) -> dict[str, float]:
        fetched = {name: float(value) for name, value in jax.device_get(metrics).items()}
        values = self._checked(step, fetched)
        progress = values["progress"]
        now = time.perf_counter()
        seconds, self._clock = now - self._clock, now
        eta = self._eta(progress)
        if self._reported:
            self._spent += seconds
        self._reported += 1
        flops = float(tokens * flops_per_token(self._stage.model.config, row_tokens))
        values |= {
            "step_seconds": seconds,
            "tokens_per_s": tokens / seconds,
            "step_flops": flops,
            "data_wait_seconds": waited,
            "peak_bytes": peak_bytes(),
        }
        if self._peak:
            values["mfu"] = flops / seconds / self._peak
        self._log.write(step, values)
        if last or now - self._shown >= 1.0:
            self._shown = now
            print(self._line(step, values, eta), flush=True)
        return fetched

    def _checked(self, step: int, values: dict[str, float]) -> dict[str, float]:
        """Return the values of a step that are to be logged: all but those named in HIDDEN.

        Raises Unread if a process could not read its rows.
        Raises NotFinite if the loss or gradient is not finite, unless --on_nonfinite=skip.
        """
        if values.get("unread"):
            raise Unread(step)
        where = "the next batch of the data"
        if "taken" in values:
            where = f"{values['taken']:,.0f} documents of the data read"
        shown = {name: value for name, value in values.items() if name not in HIDDEN}
        if values["nonfinite"]:
            what = f"step {step}: loss {values['loss']}, gradient norm {values['grad_norm']} ({where})"
            if self._stage.flags.on_nonfinite == "stop":
                self._log.write(step, shown)
                raise NotFinite(
                    f"{what}; not finite, so it was not applied, and training stops. Lower the learning "
                    "rates, or continue from the last checkpoint with --resume --on_nonfinite=skip"
                )
            self._skipped += 1
            print(f"{what}; not finite: skipped", flush=True)
        return shown

    def _line(self, step: int, values: dict[str, float], eta: float | None) -> str:
        seconds, waited = values["step_seconds"], values["data_wait_seconds"]
        of = f"/{self._stage.num_steps}" if self._stage.num_steps else f" ({values['progress']:.0%})"
        line = f"step {step:>6}{of}  {self._stage.headline(values)}  lr × {values['lr_multiplier']:.3f}"
        line += f"  {1000 * seconds:.0f} ms  {values['tokens_per_s']:,.0f} tokens/s"
        if self._peak:
            line += f"  MFU {values['mfu']:.1%}"
        if values.get("cut"):
            line += f"  conversations cut so far {values['cut']:.0f}"
        if values.get("nothing_supervised"):
            line += f"  without an answer {values['nothing_supervised']:.0f}"
        if values["empty_steps"]:
            line += f"  empty steps {values['empty_steps']:.0f}"
        if self._skipped:
            line += f"  skipped {self._skipped}"
        if waited > 0.01 * seconds:
            line += f"  waited {1000 * waited:.0f} ms for data"
        if eta is not None:
            line += f"  ETA {duration(eta)}"
        return line

    def _eta(self, progress: float) -> float | None:
        """Estimate the remaining seconds of the stage. Return None if it is too early for an estimate."""
        if self._reported == 1:
            self._first_progress = progress
        steps, done = self._reported - 1, progress - self._first_progress
        return self._spent / done * max(0.0, 1 - progress - done / steps) if steps > 0 and done > 0 else None
