"""launch.miniseries and its fits: known exponents recovered within their intervals, plots, page, runs that resume."""

import dataclasses
import json
import re
import shutil
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from scipy import stats
from test_report import write_stage

from jaxchat.config import BaseConfig, UserError
from jaxchat.model.flops import num_params
from jaxchat.scaling import fits, page, plots
from jaxchat.scaling.fits import Point
from jaxchat.tokenizer import Tokenizer
from jaxchat.train.stages import base_model, horizon_of
from launch import cli, miniseries

E, A, ALPHA, B, BETA = 0.9, 30.0, 0.34, 60.0, 0.28  # bits per byte


def synthetic(seed, noise, budgets=(1e15, 4e15, 1.6e16, 6.4e16), models=6, spread=8.0):
    """Runs of a law that is known: around the best size of each budget, with noise on the loss."""
    random, points = np.random.default_rng(seed), []
    for budget in budgets:
        best = (ALPHA * A / (BETA * B)) ** (1 / (ALPHA + BETA)) * (budget / 6) ** (BETA / (ALPHA + BETA))
        for n in best * np.geomspace(1 / spread, spread, models):
            d = budget / 6 / n
            loss = (E + A * n**-ALPHA + B * d**-BETA) * np.exp(noise * random.standard_normal())
            points.append(Point(f"{n:.3g}", n, d, budget, loss, budget=budget))
    return points


def covered(estimate, truth):
    return estimate.low <= truth <= estimate.high


@pytest.fixture(autouse=True)
def few_draws(monkeypatch):
    monkeypatch.setattr(fits, "DRAWS", 80)  # enough to see that an interval is one


def test_known_exponents_are_recovered_within_their_intervals(monkeypatch):
    """Of six series with other noise, at least five: an interval of 95 % misses one in twenty."""
    monkeypatch.setattr(fits, "DRAWS", 200)
    hits = {"a": 0, "b": 0, "surface a": 0, "alpha": 0, "beta": 0}
    for seed in range(6):
        points = synthetic(seed, noise=0.002)
        iso, law = fits.iso_flop(points), fits.surface(points)
        hits["a"] += covered(iso.a, BETA / (ALPHA + BETA))
        hits["b"] += covered(iso.b, ALPHA / (ALPHA + BETA))
        hits["surface a"] += covered(law.a, BETA / (ALPHA + BETA))
        hits["alpha"] += covered(law.alpha, ALPHA)
        hits["beta"] += covered(law.beta, BETA)
        assert iso.a.high - iso.a.low < 0.3 and law.alpha.high - law.alpha.low < 0.6  # which says something
    assert min(hits.values()) >= 5, hits


def test_without_noise_the_law_is_found_exactly():
    points = synthetic(0, noise=0.0)
    law = fits.surface(points)
    found = [getattr(law, name).value for name in ("E", "A", "alpha", "B", "beta")]
    np.testing.assert_allclose(found, [E, A, ALPHA, B, BETA], rtol=1e-3)  # the optimizer's own tolerance
    np.testing.assert_allclose(law.loss(1e6, 1e8), E + A * 1e6**-ALPHA + B * 1e8**-BETA, rtol=1e-6)
    iso = fits.iso_flop(points)
    # A parabola is not the curve: on sizes that lie the same about each minimum, all are off by one factor.
    assert iso.a.value == pytest.approx(BETA / (ALPHA + BETA), abs=1e-3)
    assert iso.a.value + iso.b.value == pytest.approx(1, abs=1e-6)  # C = 6·N·D
    assert len(iso.minima) == 4 and all(found.inside for found in iso.minima)


def test_too_few_runs_are_no_law():
    points = synthetic(0, noise=0.002, models=4)
    one = [point for point in points if point.budget == 1e15]
    assert fits.iso_flop(one) is None and fits.surface(one) is None and len(fits.by_budget(one)) == 1
    ratio = [Point("x", n, 20 * n, 120 * n * n, E + A * n**-ALPHA, None) for n in np.geomspace(1e6, 1e8, 8)]
    assert fits.iso_flop(ratio) is None and fits.surface(ratio) is None  # of one dial
    two = [dataclasses.replace(p, budget=c) for c in (1e15, 4e15) for p in points if p.budget == c][:3]
    assert fits.iso_flop(two) is None


def test_three_models_a_budget_take_their_interval_from_the_power_law():
    points = synthetic(1, noise=0.002, models=3)
    iso = fits.iso_flop(points)
    assert np.isnan(iso.noise) and covered(iso.a, BETA / (ALPHA + BETA))
    assert np.isnan(fits.iso_flop([p for p in points if p.budget < 1e16]).a.low)  # two budgets: no interval


def test_a_slope_and_students_interval():
    """Against the formulas of least squares."""
    x = np.geomspace(1, 100, 6)
    y = 3 * x**-0.5 * np.exp(0.05 * np.random.default_rng(0).standard_normal(6))
    found, (slope, intercept), log_x = fits.slope_of(x, y), fits.power_law(x, y), np.log(x)
    left = np.log(y) - slope * log_x - intercept
    half = stats.t.ppf(0.975, 4) * np.sqrt(left @ left / 4 / np.sum((log_x - log_x.mean()) ** 2))
    np.testing.assert_allclose([found.value, found.low, found.high], [slope, slope - half, slope + half])
    assert fits.slope_of(x[:2], y[:2]).value < 0 and np.isnan(fits.slope_of(x[:2], y[:2]).low)


def test_an_optimum_outside_of_the_models_is_said():
    points = [p for p in synthetic(2, noise=0.001, spread=8.0, models=8)]
    small = [p for budget in sorted({p.budget for p in points}) for p in points if p.budget == budget]
    small = [p for group in np.split(np.array(small, object), 4) for p in group[:3]]
    iso = fits.iso_flop(small)
    assert iso and not any(found.inside for found in iso.minima)
    text = "\n".join(page.said(small, iso, None))
    assert text.count(page.OUTSIDE) == 4


def test_the_page():
    points = [dataclasses.replace(p, core=0.1 + i / 100) for i, p in enumerate(synthetic(3, noise=0.002))]
    iso, law = fits.iso_flop(points), fits.surface(points)
    images = plots.plots(points, iso)
    assert [*images] == ["isoflop.png", "optimal.png", "loss.png", "core.png"]
    assert all(png.startswith(b"\x89PNG") for _, png in images.values())
    text = page.markdown("a series", points, images, page.said(points, iso, law))
    assert text.count("\n| ") == 1 + 24 + 1 + 1 + 4 + 1 and f"a = {page.shown(iso.a)}" in text
    assert f"alpha = {page.shown(law.alpha)}" in text and "](optimal.png)" in text


@pytest.fixture
def prepared(home, monkeypatch):
    """A base directory with text and a tokenizer, and a base_train that only leaves what a trained model does.

    Its bits per byte follow the synthetic law.
    """
    (home / "base_data").mkdir()
    for n in range(2):
        pq.write_table(pa.table({"text": [f"some text {n}"]}), home / f"base_data/shard_{n}.parquet")
    monkeypatch.setattr(Tokenizer, "load", classmethod(lambda cls, directory=None: SimpleNamespace(vocab_size=300)))
    (home / "tokenizer").mkdir()
    (home / "tokenizer/ranks.txt").write_text("ranks")

    def python(module, *flags):
        given = cli.parse(BaseConfig, list(flags))
        model = base_model(given, 300)
        tokens = horizon_of(given, model).tokens
        law = E + A * num_params(model) ** -ALPHA + B * tokens**-BETA
        folder = home / "prepared" / given.model_tag / "base_checkpoints" / given.model_tag
        if not folder.exists():
            write_stage(
                home / "prepared" / given.model_tag, "base", given.model_tag, tokens=tokens / 40, model=vars(model)
            )
            with (folder / "metrics.jsonl").open("a") as file:
                file.write("\n" + json.dumps({"step": 40, "val_bpb": law}) + "\n")
        copy = f"echo {given.model_tag} >> {home}/ran; mkdir -p {home}/base_checkpoints; "
        return ("sh", "-c", f"{copy} cp -r {folder} {home}/base_checkpoints/", module, *flags)

    monkeypatch.setattr(miniseries, "python", python)
    monkeypatch.setattr(miniseries, "visible_gpus", lambda: [])
    return home


SMALL = ["--base=--max_seq_len=32 --total_batch_size=256"]


def test_the_command(prepared, capsys):
    """All runs, the fits and the page; again: nothing is trained, and the page comes out the same."""
    flags = ["--depths=1,2,3,4", "--budgets=1e11,4e11,1.6e12", "--name=mini", *SMALL]
    miniseries.main([*flags, "--dry_run"])
    assert not (prepared / "ran").exists() and "nothing was done" in capsys.readouterr().out
    miniseries.main([*flags, "--parallel=2"])
    out = capsys.readouterr().out
    names = [f"mini-d{depth}-{budget}" for budget in ("1e11", "4e11", "1.6e12") for depth in (1, 2, 3, 4)]
    assert sorted((prepared / "ran").read_text().split()) == sorted(names)
    assert "loss = E + A/N^alpha" in out
    text = (prepared / "report/mini/report.md").read_text()
    assert text.count("\n| d") == 12 and "](isoflop.png)" in text
    rows = [json.loads(line) for line in (prepared / "report/mini/points.jsonl").read_text().splitlines()]
    assert [row["budget"] for row in rows] == [1e11] * 4 + [4e11] * 4 + [1.6e12] * 4
    assert rows[8]["flops"] == pytest.approx(1.6e12, rel=0.1)  # in whole steps
    shutil.rmtree(prepared / "base_checkpoints/mini-d2-4e11")
    miniseries.main(flags)
    assert (prepared / "ran").read_text().split()[12:] == ["mini-d2-4e11"]
    assert (prepared / "report/mini/report.md").read_text() == text


def test_2026_chooses_its_own_batch(prepared, capsys):
    miniseries.main(["--depths=2,4", "--base=--arch=2026 --max_seq_len=32", "--dry_run"])
    assert len(re.findall(r"d[24] +[\d,]+ parameters, [1-9][\d,]* steps\n", capsys.readouterr().out)) == 2


def test_one_dial_and_redo(prepared, capsys):
    miniseries.main(["--depths=3,1", *SMALL])
    assert (prepared / "ran").read_text().split() == ["miniseries-d1", "miniseries-d3"]
    assert "it needs seven runs" in capsys.readouterr().out
    miniseries.main(["--depths=3,1", *SMALL, "--redo=d3"])
    assert (prepared / "ran").read_text().split()[2:] == ["miniseries-d3"]
    other = ["--depths=3,1", "--base=--max_seq_len=64 --total_batch_size=256"]
    with pytest.raises(UserError, match="step d1: it was run with .*--max_seq_len=32.*, but would now run with"):
        miniseries.run(cli.parse(miniseries.Config, other))


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--depths=2,x"], "--depths=2,x; it must be positive whole numbers separated by commas"),
        (["--depths=2.5"], "positive whole numbers"),
        (["--depths=inf"], "positive whole numbers"),
        (["--depths=2", "--budgets=1e9,nan"], "--budgets=1e9,nan; it must be positive numbers"),
        (["--budgets=1e12,-1"], "--budgets=1e12,-1; it must be positive numbers"),
        (["--budgets=10"], "--target_flops=10 is less than one step"),
        (["--base=--depth=3"], "launch.miniseries sets --depth itself"),
        (["--budgets=1e12", "--base=--num_iterations=3"], "sets --num_iterations itself"),
        (["--depths=2", "--redo=d9", *SMALL], "there is no step 'd9'; the steps are d2"),
        (["--name=a/b"], "must be a plain name"),
    ],
)
def test_wrong_flags(flags, words, prepared):
    with pytest.raises(UserError, match=words):
        miniseries.run(cli.parse(miniseries.Config, flags))


def test_gpus_are_shared_out(monkeypatch):
    monkeypatch.setattr(miniseries, "visible_gpus", lambda: ["0", "1", "2", "3"])

    def seen(parallel):
        places = miniseries.places_of(miniseries.Config(parallel=parallel))
        return [place["CUDA_VISIBLE_DEVICES"] for place in places]

    assert seen(0) == ["0", "1", "2", "3"] and seen(2) == ["0,1", "2,3"] and seen(1) == ["0,1,2,3"]
    flops = {parallel: miniseries.machine_of(miniseries.Config(parallel=parallel)).flops for parallel in (0, 2)}
    assert flops[2] == 2 * flops[0] == pytest.approx(2 * 0.4 * 989e12)  # of two GPUs, of one
    with pytest.raises(UserError, match="--parallel=5 is more than the 4 GPUs"):
        seen(5)
