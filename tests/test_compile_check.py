"""Compiling for devices that are not here: refusals, what is read from the program, and one TPU slice for real."""

import importlib.util
import json
import math
import os
from collections import Counter, defaultdict
from types import SimpleNamespace

import pytest

from jaxchat.config import REMATS, Compute, ModelConfig, UserError
from jaxchat.plan import hlo, roofline, topologies
from jaxchat.plan.step import Compiled, StepPlan
from jaxchat.train.fit import fits
from launch.compile_check import Config, memory, training_command


def needs(module: str, extra: str):
    return pytest.mark.skipif(importlib.util.find_spec(module) is None, reason=f"needs {module}: jaxchat[{extra}]")


needs_libtpu = needs("libtpu", "tpu")
SMALL = ("--depth=2", "--topology=v5e:2x4", "--max_seq_len=512", "--total_batch_size=16384", "--vocab_size=2048",
         "--remat=dots")  # fmt: skip
LARGE = ("--depth=4", "--topology=v5e:2x2", "--total_batch_size=4194304", "--device_batch_size=512", "--remat=dots")


@pytest.mark.parametrize("topology", ["v5e", "v9:2x2", "v5e:two", "h100", "h100:", "v5e:1x2x3x4"])
def test_an_unknown_topology(topology):
    with pytest.raises(UserError, match=f"--topology={topology} is not GENERATION:SHAPE"):
        topologies.devices_of(topology)


@pytest.mark.parametrize("topology, extra", [("v5e:4x4", "tpu"), ("h100:8", "gpu-plan")])
def test_what_is_not_installed(monkeypatch, topology, extra):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=f"make setup EXTRAS={extra}"):
        topologies.devices_of(topology)


PROGRAM = """HloModule jit_step

%body (p: (s32[], f32[8,32])) -> (s32[], f32[8,32]) {
  %p = (s32[], f32[8,32]{1,0}) parameter(0)
  %x = f32[8,32]{1,0} get-tuple-element(%p), index=1
  %w = f32[32,32]{1,0} constant({...})
  %conv = f32[8,32]{1,0} convolution(%x, %w), dim_labels=bf_io->bf
  %gathered = f32[64,32]{1,0} all-gather(%conv), channel_id=1, replica_groups=[2,8]<=[16], dimensions={0}
  %splash_fwd.2 = f32[8,32]{1,0} custom-call(%conv), custom_call_target="tpu_custom_call"
  ROOT %out = (s32[], /*index=1*/f32[8,32]{1,0}) tuple(%i, %splash_fwd.2)
}

%condition (p: (s32[], f32[8,32])) -> pred[] {
  %p.1 = (s32[], f32[8,32]{1,0}) parameter(0)
  ROOT %less = pred[] constant(true)
}

ENTRY %main (a: f32[8,32]) -> f32[8,32] {
  %a = f32[8,32]{1,0} parameter(0)
  %start = (s32[], f32[8,32]{1,0}) tuple(%zero, %a)
  %loop = (s32[], f32[8,32]{1,0}) while(%start), condition=%condition, body=%body, TRIPS
  %y = f32[8,32]{1,0} get-tuple-element(%loop), index=1
  %sums = (f32[8,32]{1,0}, f32[8,32]{1,0}) all-reduce-start(%y), replica_groups={{0,1},{2,3}}, to_apply=%add
  %sent = (f32[8,32]{1,0}, f32[8,32]{1,0}, u32[], u32[]) collective-permute-start(%y), source_target_pairs={{0,1},{1,0}}
  ROOT %z = f32[8,32]{1,0} collective-permute-done(%sent)
}
""".replace("TRIPS", 'backend_config={"known_trip_count":{"n":"5"}}')


def test_reading_a_program():
    program = hlo.read(PROGRAM)
    assert program.flops == 5 * 2 * 8 * 32 * 32
    assert program.kernels == {"splash_fwd": 5}
    gathered, row = 5 * 64 * 32 * 4 * 7 / 8, 8 * 32 * 4
    assert program.sent() == {"all-gather": gathered, "all-reduce": 2 * row / 2, "collective-permute": row}
    assert program.gathered() == {"f32": gathered}


@pytest.mark.parametrize(
    "groups, size",
    [
        ("replica_groups={{0,1,2},{3,4,5}}", 3),
        ("replica_groups=[4,2]<=[2,4]T(1,0)", 2),
        ("replica_groups=mesh['axis_0'=2,'axis_1'=8] {'axis_1'}", 8),
        ("replica_groups=mesh['data'=4,'fsdp'=2] {'data','fsdp'}, use_global", 8),
        ("replica_groups=mesh['data'=32,'fsdp'=2] {'data':(8)4}, use_global", 4),
        ("replica_groups=mesh['a'=8,'b'=1,'c'=2], device_ids=([2,8]T(1,0)) {'a'}, dimensions={0}", 8),
        ("replica_groups={}", 0),
        ("source_target_pairs={{0,1},{1,0}}", 2),
    ],
)
def test_who_takes_part(groups, size):
    assert hlo.group_size(f"all-reduce(%y), channel_id=1, {groups}, to_apply=%add") == size


def test_a_collective_woven_into_fusions():
    """As TPUs have it: started in one, going on in another beside a product, done in a third. It is one."""
    part = "%{0} (b: f32[8,32]) -> f32[64,32] {{\n  %b.{0} = f32[8,32]{{1,0}} parameter(0)\n  "
    part += "ROOT %g.{0} = f32[64,32]{{1,0}} all-gather(%b.{0}), replica_groups=[1,8]<=[8], dimensions={{0}}\n}}\n\n"
    names = {"async-collective-start.1": "fused.1", "fusion.7": "async_collective_fusion.7"}
    names |= {"async-collective-done.1": "fused.2"}
    calls = "".join(
        f"  %{op} = f32[64,32]{{1,0}} fusion(%a), kind=kCustom, calls=%{called}\n" for op, called in names.items()
    )
    main = "ENTRY %main (a: f32[8,32]) -> f32[8,32] {\n  %a = f32[8,32]{1,0} parameter(0)\n" + calls + "}\n"
    assert hlo.read("".join(map(part.format, names.values())) + main).sent() == {"all-gather": 64 * 32 * 4 * 7 / 8}


def test_a_loop_whose_bound_is_in_its_condition():
    """As TPUs' programs have it, where windows of a product may be taken two at a time."""
    text = PROGRAM.replace(', backend_config={"known_trip_count":{"n":"5"}}', "")
    text = text.replace("pred[] constant(true)", "pred[] compare(%i.1, %bound), direction=LT").replace(
        "  %p.1 =", "  %bound = s32[]{:T(128)} constant(6)\n  %i.1 = s32[] get-tuple-element(%p.1), index=0\n  %p.1 ="
    )
    for step, times in ((1, 6), (2, 3)):
        counted = f"  %c = s32[] constant({step})\n  %i = s32[] add(%j, %c)\n  ROOT %out ="
        assert hlo.read(text.replace("  ROOT %out =", counted)).flops == times * 2 * 8 * 32 * 32


def test_a_batched_product_as_a_convolution():
    """As TPUs compile bij,bjk->bik for 4 matrices: the batch is a window of 4 of which one place in four meets."""
    text = """ENTRY %main (a: f32[4,8,16]) -> f32[4,8,32] {
  %a = f32[4,8,16]{2,1,0} parameter(0)
  %b = f32[4,16,32]{2,1,0} parameter(1)
  ROOT %c = f32[4,8,32]{2,1,0} convolution(%a, %b), window={size=4 stride=3 lhs_dilate=4}, dim_labels=0bf_0io->0bf
}
"""
    assert hlo.read(text).flops == 4 * 2 * 8 * 16 * 32


def test_a_window_that_is_half_padding():
    """A weight's gradient as a v5e computes it: two shards of it at once, over 2 rows of 512 tokens."""
    text = """ENTRY %main (a: bf16[2,512,512,1]) -> bf16[512,2,16,1] {
  %a = bf16[2,512,512,1]{1,2,0,3} parameter(0)
  %b = bf16[2,512,2,16]{1,3,2,0} parameter(1)
  ROOT %c = bf16[512,2,16,1]{0,2,1,3} convolution(%a, %b), window={size=2x2 pad=1_1x0_0 rhs_reversal=1x0}, LABELS
}
""".replace("LABELS", "dim_labels=1fb0_1i0o->b0f1")
    assert hlo.read(text).flops == 2 * (2 * 512) * 512 * 32


def test_what_to_train_with():
    command = "python -m launch.base_train --depth=4 --device_batch_size=2"
    assert training_command(Config(depth=4, topology="v5e:2x2"), 2) == command
    assert training_command(Config(depth=4, remat="full"), 2) == f"{command} --remat=full"
    changed = Config(depth=4, total_batch_size=16384, max_seq_len=512, mesh="fsdp=4")
    assert training_command(changed, 2) == f"{command} --total_batch_size=16384 --max_seq_len=512 --mesh=fsdp=4"


def plan_where(fitting, batch: int, **fields) -> StepPlan:
    """A plan of 8 rows on one device whose step fits where `fitting(batch, remat)` says so: nothing is compiled."""
    plan = StepPlan.__new__(StepPlan)  # no topology: its compiler may not be here
    plan.batches, plan.batch, plan.remats = [1, 2, 4, 8], batch, lambda batch: REMATS
    plan.compile = lambda batch, remat: Compiled(batch, remat, 1e9, fitting(batch, remat), 0.0)
    vars(plan).update(fields)
    return plan


@pytest.mark.parametrize("remat, fitting", [("none", 0), ("dots", 1), ("full", 2), ("full", 3)])
def test_the_first_remat_that_fits(remat, fitting):
    """Where none does, the last."""
    plan = plan_where(lambda batch, remat: remat in REMATS[fitting:], 2)
    done = plan.fit(2)
    assert (done.fits, done.remat) == (fitting < 3, remat)


@pytest.mark.parametrize("planned, best", [(1, (4, "full")), (4, (4, "full")), (8, (4, "full"))])
def test_the_largest_batch(planned, best):
    """None fits up to 1 row, dots up to 2, full up to 4."""
    limits = dict(zip(REMATS, (1, 2, 4), strict=True))
    plan = plan_where(lambda batch, remat: batch <= limits[remat], planned)
    found = plan.largest(plan.fit(planned))
    assert (found.batch, found.remat) == best


def test_fewer_rows_may_need_less_recomputation():
    """A plan of 8 rows fits with no remat; 4 rows fit with the first: the search downwards begins anew."""
    plan = plan_where(lambda batch, remat: batch <= 4, 8)
    found = plan.largest(plan.fit(8))
    assert (found.batch, found.remat) == (4, "none")
    assert plan_where(lambda *_: False, 2).largest(Compiled(2, "full", 1e9, False, 0.0)) is None


@pytest.mark.parametrize(
    "backend, needed, words",
    [
        ("gpu", 15e9, "15.0 GB (by the compiler's count) of a device's 16.9 GB: it fits"),
        ("gpu", 18.9e9, "18.9 GB (by the compiler's count) of a device's 16.9 GB: too much"),
        (
            "tpu",
            18.9e9,
            "18.9 GB (by the compiler's count), which on TPUs can be more than it takes; it compiled, so it fits",
        ),
    ],
)
def test_memory(backend, needed, words):
    """On a TPU what compiles fits, whatever the sum, so nothing is compared."""
    plan = plan_where(None, 2, memory=16.9e9, backend=backend)
    enough = fits(needed, plan.memory, backend, last=True)
    assert memory(plan, Compiled(2, "full", needed, enough, 0.0)) == words


@pytest.mark.slow
@needs_libtpu
def test_a_tpu_slice_of_2026(run_command):
    """Several micro-batches with weights that each device holds whole, which a pass of XLA fails at."""
    flags = [*SMALL, "--arch=2026", "--device_batch_size=2", "--no_find_batch", "--json"]
    figures = json.loads(run_command("launch.compile_check", *flags).stdout.splitlines()[-2])
    assert figures["fits"] and figures["micro_batches"] == 2


@pytest.mark.slow
@needs_libtpu
def test_a_tpu_slice(run_command):
    """The real step for 8 chips: what it computes, by which kernel."""
    done = run_command("launch.compile_check", *SMALL, "--device_batch_size=2", "--no_find_batch", "--json")
    *_, figures, told = done.stdout.splitlines()
    figures = json.loads(figures)
    assert figures["fits"] and figures["micro_batches"] == 2 and told.startswith("next: ")
    assert figures["mesh"] == {"data": 1, "fsdp": 8, "tensor": 1}
    # A layer's attention is computed forward, again in the backward pass, and backward.
    splash = {name: n for name, n in figures["kernels"].items() if "splash" in name}
    assert sum(splash.values()) == 2 * 2 * 3, figures["kernels"]
    # All other products, exactly: 6 FLOPs a weight and token, and Newton–Schulz of one of the two layers a device.
    D, F, tokens = 128, 512, 16384 // 8
    square, wide = 5 * 3 * 2 * D**3, 4 * 2 * D * D * F + 14 * 2 * D**3  # five steps one by one; three and two together
    layer = 4 * square + 2 * wide
    assert figures["flops"] == 6 * (2 * 12 * D * D + 2048 * D) * tokens + layer
    assert sum(figures["sent"].values()) > 0


@pytest.mark.slow
@needs_libtpu
def test_more_than_a_chip_holds(run_command):
    done = run_command("launch.compile_check", *LARGE, "--no_find_batch", check=False)
    assert done.returncode == 2 and "too much" in done.stdout
    assert "error: a step of 512 rows a device needs" in done.stderr and "lower --device_batch_size=512" in done.stderr


@pytest.mark.slow
@needs("jax_cuda13_plugin", "gpu-plan")
def test_an_h100(run_command, monkeypatch, tmp_path):
    """The step as compiled for one: cuDNN's attention, all products of bfloat16 numbers, never whole logits."""
    vocab, rows, time = 4096, 8, 2048
    shape = {"max_seq_len": time, "device_batch_size": rows, "total_batch_size": 2 * rows * time, "vocab_size": vocab}
    flags = [f"--{name}={value}" for name, value in (shape | {"depth": 2, "topology": "h100:1"}).items()]
    monkeypatch.setenv("XLA_FLAGS", f"{os.environ['XLA_FLAGS']} --xla_dump_to={tmp_path}")
    done = run_command("launch.compile_check", *flags, "--remat=dots", "--no_find_batch", "--json")
    # A layer's attention of 2 micro-batches: forward, again in the backward pass, and backward.
    kernels = json.loads(done.stdout.splitlines()[-2])["kernels"]
    assert kernels["__cudnn$fmhaSoftmax"] == 2 * 2 * 2 and kernels["__cudnn$fmhaSoftmaxBackward"] == 2 * 2
    [options] = tmp_path.glob("*jit_step.debug_options")  # XLA may not compute again what "dots" keeps
    assert 'xla_disable_hlo_passes: "rematerialization"' in options.read_text()
    [text] = tmp_path.glob("*jit_step*after_optimizations.txt")
    parts, _ = hlo.computations(text.read_text())
    operations = [op for part in parts.values() for op in part]
    by_name = {op.name: op for op in operations}
    products = [op for op in operations if op.kind == "dot" or "__cublas" in op.text]
    read_types = {by_name[name].shapes[0][0] for op in products for name in op.operands}
    scopes = {scope for scope in ("projections", "mlp", "loss", "optimizer") for op in products if scope in op.text}
    assert read_types == {"bf16"} and len(scopes) == 4, (read_types, scopes)
    largest = max(math.prod(dims) for op in operations for _, dims in op.shapes)
    assert largest == Compute.for_backend(backend="gpu").loss_chunk_tokens * vocab == rows * time * vocab // 2


@pytest.mark.slow
@needs("jax_cuda13_plugin", "gpu-plan")
def test_gradients_cross_h100s_in_float32(run_command, monkeypatch, tmp_path):
    """Whatever is summed over 8 GPUs is, of every weight; weights are gathered, and updates exchanged, in bfloat16."""
    vocab, width = 4096, 128
    shape = {"depth": 2, "topology": "h100:8", "max_seq_len": 512, "device_batch_size": 2, "vocab_size": vocab}
    flags = [f"--{name}={value}" for name, value in (shape | {"total_batch_size": 8 * 2 * 512}).items()]
    monkeypatch.setenv("XLA_FLAGS", f"{os.environ['XLA_FLAGS']} --xla_dump_to={tmp_path}")
    run_command("launch.compile_check", *flags, "--remat=dots", "--no_find_batch")
    [text] = tmp_path.glob("*jit_step*after_optimizations.txt")
    crossing = hlo.read(text.read_text()).collectives
    sums = [c for c in crossing if c.kind in ("all-reduce", "reduce-scatter")]
    assert {kind for c in sums for kind, _ in c.shapes} == {"f32"}, sums
    weights = 2 * 12 * width**2 + 2 * vocab * width
    assert sum(c.sent * c.times for c in sums if c.kind == "reduce-scatter") == 7 / 8 * 4 * weights
    gathered = [c for c in crossing if c.kind == "all-gather"]
    assert {kind for c in gathered for kind, dims in c.shapes if math.prod(dims) > width} == {"bf16"}


@pytest.mark.slow
@needs("jax_cuda13_plugin", "gpu-plan")
def test_an_h100_decodes(run_command):
    """Two layers of depth 20, 1 row and 64. The loop writes the cache in place and copies none of it. 64 rows attend by
    the kernel that reads rows as far as they reach; for one row no product is written out number by number, and a
    token takes at most 200 kernels at depth 20, the likeliest sampled.

    (For a single row the XLA of jax 0.10 and 0.11 made of a gather what it then refused: nobody could chat.)
    """
    found = json.loads(run_command("tests.decode_process", timeout=1200).stdout.splitlines()[-1])
    weight = 1280 * 5120 * 2
    for rows, loop in found.items():
        assert loop["written_in_place"] > loop["cache"] == 2 * 2 * int(rows) * 2048 * 1280 * 2 + 4 * int(rows)
        assert loop["copied"] < loop["cache"] / 32, loop  # logits, at most
        assert loop["temporary"] < loop["cache"] / 2
    assert found["1"]["largest"] < weight / 4
    assert found["64"]["attention"] == 2 and found["64"]["kernels"] < 80
    assert found["1"]["kernels"] < 80 and found["1"]["d20_kernels"] <= 200, found


def test_the_work_of_each_part():
    """Bytes of arrays that are read and written, of a slice only the slice, by the scope in the operation's name."""
    text = """HloModule m
%fused (p: f32[4,8,32], i: s32[], w: f32[32,16]) -> f32[8,16] {
  %p = f32[4,8,32]{2,1,0} parameter(0)
  %i = s32[] parameter(1)
  %w = f32[32,16]{1,0} parameter(2)
  %named = f32[4,8,32]{2,1,0} bitcast(%p)
  %slice = f32[1,8,32]{2,1,0} dynamic-slice(%named, %i), dynamic_slice_sizes={1,8,32}
  %x = f32[8,32]{1,0} bitcast(%slice)
  ROOT %dot = f32[8,16]{1,0} dot(%x, %w), lhs_contracting_dims={1}, metadata={op_name="jit(step)/transpose(mlp)/dot"}
}

ENTRY %main (a: f32[4,8,32], n: s32[], b: f32[32,16]) -> f32[8,16] {
  %a = f32[4,8,32]{2,1,0} parameter(0)
  %n = s32[] parameter(1)
  %b = f32[32,16]{1,0} parameter(2)
  %near = f32[32,16]{1,0:T(8,128)S(1)} copy(%b), metadata={op_name="jit(step)/optimizer/copy"}
  %y = f32[8,16]{1,0} fusion(%a, %n, %near), kind=kOutput, calls=%fused
  ROOT %z = f32[8,16]{1,0} negate(%y)
}
"""
    parts = hlo.read(text).parts
    row, weight, result = 8 * 32 * 4, 32 * 16 * 4, 8 * 16 * 4
    assert {name: work.bytes for name, work in parts.items() if work.bytes} == {
        "optimizer": weight, "mlp": row + 4 + result, "rest": 2 * result
    }  # fmt: skip
    assert {name: work.flops for name, work in parts.items() if work.flops} == {"mlp": 2 * 8 * 32 * 16}


def test_bounds_of_parts():
    """A v5e computes 197 TFLOP/s, moves 0.82 TB/s and sends 90 GB/s; attention of one layer, 2 tokens in 4 rows."""
    device = SimpleNamespace(device_kind="TPU v5 lite")
    sent = [hlo.Collective("all-gather", (), 8, 9e9, 2), hlo.Collective("all-reduce", (), 2, 9e9, 1)]
    work = {"mlp": hlo.Work(197e12, 0.41e12), "optimizer": hlo.Work(0.0, 1.64e12), "attention": hlo.Work()}
    program = hlo.Program(sent, Counter(), defaultdict(hlo.Work, work))
    found = roofline.bounds(program, device, attention=19.7e12)
    want = {"mlp": (1, "FLOPs"), "optimizer": (2, "memory"), "attention": (0.1, "FLOPs"), "collectives": (0.3, "links")}
    assert {name: (pytest.approx(bound.seconds), bound.limit) for name, bound in found.items()} == want
    apart = roofline.bounds(program, device, attention=0.0, far=True)["collectives"].seconds
    assert apart == pytest.approx(0.2 + 9e9 / 6.25e9)
    assert roofline.bounds(program, SimpleNamespace(device_kind="cpu"), 0.0) == {}
    model = ModelConfig(sequence_len=64, vocab_size=8, n_layer=3, n_head=2, n_kv_head=2, n_embd=32)
    assert roofline.attention_flops(model, 128, 64, again=False) == 3 * 4 * 32 * 32 * 128 * 3.5


def test_products_of_a_library_are_counted():
    """2·M·K·N FLOPs, from the text that XLA writes for cuBLASLt: its first result is the product."""
    dims = '{"lhs_contracting_dimensions":["1"],"rhs_contracting_dimensions":["0"]}'
    program = hlo.read(f"""HloModule m, num_partitions=1
ENTRY %main (a: f8e4m3fn[64,32], b: f8e4m3fn[32,16]) -> bf16[64,16] {{
  %a = f8e4m3fn[64,32]{{1,0}} parameter(0)
  %b = f8e4m3fn[32,16]{{1,0}} parameter(1)
  ROOT %g = (bf16[64,16]{{1,0}}, s8[99]{{0}}) custom-call(%a, %b), custom_call_target="__cublas$lt$matmul$f8", \
backend_config={{"gemm_backend_config":{{"dot_dimension_numbers":{dims}}}}}
}}""")
    assert (program.flops, program.float8_products) == (2 * 64 * 32 * 16, 1)


@pytest.mark.slow
@needs("jax_cuda13_plugin", "gpu-plan")
def test_float8_products_on_h100s(run_command):
    """Three a product of each layer, all counted in FLOPs. Their weights are gathered once, a byte each."""
    depth, vocab, width = 4, 4096, 256
    shape = {"depth": depth, "topology": "h100:8", "max_seq_len": 512, "device_batch_size": 2, "vocab_size": vocab}
    flags = [f"--{name}={value}" for name, value in (shape | {"total_batch_size": 8 * 2 * 512}).items()]
    flops = set()
    for matmul, products, weights in (("fp8-all", 6, 12 * width**2), ("fp8", 2, 8 * width**2)):
        done = run_command("launch.compile_check", *flags, "--no_find_batch", "--json", f"--matmul={matmul}")
        figures = json.loads(done.stdout.splitlines()[-2])
        assert figures["float8_products"] == depth * products * 3
        flops.add(figures["flops"])
        others = depth * (12 * width**2 - weights) + 2 * vocab * width  # the embedding and the head among them
        assert figures["gathered"] == {"f8e4m3fn": 7 / 8 * depth * weights, "bf16": pytest.approx(7 / 8 * 2 * others)}
        assert " GB, half of the " in done.stdout
    assert len(flops) == 1 and flops.pop() > 0
