"""Compile a step for devices you don't have: python -m launch.compile_check --depth=20 --topology=v5e:4x4"""

import dataclasses
import json
import os

from jaxchat.config import ALL_REMATS, ARCHITECTURES, MOST_TOKENS, BaseConfig, Flags, UserError, counted, flag
from launch import cli


@dataclasses.dataclass(frozen=True)
class Config(Flags):
    """Compile the training step of base_train for a TPU slice or GPUs that this host lacks. Print what the
    step needs per device (memory, FLOPs, collectives, kernels) and the largest batch that fits."""

    arch: str = flag("2025", choices=tuple(ARCHITECTURES))
    """Architecture and optimizer, as in base_train: 2025 or 2026."""
    depth: int = flag(20, 1)
    """Number of layers, as in base_train."""
    topology: str = "v5e:4x4"
    """Devices to compile for: v4, v5e, v5p, v6e or tpu7x with the chips along each side, as in v5p:4x4x4; or
    GPUs, as in h100:8, h200:8 or h100:2x8 (two hosts of 8)."""
    num_slices: int = flag(1, 1)
    """Number of slices of --topology, connected by the data-centre network."""
    mesh: str = ""
    """Number of devices along each axis of the mesh, as in base_train; empty: as base_train chooses."""
    device_batch_size: int = flag(-1, 1, special=-1)
    """Rows a device computes at a time; -1: the largest divisor, up to 32, of the device's rows per step."""
    total_batch_size: int = flag(524288, 1, 2**31 - 1)
    """Tokens in an optimizer step, over all devices. The default is that of base_train --arch=2025; with
    --arch=2026, base_train chooses a number and prints it in its plan."""
    max_seq_len: int = flag(2048, 1)
    """Tokens in a training row."""
    vocab_size: int = flag(65536, 1, MOST_TOKENS)
    """Size of the vocabulary."""
    matmul: str = flag("", choices=("", "fp8", "fp8-all"))
    """Number format of the operands of the layers' matrix products, as in base_train: "fp8" or "fp8-all"
    (GPUs only); empty: bfloat16."""
    remat: str = flag("auto", choices=("auto", *ALL_REMATS))
    """What the backward pass recomputes, as in base_train: "none", "dots", "full" or "step"; "auto": the
    fastest of these that fits in memory. Each try takes one compilation."""
    find_batch: bool = True
    """Also search for the largest device batch that fits. Each try takes one compilation."""
    json: bool = False
    """Also print the results (memory, FLOPs, bytes sent, …) as one line of JSON."""


def run(config: Config):
    # Set before JAX reads it, because only descriptions of devices are used.
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    from jaxchat import sharding
    from jaxchat.model.flops import flops_per_token, num_params
    from jaxchat.plan import step, topologies

    topologies.compile_only()
    plan = step.StepPlan(config)
    batch = f"{counted(plan.batch, 'row')} × {counted(plan.shards, 'device')}"
    batch += f" × {plan.accumulated} accumulated × {config.max_seq_len} tokens"
    model = f"{num_params(plan.model):,} parameters; {flops_per_token(plan.model):,} FLOPs a token"
    cli.print_plan(
        f"Compiling the step of d{config.depth} for {config.topology}",
        [
            ("model", model),
            ("devices", f"{sharding.describe(plan.mesh)}, {plan.memory / 1e9:.0f} GB each"),
            ("batch", batch),
            ("takes", "some minutes per compilation (about one for GPUs)"),
        ],
    )
    done = plan.fit(plan.batch)
    cli.print_plan("One step", rows_of(plan, done))
    figures = figures_of(plan, done)
    if config.find_batch:
        best = plan.largest(done)
        figures["largest_device_batch"] = best.batch if best else 0
        found = best and f"largest device batch that fits: {best.batch} rows, with --remat={best.remat}"
        print(found or "no device batch fits, not even one row")
    if config.json:
        print(json.dumps(figures))
    if not done.fits:
        raise UserError(remedy(plan, done, figures.get("largest_device_batch")))
    cli.next_step(training_command(config, plan.batch))


def rows_of(plan, done) -> list[tuple[str, str]]:
    """Return the rows (name, text) to print about `done`, the compiled step of the StepPlan `plan`."""
    from jaxchat.model.flops import peak_flops

    rows = [("memory", memory(plan, done)), ("remat", done.remat)]
    if program := done.program:
        peak = peak_flops(plan.mesh.devices.flat[0])
        parts = f"state and batch {done.arguments / 1e9:.1f}, temporary {done.temporary / 1e9:.1f}"
        rows[0] = ("memory", f"{memory(plan, done)}; {parts}")
        at_peak = f", {program.flops / peak:.2f} s at peak" if peak else ""
        sent = [f"{name} {size / 1e9:.2f} GB" for name, size in program.sent().items() if size]
        flops = f"{program.flops:.3e} a device, without kernels; by formula {plan.flops:.3e}{at_peak}"
        rows += [
            ("FLOPs", flops),
            ("collectives", ", ".join(sent) or "none"),
            ("kernels", ", ".join(f"{name} × {n}" for name, n in program.kernels.most_common(8)) or "none"),
        ]
        if found := plan.bounds(done):
            rows += bound_rows(found, plan.flops / peak)
        if plan.config.matmul:
            rows.append(("float8", f"{program.float8_products} products; {gathered(program)}"))
    return [*rows, ("compiled in", f"{done.seconds:.0f} s")]


def gathered(program) -> str:
    """Return a text on how many bytes float8 saves in the all-gathers of a compiled program."""
    sent = program.gathered()
    small, all_sent = sent.get("f8e4m3fn", 0.0), sum(sent.values())
    if not small:
        return "nothing gathered in float8"
    before = all_sent + small
    text = f"their weights gathered in {small / 1e9:.3g} GB, half of the {2 * small / 1e9:.3g} GB in bfloat16"
    return f"{text}; all arrays in {all_sent / 1e9:.3g} of {before / 1e9:.3g} GB ({all_sent / before:.2f} ×)"


def bound_rows(bounds: dict, model_seconds: float) -> list[tuple[str, str]]:
    """Return rows (name, text) that state the shortest possible time of a step and of each of its parts.

    bounds: {part: Bound}. model_seconds: time of the model's FLOPs at the devices' peak rate.
    """
    parts = sorted(bounds.items(), key=lambda item: -item[1].seconds)
    sending = bounds["collectives"].seconds
    computing = sum(bound.seconds for bound in bounds.values()) - sending
    hidden, apart = max(computing, sending), computing + sending
    texts = [f"{name} {1e3 * bound.seconds:.0f} ms ({bound.limit})" for name, bound in parts]
    step = f"{1e3 * hidden:.0f} ms ({model_seconds / hidden:.0%} MFU) if collectives overlap with the rest"
    apart = f"{1e3 * apart:.0f} ms ({model_seconds / apart:.0%}) if they do not"
    return [("at best", ", ".join(texts)), ("", f"{step}, {apart}")]


def memory(plan, done) -> str:
    from jaxchat.train.fit import fitting

    needs = f"{done.needs / 1e9:.1f} GB (by the compiler's count)"
    if done.fits:
        return needs + fitting(plan.memory, plan.backend)
    return f"{needs} of a device's {plan.memory / 1e9:.1f} GB: too much"


def figures_of(plan, done) -> dict:
    """Return the numbers of a compiled step (memory, FLOPs, bytes sent) as {name: value}, for --json."""
    config = plan.config
    figures = {
        "depth": config.depth,
        "topology": config.topology,
        "mesh": dict(plan.mesh.shape),
        "device_batch_size": plan.batch,
        "micro_batches": plan.accumulated,
        "remat": done.remat,
        "fits": done.fits,
        "bytes": done.needs,
        "tokens": config.total_batch_size,
        "model_flops": plan.flops,
        "compile_seconds": done.seconds,
    }
    if done.program:
        program = done.program
        figures |= {"flops": program.flops, "sent": program.sent(), "kernels": dict(program.kernels)}
        figures |= {"float8_products": program.float8_products, "gathered": program.gathered()}
        figures["least_seconds"] = {name: bound.seconds for name, bound in plan.bounds(done).items()}
    return figures


def training_command(config: Config, batch: int) -> str:
    """Return the command that trains the compiled model, with `batch` rows per device."""
    words = [f"--depth={config.depth}", f"--device_batch_size={batch}"]
    if config.arch != BaseConfig.arch:
        words.insert(0, f"--arch={config.arch}")
    usual = BaseConfig.given(arch=config.arch)
    for name in ("total_batch_size", "max_seq_len", "mesh", "matmul", "remat"):
        if (value := getattr(config, name)) != getattr(usual, name):
            words.append(f"--{name}={value}")
    return " ".join(["python -m launch.base_train", *words])


def remedy(plan, done, largest: int | None) -> str:
    """Return the error message for a step that needs too much memory.

    largest: number of rows in the largest batch that fits; 0: none fits; None: not searched.
    """
    sizes = f"{done.needs / 1e9:.1f} GB of {plan.memory / 1e9:.0f} GB"
    message = f"a step of {plan.batch} rows a device needs {sizes}; "
    if done.remat != "full":
        message += "try --remat=full, or "
    if largest:
        return message + f"lower the batch: --device_batch_size={largest}"
    if largest is None and plan.batch > 1:
        return message + f"lower --device_batch_size={plan.batch}"
    spread = f"shard it further (--mesh=fsdp={plan.mesh.size})"
    return message + f"{spread}, use more devices, or lower --depth or --max_seq_len"


main = cli.command(Config, run)

if __name__ == "__main__":
    main()
