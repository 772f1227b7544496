"""Fake steps for the tests of speedrun, one-line programs; as a process: run a chain of them that saves and resumes.

A step appends its name to `ran` each time it starts, and writes its inputs and its name to its output.
"""

import sys
from pathlib import Path

from jaxchat.config import base_dir
from jaxchat.speedrun import runner
from jaxchat.speedrun.progress import Progress
from jaxchat.speedrun.runner import Runner
from jaxchat.speedrun.state import State
from jaxchat.speedrun.steps import Files, Step

UNITS, SAVED = 12, 3  # of the chain: a step does UNITS units of work, and saves after SAVED of them
# Does what is left of its work, a unit at a time; the output is the inputs and all units, in order.
TRAINS = """
n=$(cat {name}.saved 2>/dev/null || echo 0)
while [ $n -lt {units} ]; do
  sleep 0.01; n=$((n + 1)); echo {name} $n >> ran
  if [ $((n % {saved})) = 0 ]; then echo $n > {name}.new; mv {name}.new {name}.saved; fi
done
(cat {inputs} /dev/null; seq $n | sed 's/^/{name} /') > {name}.new
mv {name}.new {name}.out
"""


def output(name: str) -> Files:
    return Files(f"{name}.out")


def fake(name: str, needs: str = "", shell: str = "", flags: str = "", **more) -> Step:
    """A step that needs the outputs of others and makes its own. shell: what it does besides, before."""
    inputs = " ".join(f"{other}.out" for other in needs.split())
    made = f'(cat {inputs} /dev/null; echo {name} "$@") > {name}.new; mv {name}.new {name}.out'
    line = f'cd {base_dir()}; echo {name} "$@" >> ran; {shell or "true"}; {made}'
    argv = ("sh", "-c", line, name, *flags.split())
    needed = tuple(output(other) for other in needs.split())
    return Step(name, argv, **({"makes": (output(name),), "needs": needed} | more))


def chain() -> list[Step]:
    """a, b beside it, c from both: each trains."""
    steps = []
    for name, needs in (("a", ""), ("b", ""), ("c", "a b")):
        inputs = " ".join(f"{other}.out" for other in needs.split())
        shell = f"cd {base_dir()}; " + TRAINS.format(name=name, inputs=inputs, units=UNITS, saved=SAVED)
        needed = tuple(output(other) for other in needs.split())
        lane = "network" if name == "b" else "devices"
        steps.append(Step(name, ("sh", "-c", shell), (output(name),), needed, lane=lane))
    return steps


if __name__ == "__main__":
    runner.PAUSE = 0.0
    state = State(Path(base_dir()) / "speedrun")
    running = Runner(chain(), state, restarts=0)
    Progress(running)
    sys.exit(running.run())
