"""Compiles every Triton kernel for a GPU that need not be there, and shows what became of it.

    python -m benchmarks.compile_kernels [--capability 90] [--sass FOLDER]

Registers, spills, shared memory and instructions of each kernel as it is launched at real sizes.
For the noise, the instructions that one more normal costs, by the unit that runs them, and the rate
at which an H200 could issue them. Exits with 1 where registers are spilled in a kernel's loop, or
anywhere in one that has none: what is put away once before a loop costs next to nothing.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest.mock import patch

os.environ.pop("TRITON_INTERPRET", None)

import numpy as np
import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fastvol import kernels
from fastvol._reference.refill import Found
from fastvol._reference.search_step import SearchState
from fastvol.kernels import linear, losses, noise, pointwise, refill, threshold_step

# H200: multiprocessors, clock in GHz.
PROCESSORS, CLOCK = 132, 1.98
# Lanes a clock and multiprocessor of what an instruction runs on; all share 128 issue slots.
# https://docs.nvidia.com/cuda/cuda-c-programming-guide/#arithmetic-instructions
UNITS = {
    "multiply": (64, ("IMAD",)),
    "integer": (
        64,
        (
            "LOP3",
            "IADD3",
            "LEA",
            "SHF",
            "I2FP",
            "ISETP",
            "SEL",
            "FSEL",
            "FSETP",
            "PRMT",
            "IABS",
            "VIADD",
            "PLOP3",
            "FMNMX",
        ),
    ),
    "float": (128, ("FFMA", "FMUL", "FADD", "HFMA2")),
    "special": (16, ("MUFU", "I2F", "F2I", "F2F")),
    "double": (64, ("DADD", "DMUL", "DFMA", "DSETP")),
}


@dataclass(frozen=True)
class Launch:
    """One call of a kernel: with what, and with which launch parameters."""

    kernel: Any
    arguments: dict[str, Any]
    config: triton.Config


@dataclass(frozen=True)
class Compiled:
    """What the assembler made."""

    registers: int
    spilled: int
    shared: int
    instructions: Counter[str]
    shortest: Counter[str]
    """Those on the shortest way through, or through its loop."""

    @property
    def spills_in_loop(self) -> bool:
        """Whether the shortest way uses what is spilled."""
        return any(name.startswith(("LDL", "STL")) for name in self.shortest)

    @property
    def total(self) -> int:
        """All instructions but padding."""
        return sum(n for name, n in self.instructions.items() if name != "NOP")


def recorded(call: Callable[[], object], capability: int) -> list[Launch]:
    """The launches that a call would make on such a GPU; its tensors have no memory."""
    found: list[Launch] = []

    def record(kernel: Any, grid: Any, arguments: Mapping[str, Any], **options: Any) -> None:
        found.append(Launch(kernel, dict(arguments), options["fixed"]))

    with ExitStack() as patches:
        for module in (noise, linear, pointwise, losses, threshold_step, refill):
            patches.enter_context(patch.object(module, "launch", record))
        patches.enter_context(patch.object(linear, "_capability", lambda _: capability))
        call()
    return found


_POINTERS = {
    torch.float32: "*fp32",
    torch.float64: "*fp64",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int64: "*i64",
    torch.int32: "*i32",
}


def source_of(launch: Launch) -> ASTSource:
    """What the launch would compile: the same types, and the same knowledge of alignment."""
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    attributes: dict[tuple[int, ...], list[list[Any]]] = {}
    values = {**launch.arguments, **launch.config.kwargs}
    for i, parameter in enumerate(launch.kernel.params):
        value = values[parameter.name]
        free = not parameter.do_not_specialize
        if parameter.is_constexpr or (free and isinstance(value, int) and value == 1):
            signature[parameter.name] = "constexpr"
            constants[parameter.name] = value
            continue
        if isinstance(value, Tensor):
            signature[parameter.name] = _POINTERS[value.dtype]
            multiple = not parameter.do_not_specialize_on_alignment
        elif isinstance(value, float):
            signature[parameter.name] = "fp32"
            multiple = False
        else:
            signature[parameter.name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            multiple = free and value % 16 == 0
        if multiple:
            attributes[(i,)] = [["tt.divisibility", 16]]
    return ASTSource(launch.kernel, signature, constants, attributes)


def compiled(launch: Launch, capability: int, sass: Path | None = None) -> Compiled:
    """What becomes of a launch."""
    options = {"num_warps": launch.config.num_warps, "num_stages": launch.config.num_stages}
    result = triton.compile(
        source_of(launch), target=GPUTarget("cuda", capability, 32), options=options
    )
    with tempfile.TemporaryDirectory() as folder:
        binary = Path(folder) / "kernel.cubin"
        binary.write_bytes(result.asm["cubin"])
        text = _cuobjdump("-sass", binary)
        usage = _cuobjdump("-res-usage", binary)
    if sass is not None:
        sass.write_text(text)
    code = _instructions(text)
    found = {name: int(n) for name, n in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    return Compiled(
        registers=found["REG"],
        spilled=found["STACK"] + found["LOCAL"],
        shared=result.metadata.shared,
        instructions=Counter(step.name for step in code.values()),
        shortest=_shortest(code),
    )


def _cuobjdump(option: str, binary: Path) -> str:
    tool = Path(triton.__path__[0]) / "backends" / "nvidia" / "bin" / "cuobjdump"
    run = subprocess.run([tool, option, binary], capture_output=True, text=True, check=True)
    return run.stdout + run.stderr


@dataclass(frozen=True)
class _Instruction:
    name: str
    conditional: bool
    target: int | None
    """Of a branch."""


def _instructions(sass: str) -> dict[int, _Instruction]:
    """By address."""
    line = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)\s*([^;]*);")
    found = {}
    for address, predicate, name, rest in line.findall(sass):
        target = int(rest.split()[-1], 16) if name.startswith("BRA") else None
        found[int(address, 16)] = _Instruction(name, bool(predicate), target)
    return found


def _shortest(code: dict[int, _Instruction]) -> Counter[str]:
    """The instructions on the way through that has the fewest: through a loop, where there is one.

    It takes no branch for the last tile of a row.
    """
    loops = [
        (step.target, at)
        for at, step in code.items()
        if step.target is not None and step.target < at
    ]
    first, last = max(loops, key=lambda loop: loop[1] - loop[0], default=(min(code), None))
    following = dict(pairwise(sorted(code)))
    before: dict[int, int | None] = {first: None}
    waiting = deque([first])
    while waiting:
        at = waiting.popleft()
        step = code[at]
        if at == last or (last is None and step.name == "EXIT" and not step.conditional):
            way = [step.name]
            back = before[at]
            while back is not None:
                way.append(code[back].name)
                back = before[back]
            return Counter(way)
        ways = [] if step.target is None else [step.target]
        if step.target is None or step.conditional:
            ways.append(following[at])
        for there in ways:
            if there not in before:
                before[there] = at
                waiting.append(there)
    raise ValueError("the code has no end")


def _unit(instruction: str) -> str:
    name = instruction.split(".")[0]
    return next((unit for unit, (_, names) in UNITS.items() if name in names), "other")


def per_normal(launch: Launch, capability: int) -> dict[str, float]:
    """What one more normal costs: instructions by unit.

    Of a kernel without a loop, the difference of two builds, one with twice the tile: whatever a
    program does once is gone.
    """
    one = launch.config
    normals = 4 * one.kwargs["BLOCKS"] / (32 * one.num_warps)
    cost = Counter(compiled(launch, capability).shortest)
    if "TILES" not in one.kwargs:
        twice = {**one.kwargs, "BLOCKS": 2 * one.kwargs["BLOCKS"]}
        two = triton.Config(twice, num_warps=one.num_warps, num_stages=one.num_stages)
        large = compiled(Launch(launch.kernel, launch.arguments, two), capability)
        cost = Counter(large.shortest)
        cost.subtract(compiled(launch, capability).shortest)
    by_unit = dict.fromkeys((*UNITS, "other"), 0.0)
    for name, count in cost.items():
        if name != "NOP":
            by_unit[_unit(name)] += count / normals
    return by_unit


def _tensor(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def calls() -> dict[str, Callable[[], object]]:
    """Every kernel, in the forms and sizes that it is used in."""
    d, k = 235_146, 64
    ids, c = np.arange(k), np.ones(k)
    bf16, double = torch.bfloat16, torch.float64
    found: dict[str, Callable[[], object]] = {}

    def noise_form(name: str, dtype: torch.dtype, size: int, scales: int) -> None:
        rows, vector = _tensor(k, size, dtype=dtype), _tensor(size, dtype=dtype)
        scale = _tensor(scales, dtype=dtype) if scales else None
        found[f"perturb {name}"] = lambda: kernels.perturb(rows, vector, c, 5, 0, ids, scale=scale)

    noise_form("float32", torch.float32, d, 0)
    noise_form("float32 scaled", torch.float32, d, d)
    noise_form("float32 aligned", torch.float32, d + 6, 0)
    noise_form("float32 aligned, a scale a row", torch.float32, d + 6, 276)
    noise_form("bfloat16 aligned", bf16, d + 6, 0)
    noise_form("float64", double, d, 0)
    found["normals float32"] = lambda: kernels.write_normals(_tensor(k, d + 6), 5, 0, ids)
    found["reductions"] = lambda: kernels.direction_reductions(d, 5, 0, ids, device="meta")
    found["reductions with a projection"] = lambda: kernels.direction_reductions(
        d, 5, 0, ids, device="meta", project=_tensor(d, dtype=double)
    )
    for precision in ("bf16", "tf32", "tf32x3", "bf16x3", "ieee"):
        dtype = bf16 if precision == "bf16" else torch.float32

        def mlp(precision: str = precision, dtype: torch.dtype = dtype) -> object:
            return kernels.perturbed_linear(
                _tensor(k, 600, 256, dtype=dtype),
                _tensor(256, 256),
                _tensor(256),
                c,
                5,
                0,
                ids,
                offset=200_960,
                scale=_tensor(256),
                antithetic=True,
                activation="relu",
                precision=precision,
            )

        def first(precision: str = precision, dtype: torch.dtype = dtype) -> object:
            return kernels.direction_linear(
                _tensor(600, 784, dtype=dtype),
                256,
                5,
                0,
                ids,
                bias=True,
                scale=_tensor(256),
                precision=precision,
            )

        def first_in_place(precision: str = precision) -> object:
            return kernels.direction_linear(
                _tensor(600, 784),
                256,
                5,
                0,
                ids,
                bias=True,
                scale=_tensor(256),
                precision=precision,
                out=_tensor(k, 600, 256),
                places=_tensor(k, dtype=torch.int64),
            )

        def second(precision: str = precision, dtype: torch.dtype = dtype) -> object:
            return kernels.perturbed_linear(
                _tensor(k, 600, 256),
                _tensor(128, 256),
                _tensor(128),
                c,
                5,
                0,
                ids,
                offset=200_960,
                scale=_tensor(128),
                activation="relu",
                precision=precision,
                base=_tensor(600, 256),
                base_activation="relu",
                places=_tensor(k, dtype=torch.int64),
                dtype=dtype,
            )

        def last(precision: str = precision, dtype: torch.dtype = dtype) -> object:
            return kernels.perturbed_linear(
                _tensor(k, 600, 63, dtype=dtype),
                _tensor(10, 63),
                _tensor(10),
                c,
                5,
                0,
                ids,
                offset=1001,
                scale=_tensor(10, 63),
                precision=precision,
            )

        def convolution(precision: str = precision, dtype: torch.dtype = dtype) -> object:
            return kernels.perturbed_conv2d(
                _tensor(k, 600, 16, 14, 14, dtype=dtype),
                _tensor(32, 16, 3, 3),
                _tensor(32),
                c,
                5,
                0,
                ids,
                offset=160,
                padding=1,
                activation="relu",
                precision=precision,
            )

        found[f"perturbed_linear 600x256x256 {precision}"] = mlp
        found[f"direction_linear 600x784x256 {precision}"] = first
        found[f"direction_linear 600x784x256 in place {precision}"] = first_in_place
        found[f"perturbed_linear 600x256x128 from changes {precision}"] = second
        found[f"perturbed_linear 600x63x10 unaligned {precision}"] = last
        found[f"perturbed_conv2d 16x14x14 to 32 {precision}"] = convolution
    for activation, dtype in (("relu", torch.float32), ("relu", bf16), ("gelu", torch.float32)):
        found[f"scaled_add 600x256 {activation} to {str(dtype)[6:]}"] = partial(
            kernels.scaled_add,
            _tensor(600, 256),
            _tensor(k, 600, 256),
            c,
            places=_tensor(k, dtype=torch.int64),
            activation=activation,
            dtype=dtype,
        )
    found |= _calls_of_a_round()
    return found


def _calls_of_a_round() -> dict[str, Callable[[], object]]:
    """From the outputs of a network to the next radii, and new items for the lanes."""
    found: dict[str, Callable[[], object]] = {}
    lanes = 512
    state, results = SearchState.empty(lanes, "meta"), Found.empty(1_000_000, "meta")

    def step(name: str, shape: tuple[int, ...], dtype: torch.dtype, target: Tensor | None) -> None:
        kind = name.split()[0]
        found[f"threshold_step {name} {str(dtype)[6:]}"] = partial(
            threshold_step.threshold_step,
            SearchState.empty(shape[0], "meta"),
            _tensor(*shape, dtype=dtype),
            target,
            kind=kind,
            scale=1 / 600,
        )

    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        labels = _tensor(600, dtype=torch.int64)
        step("cross_entropy 512x600x10", (lanes, 600, 10), dtype, labels)
        for kind in ("mse", "bce_with_logits"):
            step(f"{kind} 512x6000", (lanes, 6000), dtype, _tensor(6000, dtype=dtype))
    step("cross_entropy 4x2048x50257", (4, 2048, 50257), torch.bfloat16, _tensor(2048).long())
    step("cross_entropy 16x60000x10", (16, 60000, 10), torch.float32, _tensor(60000).long())
    step("mse 4x1000000", (4, 1_000_000), torch.float32, _tensor(1_000_000))
    step("given 512x1", (lanes, 1), torch.float32, None)
    for name, scan in (("search", False), ("scan", True)):
        found[f"refill for a {name}"] = partial(
            refill.refill, state, results, _tensor(999_999).double(), 4096, 300, scan=scan
        )
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--capability", type=int, default=90)
    parser.add_argument("--sass", type=Path, help="a folder for the machine code")
    parser.add_argument("--only", default="", help="kernels whose name contains this")
    options = parser.parse_args(arguments)
    spilling = []
    print(f"{'kernel':62} registers spilled   shared instructions  in loop")
    found = {name: call for name, call in calls().items() if options.only in name}
    seen = set()
    for name, launch in (
        (name, launch)
        for name, call in found.items()
        for launch in recorded(call, options.capability)
    ):
        # Calls share kernels.
        key = source_of(launch).hash() + str(launch.config)
        if key in seen:
            continue
        seen.add(key)
        name = f"{name}: {launch.kernel.__name__.removesuffix('_kernel')}"
        file = None
        if options.sass is not None:
            options.sass.mkdir(parents=True, exist_ok=True)
            file = options.sass / (re.sub(r"[^\w.]+", "_", name) + ".sass")
        result = compiled(launch, options.capability, file)
        matrix = {
            key: n
            for key, n in result.instructions.items()
            if key.startswith(("HGMMA", "HMMA", "BAR", "LDSM", "STSM"))
        }
        uses = " ".join(f"{n} {key}" for key, n in sorted(matrix.items()))
        print(
            f"{name:62} {result.registers:9} {result.spilled:7} {result.shared:8} "
            f"{result.total:12} {sum(result.shortest.values()):8}  {uses}",
            flush=True,
        )
        if result.spills_in_loop:
            spilling.append(name)
    print(f"\n{'one more normal':32}" + "".join(f"{unit:>10}" for unit in (*UNITS, "other", "all")))
    for name in (
        "perturb float32 aligned",
        "perturb bfloat16 aligned",
        "perturb float32",
        "perturb float64",
        "normals float32",
        "reductions",
        "reductions with a projection",
    ):
        if name in found:
            (launch,) = recorded(found[name], options.capability)
            by_unit = per_normal(launch, options.capability)
            total = sum(by_unit.values())
            counts = "".join(f"{by_unit[unit]:10.2f}" for unit in (*UNITS, "other"))
            slots = {unit: by_unit[unit] * 128 / rate for unit, (rate, _) in UNITS.items()}
            slots["issue"] = total
            busiest = max(slots, key=lambda unit: slots[unit])
            rate = 128 / slots[busiest] * PROCESSORS * CLOCK
            print(
                f"{name:32}{counts}{total:10.2f}  at most {rate:.0f} G/s by {busiest}", flush=True
            )
    if spilling:
        print("registers are spilled by: " + ", ".join(spilling))
    return 1 if spilling else 0


if __name__ == "__main__":
    sys.exit(main())
