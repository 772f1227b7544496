"""launch.speedrun: fake steps for every branch, random histories, and kills at random moments."""

import contextlib
import dataclasses
import datetime
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import hypothesis
import pytest
from conftest import ROOT
from hypothesis import strategies
from speedrun_process import SAVED, UNITS, chain, fake, output

from jaxchat import hosts
from jaxchat.config import BaseConfig, MidConfig, SFTConfig, UserError
from jaxchat.speedrun import estimate, presets
from jaxchat.speedrun import runner as runners
from jaxchat.speedrun import state as states
from jaxchat.speedrun import steps as artifacts
from jaxchat.speedrun.plan import Plan
from jaxchat.speedrun.presets import PRESETS
from jaxchat.speedrun.progress import Progress, outlook, pace_of, scale_of
from jaxchat.speedrun.runner import Runner
from jaxchat.speedrun.state import State
from jaxchat.speedrun.steps import Files, Step
from jaxchat.tokenizer import Tokenizer
from jaxchat.train.stages import base_model
from launch import cli, demo, download, speedrun


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(runners, "PAUSE", 0.0)


def run(home, steps, restarts=0, **more):
    """Run steps as the command does: judge them first, then run them. -> exit code"""
    state = State(home / "speedrun")
    states.to_do(state, steps, steps, set())
    code = Runner(steps, state, restarts=restarts, **more).run()
    if not code:
        state.complete()
    return code


def ran(home) -> list[str]:
    """What was started since the last look, in order."""
    path = home / "ran"
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    path.unlink(missing_ok=True)
    return [line.strip() for line in lines]


def abc(**flags):
    """b needs a, c needs b; d needs none. flags: of each."""
    steps = [fake("a", flags=flags.get("a", "")), fake("b", "a", flags=flags.get("b", ""))]
    return [*steps, fake("c", "b", flags=flags.get("c", "")), fake("d", flags=flags.get("d", ""))]


def test_what_is_done_is_not_run_again(home):
    assert run(home, abc()) == 0 and ran(home) == ["a", "b", "c", "d"]
    assert (home / "c.out").read_text() == "a\nb\nc\n"
    assert run(home, abc()) == 0 and ran(home) == []
    record = json.loads((home / "speedrun/b.json").read_text())
    assert [*record["inputs"]["a.out"]] == ["a.out"] and [*record["outputs"]] == ["b.out"] and record["seconds"] > 0
    assert "$ sh -c" in (home / "speedrun/b.log").read_text()


def test_a_step_that_leaves_nothing_runs_each_time(home):
    report = fake("report", "a", makes=())
    for _ in range(2):
        assert run(home, [fake("a"), report]) == 0
    assert ran(home) == ["a", "report", "report"]


def test_changed_flags_are_refused_with_a_difference(home):
    run(home, abc(b="--depth=2 --rows=4"))
    ran(home)
    for flags, words in [
        ("--depth=3 --rows=4", "step b: it was run with --depth=2, but would now run with --depth=3"),
        ("--rows=4", "it was run with --depth=2, but would now run with the default"),
        ("--depth=2 --rows=4 --more=1", "it was run with no --more, but would now run with --more=1"),
    ]:
        with pytest.raises(UserError, match=re.escape(words)) as refusal:
            run(home, abc(b=flags))
        assert "--redo=b" in str(refusal.value)
    assert ran(home) == []


def test_a_free_flag_may_change(home):
    def step(rows):
        return [fake("a", flags=f"--depth=2 --rows={rows}", free=frozenset(["rows"]))]

    assert run(home, step(1)) == run(home, step(2)) == 0 and ran(home) == ["a --depth=2 --rows=1"]
    assert Step("a", ("/old/python", "-m", "x")).fixed == Step("a", ("/new/python", "-m", "x")).fixed == ["-m", "x"]


def redo(state, steps, name):
    """As the command does it. Of abc, b and c are to be done again."""
    assert state.again(steps, {name}) == {"b", "c"}
    state.forget(steps, {name})


def test_redo_runs_a_step_and_what_needs_it(home):
    run(home, abc())
    ran(home)
    changed = abc(b="--depth=3")
    state = State(home / "speedrun")
    redo(state, changed, "b")
    assert run(home, changed) == 0 and ran(home) == ["b --depth=3", "c"]
    assert (home / "c.out").read_text() == "a\nb --depth=3\nc\n"


def test_redo_is_not_begun_anew_by_the_same_command(home):
    run(home, abc())
    ran(home)
    state, broken = State(home / "speedrun"), [*abc()[:2], fake("c", "b", "exit 75"), abc()[3]]
    redo(state, broken, "b")
    assert run(home, broken) == 75 and ran(home) == ["b", "c"]
    assert state.again(broken, {"b"}) == set()  # it goes on
    assert state.again([*broken[:2], fake("c", "b", flags="--right=1")], {"b"}) == set()  # c's flags are put right
    redo(state, abc(b="--depth=3"), "b")  # other flags: anew
    assert run(home, abc(b="--depth=3")) == 0
    ran(home)
    redo(state, abc(b="--depth=3"), "b")  # it was complete


def test_a_changed_input_is_refused_by_its_name(home):
    (home / "text.out").write_text("some")
    step = [fake("a", "text")]
    assert run(home, step) == 0
    (home / "text.out").write_text("more")
    with pytest.raises(UserError, match="step a: its input text.out has changed"):
        run(home, step)
    (home / "text.out").write_text("some")
    assert run(home, step) == 0 and ran(home) == ["a"]


@pytest.mark.parametrize(
    "damage, why",
    [
        (lambda path: path.unlink(), "b.out is missing"),
        (lambda path: path.write_text("a\n"), "b.out has changed since it was made"),
    ],
)
def test_a_damaged_output_is_made_again(home, damage, why):
    run(home, abc())
    ran(home)
    damage(home / "b.out")
    assert states.to_do(State(home / "speedrun"), abc(), abc(), set()) == {"b": why}
    assert run(home, abc()) == 0 and ran(home) == ["b"]  # c's input is again what it was


def test_an_output_that_comes_out_otherwise_is_not_mixed_with_what_was_made_from_the_old_one(home):
    salt = Files("b.salt")
    steps = [fake("b", shell="cp salt b.salt", makes=(salt,)), fake("c", needs="", makes=(output("c"),))]
    steps[1] = dataclasses.replace(steps[1], needs=(salt,))
    (home / "salt").write_text("one")
    run(home, steps)
    (home / "salt").write_text("two")
    (home / "b.salt").unlink()
    assert [*states.to_do(State(home / "speedrun"), steps, steps, set())] == ["b"]
    with pytest.raises(UserError, match="step c: its input b.salt has changed.*--redo=c"):
        run(home, steps)
    assert ran(home) == ["b", "c", "b"]


def test_a_failed_step_ends_the_run(home, capsys):
    steps = [fake("a"), fake("b", "a", "seq 100; echo wrong >&2; exit 2"), fake("c", "b"), fake("d")]
    assert run(home, steps, restarts=5) == 2 and ran(home) == ["a", "b"]
    out = capsys.readouterr().out
    shown = out[out.index("its last lines:") :]
    assert shown.count("  | ") == 20 and "  | 82\n" in shown and "  | 81\n" not in shown and "  | wrong\n" in shown
    assert "step b failed with exit code 2" in out and str(home / "speedrun/b.log") in shown
    # What it could not begin may be given other flags.
    assert run(home, [fake("a"), fake("b", "a", flags="--better=1"), *abc()[2:]]) == 0
    assert ran(home) == ["b --better=1", "c", "d"]


def test_a_step_that_makes_nothing_has_failed(home, capsys):
    assert run(home, [fake("a", makes=(output("other"),)), fake("b")]) == 1 and ran(home) == ["a"]
    assert "step a ended with exit code 0, but other.out is missing" in capsys.readouterr().out


@pytest.mark.parametrize(
    "ends, code, starts",
    [("exit 75", 75, 3), ("exit 76", 76, 3), ("kill -ABRT $$", 134, 3), ("kill -KILL $$", 137, 3)]
    + [("exit 1", 1, 1), ("exit 130", 130, 1)],
)
def test_restarts(home, ends, code, starts, capsys):
    steps = [fake("a", shell=ends, resumes=True)]
    assert run(home, steps, restarts=2) == code
    why = "was interrupted" if code == 75 else f"failed with exit code {code}"
    assert State(home / "speedrun").why_to_do(steps[0]) == why
    assert ran(home) == ["a --resume"] * starts
    assert run(home, [fake("a", resumes=True)]) == 0  # the next start of the command counts anew


def test_a_restart_that_helps(home):
    once = "[ -e tried ] || { touch tried; exit 137; }"
    assert run(home, [fake("a", shell=once), fake("b", "a")], restarts=1) == 0 and ran(home) == ["a", "a", "b"]


def test_a_download_runs_beside_what_does_not_need_it(home):
    """Each waits for what the other does: in turn they'd never end."""
    wait = "n=0; until [ -e {other} ] || [ $n = 200 ]; do sleep 0.05; n=$((n + 1)); done; [ -e {other} ]"
    steps = [
        fake("text", shell="touch loads; " + wait.format(other="trains"), lane="network"),
        fake("tokenizer", shell="touch trains; " + wait.format(other="loads")),
        fake("base", "text tokenizer"),
    ]
    assert run(home, steps) == 0 and ran(home)[-1] == "base"


def test_a_failure_stops_what_runs_beside_it(home):
    began = time.monotonic()
    steps = [fake("text", shell="sleep 60", lane="network"), fake("tokenizer", shell="exit 2")]
    assert run(home, steps) == 2 and time.monotonic() - began < 30


def test_several_at_a_time(home):
    """Each with its own place; what has no place waits."""
    steps = [fake(name, shell=f"echo $GPU > {name}.gpu; until [ -e b.gpu ]; do sleep 0.02; done") for name in "abc"]
    assert run(home, steps, places=({"GPU": "0"}, {"GPU": "1"})) == 0
    assert [(home / f"{name}.gpu").read_text() for name in "ab"] == ["0\n", "1\n"]
    assert sorted(ran(home)) == ["a", "b", "c"] and (home / "c.gpu").read_text() in ("0\n", "1\n")


def start_chain(home, **more):
    words = [sys.executable, str(ROOT / "tests/speedrun_process.py")]
    env = os.environ | {"PYTHONPATH": str(ROOT), "JAXCHAT_BASE_DIR": str(home)}
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # jobs in the background ignore it
    try:
        return subprocess.Popen(words, env=env, stdout=subprocess.PIPE, text=True, **more)
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_is_passed_on_and_the_same_command_continues(home, number):
    process = start_chain(home)
    while not (home / "c.saved").exists():  # so a and b are done
        time.sleep(0.005)
    process.send_signal(number)
    process.communicate(timeout=30)
    assert process.returncode == 75
    before = (home / "ran").read_text()
    assert "c 12" not in before and not (home / "c.out").exists()
    process = start_chain(home)
    process.communicate(timeout=30)
    assert process.returncode == 0
    check_chain(home, kills=1)


def check_chain(home, kills):
    """The outputs are those of an undisturbed run; at most SAVED units of the two that run were done again a kill."""
    units = {name: [f"{name} {n}" for n in range(1, UNITS + 1)] for name in "abc"}
    wanted = units | {"c": units["a"] + units["b"] + units["c"]}
    assert {name: (home / f"{name}.out").read_text().splitlines() for name in "abc"} == wanted
    done = ran(home)
    assert set(done) == {unit for name in "abc" for unit in units[name]}
    assert len(done) <= 3 * UNITS + 2 * SAVED * kills


@pytest.mark.parametrize("kills", [5, pytest.param(20, marks=pytest.mark.slow)])
def test_kills_at_random_moments(home, kills):
    """Of the command alone: what it had started is left behind, and must not disturb what the next one starts."""
    moments = random.Random(kills)
    for _ in range(kills):
        process = start_chain(home)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(0.15 + 0.6 * moments.random())
        process.kill()
        process.communicate()
    process = start_chain(home)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 0, out
    check_chain(home, kills)


def test_what_a_killed_run_left_is_waited_for(home, capsys):
    """It is asked to stop, and nothing starts before it has."""
    lock = home / "speedrun/a.lock"
    lock.parent.mkdir()
    shell = f"""exec 9<>{lock}; flock -n 9; echo $$ > {lock}; trap "sleep 0.2; touch {home}/saved; exit" TERM
        touch {home}/holds; while :; do sleep 0.05; done"""
    held = subprocess.Popen(["sh", "-c", shell])
    while not (home / "holds").exists():
        time.sleep(0.01)
    assert run(home, [fake("a", shell="[ -e saved ]")]) == 0
    assert f"waiting for process {held.pid}" in capsys.readouterr().out and held.wait(5) == 0


EVENTS = strategies.one_of(
    strategies.tuples(strategies.just("run"), strategies.sampled_from(["", "a", "b", "c"])),
    strategies.tuples(strategies.just("fail"), strategies.sampled_from("abc"), strategies.sampled_from([1, 2, 75])),
    strategies.tuples(strategies.just("damage"), strategies.sampled_from("abc")),
    strategies.tuples(strategies.just("remove"), strategies.sampled_from("abc")),
    strategies.tuples(strategies.just("forget"), strategies.sampled_from("abc")),
    strategies.tuples(strategies.just("flag"), strategies.sampled_from("abc")),
)


@hypothesis.settings(max_examples=15)
@hypothesis.given(strategies.lists(EVENTS, max_size=8))
def test_random_histories(tmp_path_factory, events):
    """Whatever happened: a run that ends well leaves what an undisturbed run makes, and then nothing is left to do."""
    home = tmp_path_factory.mktemp("history")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAXCHAT_BASE_DIR", str(home))
        patch.setattr(runners, "show", lambda line: None)
        flags = {}

        def steps(failing="", code=0):
            needs = {"a": "", "b": "a", "c": "a b"}
            return [fake(name, need, "exit_as_asked", flags.get(name, "")) for name, need in needs.items()]

        bin_ = home / "bin"
        bin_.mkdir()
        patch.setenv("PATH", f"{bin_}:{os.environ['PATH']}")
        for event, *about in events:
            ask = bin_ / "exit_as_asked"
            ask.write_text("true\n")
            ask.chmod(0o755)
            play(home, steps, flags, event, about)
        (bin_ / "exit_as_asked").write_text("true\n")
        (bin_ / "exit_as_asked").chmod(0o755)
        settle(home, steps())
        outs = {}
        for name, needs in (("a", ""), ("b", "a"), ("c", "ab")):
            outs[name] = "".join(outs[n] for n in needs) + " ".join(filter(None, [name, flags.get(name)])) + "\n"
            assert (home / f"{name}.out").read_text() == outs[name]
        ran(home)
        assert run(home, steps()) == 0 and ran(home) == []


def play(home, steps, flags, event, about):
    """One event of a history."""
    path = home / f"{about[0]}.out"
    if event == "run":
        with_redo(home, steps(), about[0])
    elif event == "fail":
        bad = [dataclasses.replace(s, argv=("sh", "-c", f"exit {about[1]}", *s.argv[3:])) for s in steps()]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Step, "fixed", property(lambda step: list(step.argv[3:])))
            with_redo(home, [b if b.name == about[0] else s for b, s in zip(bad, steps(), strict=True)], "")
    elif event == "damage":
        path.write_text("damaged")
    elif event == "remove":
        path.unlink(missing_ok=True)
    elif event == "forget":
        (home / f"speedrun/{about[0]}.json").unlink(missing_ok=True)
    else:
        flags[about[0]] = f"--x={len(flags)}"


def with_redo(home, steps, redo):
    state = State(home / "speedrun")
    if redo and state.again(steps, {redo}):
        state.forget(steps, {redo})
    try:
        return run(home, steps)
    except UserError as refusal:
        return re.search("--redo=(\\w)", str(refusal))[1]


def settle(home, steps):
    """Do what the refusals say until the run is complete."""
    redo = ""
    for _ in range(10):
        code = with_redo(home, steps, redo)
        if code == 0:
            return
        redo = code if isinstance(code, str) else ""
    pytest.fail("the advice of the refusals leads nowhere")


def test_choosing_steps():
    steps = [Step(name, ()) for name in ("tok", "base", "mid", "sft")]

    def names(**which):
        return [step.name for step in artifacts.chosen(steps, **which)]

    assert names() == ["tok", "base", "mid", "sft"] and names(first="mid") == ["mid", "sft"]
    assert names(last="base") == ["tok", "base"] and names(first="base", last="mid") == ["base", "mid"]
    assert names(only="sft,tok") == ["tok", "sft"]
    for which, words in [
        ({"first": "x"}, "--from=x: there is no step 'x'; the steps are tok, base, mid, sft"),
        ({"only": "tok,y"}, "--only=tok,y: there is no step 'y'"),
        ({"first": "mid", "last": "tok"}, "--from=mid comes after --until=tok"),
        ({"only": "tok", "last": "mid"}, "--only contradicts"),
    ]:
        with pytest.raises(UserError, match=words):
            names(**which)


def test_what_a_chosen_step_needs_must_be_there(home):
    steps = abc()
    with pytest.raises(UserError, match="step c needs b.out, which is missing; step b makes it"):
        states.check_inputs(State(home / "speedrun"), steps, steps[2:])
    states.check_inputs(State(home / "speedrun"), steps, steps[1:2] + steps[:1])
    with pytest.raises(UserError, match="needs text.out, which is missing; provide it"):
        states.check_inputs(State(home / "speedrun"), [fake("a", "text")], [fake("a", "text")])
    run(home, steps)
    states.check_inputs(State(home / "speedrun"), steps, steps[2:])
    with pytest.raises(UserError, match="step c needs b.out, which is incomplete"):  # before it is deleted
        states.to_do(State(home / "speedrun"), steps, steps[2:], {"b"})
    State(home / "speedrun").begin(steps[1])
    with pytest.raises(UserError, match="step c needs b.out, which is incomplete; step b makes it"):
        states.check_inputs(State(home / "speedrun"), steps, steps[2:])


def test_the_server_takes_the_commands_place(home, monkeypatch):
    """So that a signal reaches it."""
    started = []
    monkeypatch.setattr(speedrun.os, "execv", lambda path, words: started.append(words))
    for flags in ({"serve": True}, {}):
        plan = Plan(PRESETS["cpu"], "demo", [fake("a")], {}, 0.0)
        runner = Runner(plan.steps, State(home / "speedrun"), restarts=0)
        assert speedrun.perform(speedrun.Config(preset="cpu", **flags), plan, runner, set()) == 0
    assert started == [[sys.executable, "-m", "launch.serve", "--model_tag=demo"]]


def test_the_command_for_the_rest_is_for_the_base_directory_itself(home, monkeypatch, capsys):
    """Not for the demo's folder in it, which the command adds."""
    monkeypatch.setattr(speedrun, "plan_and_perform", lambda config: 0)
    assert speedrun.run(speedrun.Config(preset="cpu", until="world")) == 0
    out = capsys.readouterr().out
    assert out.startswith("next: ") and out.endswith(" -m launch.speedrun --preset=cpu\n")
    assert "JAXCHAT_BASE_DIR" not in out


def test_files_of_a_pattern(home):
    for name in ("x/2.txt", "x/1.txt", "x/.hidden.txt", "x/3.txt.part"):
        (home / name).parent.mkdir(exist_ok=True)
        (home / name).write_text(name)
    assert [*Files("x/*").found()] == ["x/1.txt", "x/2.txt"] and Files("x/*", least=3).found() == {}
    assert [*Files("x/*", first=1).found()] == ["x/1.txt"]
    [name] = Files(f"{home}/x/1*").found()
    assert f"/{name}" == f"{home}/x/1.txt"


def test_folders_of_the_user_may_be_hidden_and_have_any_name(home):
    """Such as ~/.cache/nanochat/base_data; what is hidden within them is no data all the same."""
    for folder in (".cache/data", "data [1]"):
        for name in ("1.parquet", "2.parquet", ".3.parquet", "eval.zip", "gsm8k/main/.cache/4.txt", "gsm8k/main/5.txt"):
            (home / folder / name).parent.mkdir(parents=True, exist_ok=True)
            (home / folder / name).write_text(name)
        given = str(home / folder)
        places = presets.Places(data_dir=given, tasks_dir=given, eval_bundle=f"{given}/eval.zip")
        assert [name.rpartition("/")[2] for name in places.text.found()] == ["1.parquet", "2.parquet"]
        assert [name.rpartition("/")[2] for made in places.tasks for name in made.found()] == ["5.txt"]
        assert len(places.bundle[0].found()) == 1


def test_progress(home, monkeypatch):
    """The pace of a trainer is that of its last steps; steps to come are scaled by what was measured."""
    base = Step("base", (), (artifacts.Checkpoint("base", "d2"),), minutes=10.0)
    steps = [dataclasses.replace(base, name="tok", makes=(), minutes=1.0), base, Step("mid", (), minutes=20.0)]
    folder = home / "base_checkpoints/d2"
    folder.mkdir(parents=True)
    rows = [{"step": n + 1, "progress": n / 100, "step_seconds": 9.0 if n else 99.0} for n in range(25)]
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)) + '\n{"step": 26, "prog')
    pace = pace_of(base)
    assert pace.fraction == pytest.approx(0.25) and pace.left == pytest.approx(75 * 9)
    assert pace.seconds == pytest.approx(900)
    (home / "speedrun").mkdir()
    (home / "speedrun/tok.json").write_text('{"seconds": 60.0}')  # of an earlier start
    runner = Runner(steps, State(home / "speedrun"), restarts=0)
    progress = Progress(runner, price_per_hour=10.0)
    runner.done["tok"], runner.running["base"] = 60.0, runners_stub(base)
    # Base takes 900 s where 600 were planned, the tokenizer 60 as planned; a tenth of the 1860 counts as planned.
    scale = (900 + 60 + 186) / (600 + 60 + 186)
    assert scale_of(steps, runner.done) == pytest.approx(scale)
    left, known = progress.left()
    assert known and left == pytest.approx(75 * 9 + 20 * 60 * scale)
    # The next start's plan, with base interrupted there, says the same.
    took = {"tok": 60.0, "base": 225.0, "mid": 0.0}
    assert outlook(steps, took, {"base": "was interrupted", "mid": ""}) == pytest.approx(
        {"base": 75 * 9, "mid": 20 * 60 * scale}
    )
    assert outlook(steps, took, {"base": states.AGAIN, "mid": states.AGAIN}) == {"base": 600, "mid": 1200}  # --redo
    line = progress.line()
    assert "base 25%, 1 of 3 steps done" in line and re.search("about 38m2[01]s left", line)
    assert f"cost about {(60 + left) / 360:.2f} in all" in line
    assert re.fullmatch(r"all 3 steps are done, in 1m0\ds; cost 0.1\d", progress.summary())
    progress.write("running")
    status = json.loads((home / "speedrun/status.json").read_text())
    assert [step["state"] for step in status["steps"]] == ["done", "running", "to do"]
    assert status["steps"][1]["fraction"] == pytest.approx(0.25) and status["seconds_left"] == pytest.approx(
        left, abs=1
    )
    assert status["line"] == line


def test_a_short_first_step_says_little(home):
    """A tokenizer that took a fifth of its time leaves the estimate of what comes nearly as it was."""
    steps = [Step("tok", (), minutes=1.0), Step("base", (), minutes=99.0)]
    assert 0.9 < scale_of(steps, {"tok": 12.0}) < 1
    assert scale_of(steps, {}) == scale_of([], {}) == 1
    assert scale_of(steps, {"tok": 60.0, "base": 5 * 99 * 60.0}) > 4


def test_evaluations_count_in_the_time_of_training():
    """Those of nanochat's d20: 21,400 steps, bits per byte every 250 of them, CORE every 2,000."""
    model = base_model(config := BaseConfig(depth=20), 65536)
    read = estimate.validation_tokens(config, model, 21_400 * 524288, core=True)
    assert read == (86 + 1) * 20 * 524288 + 11 * 220e6 * 22 * 500 / 90_000
    quiet = dataclasses.replace(config, eval_every=-1)
    assert estimate.validation_tokens(quiet, model, 21_400 * 524288, core=False) == 0
    mid = MidConfig(total_batch_size=1000, eval_every=10, eval_tokens=500)
    assert estimate.validation_tokens(mid, model, 25_000, core=True) == (3 + 1) * 500
    sft = SFTConfig(eval_steps=5, eval_every=100, eval_metrics_every=200, eval_metrics_max_problems=10)
    conversations, problems = (3 + 1) * 5 * 4, 2 * 2 * 10  # 300 steps; MMLU and ARC twice
    assert estimate.validation_tokens(sft, model, 300 * 32 * 600, core=False) == conversations * 600 + problems * 150


def test_the_time_of_a_start_that_was_killed_counts(home):
    """Until the last line of its log."""
    state, step = State(home / "speedrun"), fake("a")
    state.begin(step)
    log = state.path("a", "log")
    log.write_text("a line")
    began = datetime.datetime.fromisoformat(state.record("a")["began"]).timestamp()
    os.utime(log, (began + 40, began + 40))
    state.begin(step)
    assert state.record("a")["seconds"] == 40
    state.end(step, 2.0, 75)
    state.begin(step)
    assert state.record("a")["seconds"] == 42  # that start's end was recorded
    state.begin(fake("a", flags="--other=1"))
    assert state.record("a")["seconds"] == 0


def test_the_plan_of_what_is_left(home, monkeypatch):
    """By what has run: its time, and its cost beside what is still to come."""
    plan = described("--preset=h100", "--price_per_hour=2")
    rows = dict(plan.rows(plan.steps[-2:], {step.name: 900.0 for step in plan.steps}, spent=1800.0))
    assert rows["time"] == "about 30m00s left (estimated from what has run)"
    assert rows["cost"] == "about 2.00 at 2 an hour in all"


def test_the_time_of_steps_beside_each_other():
    """Two downloads, the first of which the tokenizer waits for, and the rest base; then two steps side by side."""
    steps = [fake("first"), fake("rest"), fake("tok", "first"), fake("base", "tok rest"), fake("eval"), fake("mid")]
    steps[:2] = [dataclasses.replace(step, lane="network") for step in steps[:2]]
    times = {"first": 2.0, "rest": 10.0, "tok": 5.0, "base": 20.0, "eval": 3.0, "mid": 3.0}
    assert estimate.time_of(steps, times) == 2 + 10 + 20 + 3 + 3
    assert estimate.time_of(steps, times | {"rest": 0.0}) == 2 + 5 + 20 + 3 + 3  # it is done
    assert estimate.time_of(steps, times, parallel=2) == 2 + 10 + 20
    assert estimate.time_of([], {}) == 0


def runners_stub(step):
    running = object.__new__(runners.Running)
    running.step, running.began = step, time.monotonic()
    return running


def test_the_chain_undisturbed(home):
    assert Runner(chain(), State(home / "speedrun"), restarts=0).run() == 0
    check_chain(home, kills=0)


def described(*flags):
    return speedrun.make_plan(cli.parse(speedrun.Config, list(flags)))


def rows_of(plan):
    return dict(plan.rows(plan.steps, {step.name: 60 * step.minutes for step in plan.steps}))


@pytest.mark.parametrize("preset", [name for name in PRESETS if name != "cpu"])
def test_the_plan_agrees_with_the_commands(preset, home, monkeypatch):
    """Each command reads its flags by its own parser, and comes to the model and the steps that the plan shows."""
    plan = described(f"--preset={preset}")
    rows = rows_of(plan)
    for step in plan.steps:
        assert step.argv[:2] == (sys.executable, "-m") and step.minutes > 0
        if step.name in plan.flags:
            assert cli.parse(type(plan.flags[step.name]), list(step.argv[3:])) == plan.flags[step.name]
    depth = PRESETS[preset].depth
    base, vocab = plan.flags["base"], plan.flags["tokenizer"].vocab_size
    parameters = 12 * depth * (64 * depth) ** 2 + 2 * vocab * 64 * depth
    steps = 20 * parameters // base.total_batch_size
    if preset == "8xh100-2026":  # figures of nanochat's speedrun
        parameters, steps, base = 1_384_122_122, 5568, dataclasses.replace(base, total_batch_size=2**20)
        assert "climbmix" in rows["text"] and not {"mid", "chat-eval-mid"} & {step.name for step in plan.steps}
    assert f"{depth} layers × {64 * depth}, {parameters:,} parameters" in rows["model"]
    assert f"base {steps * base.total_batch_size:,}" in rows["tokens"]
    text = [step for step in plan.steps if step.name == "text"][0].argv[-1]
    assert text == f"--shards={plan.shards}" and f"{plan.shards} shards" in rows["text"]
    assert plan.shards * 250e6 / 4.8 > steps * base.total_batch_size  # bytes of text in a shard, and in a token
    if preset == "8xh100":
        assert "560,988,160" in rows["model"] and "11,219,763,200" in rows["tokens"] and "24 an hour" in rows["cost"]
        assert 51e9 < plan.disk(plan.steps) - plan.shards * 1e8 - 2e9 < 52e9  # ten checkpoints
        assert 2 < sum(step.minutes for step in plan.steps if step.name == "base") / 60 < 4


@pytest.mark.parametrize(
    "command", ["speedrun --preset=8xh100-2026 --no_check", "miniseries --depths=1 --base=--total_batch_size=2048"]
)
def test_the_devices_are_left_to_the_steps(home, command):
    """There is no TPU here, and JAX raises where it is to use one."""
    Tokenizer({bytes([b]): b for b in range(256)}).save()
    for name in ("a", "b"):
        (home / "base_data").mkdir(exist_ok=True)
        (home / f"base_data/{name}.parquet").touch()
    words = [sys.executable, "-m", *f"launch.{command} --dry_run".split()]
    done = subprocess.run(words, env=os.environ | {"JAX_PLATFORMS": "tpu"}, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "nothing was done" in done.stdout, done.stderr


@pytest.mark.parametrize("hosts_of_tpu", ["t1v-0:x:10.0.0.1", "t1v-0:x:10.0.0.1,t1v-1:x:10.0.0.2"])
def test_a_tpu_of_one_host_is_one_host(home, monkeypatch, hosts_of_tpu):
    """The presets v5e-8 and v6e-8 are such."""
    monkeypatch.setattr(hosts, "_has_tpu", lambda: True)
    monkeypatch.setattr(hosts, "_metadata", lambda name, environ: hosts_of_tpu)
    monkeypatch.delenv("TPU_SKIP_MDS_QUERY", raising=False)
    with pytest.raises(UserError, match="for one host" if "," in hosts_of_tpu else "which machine"):
        speedrun.run(speedrun.Config())


def test_steps_follow_from_what_they_need(home):
    plan = described("--preset=h100", "--model_tag=x")
    names = [step.name for step in plan.steps]
    of_tokenizer = {"tokenizer", "tokenizer-eval", "base", "base-eval", "mid", "chat-eval-mid", "sft", "chat-eval"}
    assert artifacts.dependents(plan.steps, {"tokenizer"}) == of_tokenizer | {"report"}
    assert artifacts.dependents(plan.steps, {"base-eval"}) == {"base-eval", "report"}
    assert artifacts.dependents(plan.steps, {"sft"}) == {"sft", "chat-eval", "report"}
    assert names.index("text") < names.index("tokenizer") and plan.steps[names.index("text")].lane == "network"
    given = described("--preset=h100", "--data_dir=here", "--tasks_dir=there", "--eval_bundle=none")
    assert not [step for step in given.steps if step.lane == "network"]
    [base] = [step for step in given.steps if step.name == "base"]
    assert "--data_dir=here" in base.argv and "bundle" not in " ".join(base.argv)


def test_a_text_of_few_shards_is_downloaded_by_one_step(home):
    plan = described("--preset=laptop")
    steps = {step.name: step for step in plan.steps}
    assert [*steps][:4] == ["text", "tasks", "bundle", "tokenizer"] and plan.shards <= presets.TOKENIZER_SHARDS
    assert steps["tokenizer"].needs == steps["text"].makes == (Files("base_data/*.parquet", least=plan.shards),)
    assert "while the tokenizer trains" not in rows_of(plan)["text"]


def test_help_names_the_steps():
    real, cpu = re.search(
        r"--redo: fit \(on GPUs\), (.*?);\s+with --preset=cpu: (.*?)\.\n", speedrun.Config.__doc__, re.S
    ).groups()
    for listed, flags in ((real, ["--preset=h100", "--rl"]), (cpu, ["--preset=cpu"])):
        assert f"{listed},".split() == [f"{step.name}," for step in described(*flags).steps if step.name != "fit"]


def test_the_tasks_are_those_that_are_downloaded():
    places = [getattr(download.SETS[name], "folder", "") or download.SETS[name].path for name in download.TASKS]
    assert [place.split("/")[:2] for place in places] == [["tasks", name] for name in presets.TASKS]


def test_the_cpu_preset_is_the_demo(home, monkeypatch):
    """The same commands with the same flags, but for --overwrite, which the runner replaces by --resume."""
    called = {}
    for module in (demo.tok_train, demo.base_train, demo.mid_train, demo.chat_sft):
        name = module.__name__
        monkeypatch.setattr(module, "main", lambda args, name=name: called.update({name: set(args) - {"--overwrite"}}))
    demo.train(demo.Config(), home / "tasks")
    plan = described("--preset=cpu")
    names = {"tokenizer": "tok_train", "base": "base_train", "mid": "mid_train", "sft": "chat_sft"}
    for name, command in names.items():
        flags = cli.parse(type(plan.flags[name]), sorted(called[f"launch.{command}"]))
        assert flags == dataclasses.replace(plan.flags[name], overwrite=False), name
    assert [step.name for step in plan.steps] == ["world", "tokenizer", "base", "mid", "sft", "score"]


@pytest.mark.parametrize(
    "flags, words",
    [
        ([], "which machine. give --preset=NAME"),
        (["--preset=laptop", "--base=--deepth=3"], "--base='--deepth=3': unknown flag --deepth; did you mean --depth"),
        (["--preset=laptop", "--sft=--resume"], "launch.speedrun sets --resume itself; leave it out"),
        (["--preset=laptop", "--mid=--num_iterations='3"], "--mid=.*No closing quotation"),
        (["--preset=laptop", "--model_tag=../x"], "must be a plain name"),
        (["--preset=cpu", "--depth=5"], "--depth does not go with --preset=cpu"),
        (["--preset=cpu", "--chat_eval=-x 3"], "--chat_eval='-x 3': this run has no such step"),
        (["--preset=laptop", "--chat_rl=--num_samples=3"], "this run has no such step; it needs --rl"),
    ],
)
def test_wrong_flags_are_refused(flags, words, home):
    with pytest.raises(UserError, match=words):
        described(*flags)
    assert not list(home.iterdir())


def test_a_disk_that_is_too_small_is_found_before_anything_starts(home, monkeypatch, capsys):
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=10**9))
    config = cli.parse(speedrun.Config, ["--preset=laptop", "--no_check"])
    with pytest.raises(UserError, match="of disk space, and 1.00 GB are free there; free some"):
        speedrun.run(config)
    assert "TOO LITTLE" in capsys.readouterr().out and not list(home.iterdir())


def test_a_machine_that_is_not_the_presets(home, monkeypatch, capsys):
    """What launch.check finds missing and no step brings stops the run in its first minute."""
    printed = "Check of d12\n  ok       driver   none\n  ok       devices  1 × cpu (data=1)\n"
    printed += "  missing  text     no text\n  missing  GSM8K    fetch it: python -m launch.download gsm8k\n"
    printed += "  ok       memory   25.28 GB a device\n  missing  mid disk  counted in the plan\n"
    real = subprocess.run
    monkeypatch.setattr(
        speedrun.subprocess,
        "run",
        lambda words, **more: SimpleNamespace(stdout=printed, stderr="") if "launch.check" in words else real(words),
    )
    with pytest.raises(UserError) as refusal:
        speedrun.run(cli.parse(speedrun.Config, ["--preset=h100"]))
    missing = "missing: devices: 1 × cpu (data=1), but the preset is for 1 × H100. Nothing was started; --no_check"
    assert missing in str(refusal.value)
    assert speedrun.run(cli.parse(speedrun.Config, ["--preset=h100", "--dry_run"])) == 0
    out = capsys.readouterr().out
    assert "  missing  devices  1 × cpu" in out and "25.28 GB" not in out and "counted in" not in out
    assert not list(home.iterdir())


def test_reinforcement_learning_is_a_step_that_is_asked_for(home):
    plan = described("--preset=h100", "--rl", "--chat_rl=--num_iterations=5 --save_every=2")
    names = [step.name for step in plan.steps]
    assert names[-4:] == ["chat-eval", "rl", "chat-eval-rl", "report"]
    step = plan.steps[-3]
    assert step.argv[2:4] == ("launch.chat_rl", "--save_every=2") and "--num_iterations=5" in step.argv
    assert "save_every" in step.free and "num_iterations" not in step.free
    assert artifacts.dependents(plan.steps, {"sft"}) == {"sft", *names[-4:]}
    assert "rl" not in [step.name for step in described("--preset=h100").steps]


@pytest.mark.slow
def test_the_command_on_real_text(run_command, home, shared_data):
    """The tokenizer alone, as a user calls it: trained once, trained again if damaged, refused with other flags."""
    flags = ["--preset=laptop", f"--data_dir={shared_data / 'pretrain'}", f"--tasks_dir={shared_data}", "--no_check"]
    flags += ["--eval_bundle=none", "--until=tokenizer", "--tokenizer=--vocab_size=300 --max_chars=100000"]
    first = run_command("launch.speedrun", *flags).stdout
    assert "100,000 characters read" in first and "all 1 steps are done, in " in first
    ranks = (home / "tokenizer/ranks.txt").read_bytes()
    again = run_command("launch.speedrun", *flags).stdout
    assert "characters read" not in again and "tokenizer  done" in again
    (home / "tokenizer/ranks.txt").write_text("damaged")
    assert "ranks.txt has changed since it was made" in run_command("launch.speedrun", *flags, "--dry_run").stdout
    assert "characters read" in run_command("launch.speedrun", *flags).stdout
    assert (home / "tokenizer/ranks.txt").read_bytes() == ranks
    other = [*flags[:-1], "--tokenizer=--vocab_size=301 --max_chars=100000"]
    refused = run_command("launch.speedrun", *other, check=False)
    assert refused.returncode == 2 and "--vocab_size=300, but would now run with --vocab_size=301" in refused.stderr
