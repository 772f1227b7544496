"""Parse a compiled program's HLO text to count its FLOPs, kernels, collectives and bytes moved, per device.

Unlike XLA's cost analysis, this counts the body of a loop once per iteration, and also works for GPUs.
"""

import dataclasses
import math
import re
from collections import Counter, defaultdict

SIZES = {1: "pred s8 u8 f8e4m3fn f8e5m2", 2: "bf16 f16 s16 u16", 4: "s32 u32 f32", 8: "s64 u64 f64"}
BYTES = {kind: size for size, kinds in SIZES.items() for kind in kinds.split()}
COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
# "name = type kind(operands), attributes", where the type of several results is a tuple in parentheses.
OPERATION = re.compile(r"\s+(ROOT )?%?([\w.-]+) = (.*?) ([a-z][\w-]*)\((.*)$")
SCOPES = ("projections", "mlp", "attention", "loss", "optimizer")  # jax.named_scope in the model and the step
# Operations that move no bytes themselves: names for arrays, and calls whose operations are counted instead.
FREE = frozenset(
    ["parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call"]
    + ["after-all", "partition-id", "replica-id", "opt-barrier", "copy-done"]
    + ["async-start", "async-update", "async-done"]
)
CALLED = re.compile(r"\b(?:calls|to_apply|body|condition|branch_computations)=\{?([^,}\s]+(?:, ?%[\w.-]+)*)")


Shapes = tuple[tuple[str, tuple[int, ...]], ...]  # (type, dimensions) of each array


@dataclasses.dataclass(frozen=True)
class Operation:
    name: str
    kind: str
    shapes: Shapes  # of the result
    operands: tuple[str, ...]  # names of operations
    text: str
    root: bool
    fast: bool = False  # the result is in a TPU's vector memory


@dataclasses.dataclass(frozen=True)
class Collective:
    """A collective operation of a program, such as an all-gather."""

    kind: str
    shapes: Shapes  # of the result
    group: int  # devices in each group that communicates
    sent: float  # bytes that leave a device each time, by ring algorithms
    times: int  # executions


@dataclasses.dataclass
class Work:
    """FLOPs of one part of a program, and bytes that it reads from and writes to a device's memory."""

    flops: float = 0.0  # of matrix products
    bytes: float = 0.0


@dataclasses.dataclass
class Program:
    collectives: list[Collective]
    kernels: Counter  # number of runs of each library or Pallas kernel, by name
    parts: dict[str, Work]  # by scope of the operations: SCOPES and "rest"

    @property
    def flops(self) -> float:
        return sum(part.flops for part in self.parts.values())

    @property
    def float8_products(self) -> int:
        """Number of matrix products with float8 operands that library kernels compute."""
        return sum(times for name, times in self.kernels.items() if name.endswith("$f8"))

    def sent(self) -> dict[str, float]:
        """Return {kind of collective: bytes that a device sends, summed over all executions}."""
        total = defaultdict(float)
        for c in self.collectives:
            total[c.kind] += c.sent * c.times
        return dict(total)

    def gathered(self) -> dict[str, float]:
        """Return {element type: bytes that a device sends in all-gathers}, such as {"bf16": 1e9}."""
        total = defaultdict(float)
        for c in self.collectives:
            if c.kind == "all-gather":
                for shape in c.shapes:
                    total[shape[0]] += c.sent * c.times * size_of((shape,)) / size_of(c.shapes)
        return dict(total)


def shapes_in(text: str) -> Shapes:
    found = re.findall(r"\b([a-z]+\d*\w*)\[([\d,<=]*)\]", text)
    return tuple(
        (kind, tuple(int(n.strip("<=")) for n in dims.split(",") if n))
        for kind, dims in found
        if kind in BYTES
    )


def size_of(shapes: Shapes) -> int:
    return sum(BYTES[kind] * math.prod(dims) for kind, dims in shapes)


def computations(text: str) -> tuple[dict[str, list[Operation]], str]:
    """Parse HLO text. Return ({name of a computation: its operations}, name of the entry computation)."""
    found, entry, current = {}, "", None
    for line in text.splitlines():
        if head := re.match(r"(ENTRY )?%?([\w.-]+) \(.*\{$", line):
            current = found.setdefault(head[2], [])
            entry = head[2] if head[1] else entry
        elif current is not None and (parts := OPERATION.match(re.sub(r"/\*.*?\*/", "", line))):
            root, name, result, kind, rest = parts.groups()
            operands = tuple(re.findall(r"%([\w.-]+)", rest.partition("), ")[0]))
            text, fast = f"{kind}({rest}", "S(1)" in result and not result.startswith("(")
            current.append(Operation(name, kind, shapes_in(result), operands, text, bool(root), fast))
    return found, entry


def read(text: str) -> Program:
    """Parse a program's HLO text, from compiled.as_text(), and count its collectives, kernels and work."""
    bodies, entry = computations(text)
    by_name = {op.name: op for ops in bodies.values() for op in ops}
    program = Program([], Counter(), defaultdict(Work))
    partitions = re.search(r"num_partitions=(\d+)", text)
    everyone = int(partitions[1]) if partitions else 1

    def visit(computation: str, times: int, sends: bool = True, within: str = ""):
        # within: the part in which the fusion that calls this computation is counted; "": no fusion calls it.
        # TPUs spread one collective over several fusions, and name it in each: count it only where it starts.
        sends = sends and not computation.startswith("async_collective_fusion")
        for op in bodies.get(computation, ()):
            work = program.parts[scope(op, within, bodies)]
            if op.kind in ("dot", "convolution"):
                work.flops += times * (dot_flops if op.kind == "dot" else convolution_flops)(op, by_name)
            kind = op.kind.removesuffix("-start")
            if not within and kind.removesuffix("-done") not in COLLECTIVES and op.kind not in FREE:
                work.bytes += times * bytes_moved(op, bodies, by_name)
            if kind in COLLECTIVES and sends:
                program.collectives.append(collective(op, kind, by_name, times, everyone))
            if op.kind == "custom-call":
                target = re.search(r'custom_call_target="([^"]+)"', op.text)[1]
                if target == "tpu_custom_call":  # Pallas: the operation has the kernel's name
                    program.kernels[re.sub(r"[.\d]+$", "", op.name)] += times
                elif target.startswith("__"):  # a library's kernel, not one of XLA's own helpers
                    program.kernels[target] += times
                if "matmul" in target or "gemm" in target:
                    work.flops += times * dot_flops(op, by_name)
            inner = times * trip_count(op, bodies, by_name) if op.kind == "while" else times
            if kind not in COLLECTIVES:  # a collective calls only its reduction
                fused = within if op.kind in FREE else scope(op, within, bodies)
                for names in CALLED.findall(op.text):
                    for name in re.findall(r"%?([\w.-]+)", names):
                        visit(name, inner, sends and not op.name.startswith("async-collective-done"), fused)

    visit(entry, 1)
    return program


def scope(op: Operation, within: str, bodies) -> str:
    """Return the part of the program to which an operation belongs: a name in SCOPES, or "rest".

    The name is taken from the operation's op_name, or else from that of a matrix product fused into it.
    within: the part to return if no name is found; "" means "rest". bodies: {computation: operations}.
    """
    candidates = [op, *(fused for fused in called_by(op, bodies) if fused.kind in ("dot", "convolution"))]
    for candidate in candidates:
        path = re.search(r'op_name="([^"]*)"', candidate.text)
        for name in reversed(re.split(r"[/()]", path[1]) if path else ()):
            if name in SCOPES:
                return name
    return within or "rest"


def called_by(op: Operation, bodies) -> list[Operation]:
    """Return the operations fused into `op`; [] if it is no fusion. bodies: {computation: operations}."""
    name = re.search(r"\bcalls=%?([\w.-]+)", op.text) if op.kind == "fusion" else None
    return bodies.get(name[1], []) if name else []


def bytes_moved(op: Operation, bodies, by_name) -> int:
    """Return the number of bytes that an operation reads and writes in memory.

    If an array is sliced or updated in place, only the bytes of the slice count.
    bodies: {computation: operations}. by_name: {name: operation} of the whole program.
    """
    if op.kind == "dynamic-slice":
        return 2 * size_of(op.shapes)
    if op.kind == "dynamic-update-slice":
        return 2 * size_of(by_name[op.operands[1]].shapes)
    reads = [by_name[name] for name in op.operands if name in by_name]
    if op.kind == "copy-start":  # between main and fast memory: only one of the sides counts
        return size_of(reads[0].shapes)
    fused = called_by(op, bodies)
    if not fused:
        return memory_size(op) + sum(map(memory_size, reads))
    users, total = defaultdict(list), 0
    for inner in fused:
        for place, name in enumerate(inner.operands):
            users[name].append((inner, place))
    given = {inner.text: inner for inner in fused if inner.kind == "parameter"}
    for number, read in enumerate(reads):
        inner = next((a for text, a in given.items() if text.startswith(f"parameter({number})")), None)
        used = readers(inner.name, users) if inner else []
        kinds = {(user.kind, place) for user, place in used}
        if kinds == {("dynamic-slice", 0)}:
            total += sum(size_of(user.shapes) for user, _ in used)
        elif kinds != {("dynamic-update-slice", 0)}:
            total += memory_size(read)
    updates = [inner for inner in fused if inner.kind == "dynamic-update-slice"]
    if updates:  # the result is updated in place
        return total + sum(size_of(by_name[inner.operands[1]].shapes) for inner in updates)
    return total + memory_size(op)


def readers(name: str, users: dict) -> list[tuple[Operation, int]]:
    """Return (operation, operand index) of each operation in a fusion that reads array `name` or its bitcast.

    users: {name of an array: (operation, operand index) of each operation that reads it directly}.
    """
    found = []
    for user, place in users[name]:
        found += readers(user.name, users) if user.kind == "bitcast" else [(user, place)]
    return found


def memory_size(op: Operation) -> int:
    """Return the bytes of an operation's result in main memory; 0 if it is in a TPU's vector memory."""
    return 0 if op.fast else size_of(op.shapes)


def trip_count(loop: Operation, bodies, by_name) -> int:
    """Return the number of iterations of a while loop, or 1 if it is unknown.

    If XLA does not state the number, as on TPUs, it is calculated from the loop counter's bound and its step.
    bodies: {computation: operations}. by_name: {name: operation} of the whole program.
    """
    if known := re.search(r'known_trip_count"?:\{"n":"(\d+)"', loop.text):
        return int(known[1])

    def called(name):
        return bodies[re.search(rf"{name}=%?([\w.-]+)", loop.text)[1]]

    def constants(names):
        found = (re.match(r"constant\((\d+)\)", by_name[name].text) for name in names if name in by_name)
        return [int(number[1]) for number in found if number]

    compared = next((op for op in called("condition") if op.kind == "compare"), None)
    bound = constants(compared.operands) if compared else []
    if not bound:
        return 1
    counter = by_name[compared.operands[0]]
    place = re.search(r"index=(\d+)", counter.text)
    (result,) = (op for op in called("body") if op.root)
    added = by_name.get(result.operands[int(place[1])]) if place else None
    step = constants(added.operands) if added and added.kind == "add" else []
    return -(-bound[0] // (step[0] if step else 1))


def dot_flops(op: Operation, by_name) -> float:
    """Return the FLOPs of a matrix product (XLA's `dot` or a call of cuBLAS). by_name: {name: operation}."""
    contracted = re.search(r'lhs_contracting_dim(?:s=\{|ensions":\[)([^\]}]*)', op.text)
    lhs = by_name[op.operands[0]].shapes[0][1]
    return 2 * math.prod(op.shapes[0][1]) * math.prod(lhs[int(n)] for n in re.findall(r"\d+", contracted[1]))


def convolution_flops(op: Operation, by_name) -> float:
    """Return the FLOPs of a convolution, without multiplications by padding. by_name: {name: operation}."""
    # For TPUs, XLA turns matrix products into convolutions that multiply mostly padding.
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", op.text)
    lhs, rhs = (by_name[name].shapes[0][1] for name in op.operands[:2])
    out = op.shapes[0][1]
    window = re.search(r"window=\{([^}]*)\}", op.text)
    fields = dict(part.split("=") for part in window[1].split()) if window else {}
    spatial = sorted(label for label in labels[1] if label.isdigit())  # in the window's order

    def field(name, default):
        return fields[name].split("x") if name in fields else [default] * len(spatial)

    pads, strides = field("pad", "0_0"), field("stride", "1")
    lhs_dilate, rhs_dilate = field("lhs_dilate", "1"), field("rhs_dilate", "1")
    pairs = 1
    for i, label in enumerate(spatial):
        sides = zip((lhs, rhs, out), labels.groups(), strict=True)
        size, kernel, results = (side[names.index(label)] for side, names in sides)
        low, stride = int(pads[i].split("_")[0]), int(strides[i])
        inner, outer = int(lhs_dilate[i]), int(rhs_dilate[i])
        places = (o * stride + k * outer - low for o in range(results) for k in range(kernel))
        pairs *= sum(at >= 0 and at % inner == 0 and at // inner < size for at in places)
    batch, features = out[labels[3].index("b")], out[labels[3].index("f")]
    groups = re.search(r"batch_group_count=(\d+)", op.text)
    return 2 * pairs * batch * features * rhs[labels[2].index("i")] / (int(groups[1]) if groups else 1)


def collective(op: Operation, kind: str, by_name, times: int, everyone: int) -> Collective:
    result = op.shapes
    if op.kind.endswith("-start"):  # (operands, results[, contexts])
        count = len([name for name in op.operands if name in by_name])
        result = op.shapes[count : 2 * count] if kind != "all-reduce" else op.shapes[:count]
    group = group_size(op.text) or everyone
    size, share = size_of(result), (group - 1) / group
    sent = {
        "all-gather": size * share,
        "all-reduce": 2 * size * share,
        "reduce-scatter": size * (group - 1),
        "all-to-all": size * share,
        "collective-permute": size,
    }[kind]
    return Collective(kind, result, group, sent, times)


def group_size(text: str) -> int:
    """Return the number of devices in each group of a collective; 0 means all devices.

    text: the collective in HLO, with groups such as {{0,1},{2,3}}, [2,2]<=[4] or mesh['a'=2,'b'=2] {'b'}. A
        collective-permute has source-target pairs instead, which count as groups of 2.
    """
    if "replica_groups={}" in text:
        return 0  # all devices
    if "source_target_pairs=" in text:
        return 2
    if found := re.search(r"replica_groups=\{\{([\d,]+)\}", text):
        return len(found[1].split(","))
    if found := re.search(r"replica_groups=\[\d+,(\d+)\]<=\[", text):
        return int(found[1])
    if found := re.search(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(.*?\))? ?\{([^}]*)\}", text):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", found[1]))
        parts = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", found[2])  # a part of an axis states its own size
        return math.prod(int(part or sizes[axis]) for axis, part in parts)
    raise ValueError(f"the groups of a collective are written in an unknown way: {text[:300]}")
