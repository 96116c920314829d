"""What a large model's run holds in memory, and what an evaluation costs, in place and by copies.

    python -m benchmarks.inplace_memory [--short] [--results DIR]

GPT-2 models of random weights, built from a configuration, each in a process of its own. The peak
is that of the whole process above what it held before the model was built: the model itself, the
copy that is kept of it, a forward pass, and everything else. The bound is 2 × weights + one forward
pass (measured alone) + 200 MB. With the filter metric the scales are one number a row.

Kept in ``results/inplace_memory.json``. Ends with an error where the bound is missed.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

import fastvol

from .million import held, peak
from .record import RESULTS, record

ALLOWED_BEYOND = 200e6
# Width and layers of models of about 1, 4, 10 and 30 million parameters.
SIZES = {"1M": (128, 3), "4M": (256, 4), "10M": (384, 5), "30M": (512, 8)}
VOCABULARY, LENGTH, SEQUENCES = 8192, 32, 2
_RAYS = 2


def build(width: int, layers: int, dtype: torch.dtype) -> Any:
    """A causal language model with random weights."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=VOCABULARY if width >= 256 else 2048,
        n_positions=LENGTH,
        n_embd=width,
        n_layer=layers,
        n_head=8,
        bos_token_id=0,
        eos_token_id=0,
        loss_type="ForCausalLM",
    )
    torch.manual_seed(0)
    return GPT2LMHeadModel(config).to(dtype).eval()


def forget_peak() -> None:
    """Lets the peak of memory begin anew."""
    Path("/proc/self/clear_refs").write_text("5")


def run(size: str, engine: str, dtype: str, metric: str) -> dict[str, Any]:
    """One model, in this process."""
    width, layers = SIZES[size]
    tokens = torch.randint(VOCABULARY if width >= 256 else 2048, (SEQUENCES, LENGTH))
    batch = {"input_ids": tokens, "labels": tokens}
    build(16, 1, torch.float32)(**batch | {"input_ids": tokens % 2048, "labels": tokens % 2048})
    before = held()
    model = build(width, layers, getattr(torch, dtype))
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    with torch.no_grad():
        model(**batch)
        forget_peak()
        ready = held()
        model(**batch)
        forward = peak() - ready
        seconds = []
        for _ in range(7):
            began = time.perf_counter()
            model(**batch)
            seconds.append(time.perf_counter() - began)
    forget_peak()
    result = fastvol.estimate(
        model,
        fastvol.losses.model_loss,
        _RAYS,
        data=[batch],
        increase=0.5,
        metric=metric,
        method="radial",
        rtol=0.1,
        engine=engine,
        lanes=_RAYS,
        progress=False,
    )
    most = peak() - before
    return {
        "size": size,
        "engine": engine,
        "dtype": dtype,
        "metric": metric,
        "parameters": result.dim,
        "weights_mb": weights / 1e6,
        "forward_mb": forward / 1e6,
        "peak_mb": most / 1e6,
        "bound_mb": (2 * weights + forward + ALLOWED_BEYOND) / 1e6,
        "forward_ms": 1e3 * min(seconds),
        "ms_a_loss": 1e3 * result.provenance["engine_seconds"] / result.n_loss,
        "plan": result.plan,
    }


def measure(size: str, engine: str, dtype: str, metric: str) -> dict[str, Any]:
    """The run, in a fresh process of this interpreter."""
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.inplace_memory", "--one", size, engine, dtype, metric],
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"the run of {size} ended with an error:\n{done.stderr}")
    told: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return told


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.inplace_memory")
    parser.add_argument("--short", action="store_true", help="one small model; keeps nothing")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--one", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(run(*options.one)))
        return
    works = [("4M", "inplace", "float32", "filter")]
    if not options.short:
        works = [
            *((size, engine, "float32", "euclidean") for size in SIZES for engine in ENGINES),
            ("30M", "inplace", "float32", "filter"),
            ("30M", "inplace", "bfloat16", "filter"),
        ]
    rows = []
    print(
        "size  engine   dtype     metric     weights  forward   peak   bound  ms/forward  ms/loss"
    )
    for work in works:
        row = measure(*work)
        rows.append(row)
        print(
            f"{row['size']:5} {row['engine']:8} {row['dtype']:9} {row['metric']:10}"
            f"{row['weights_mb']:7.0f} {row['forward_mb']:8.0f} {row['peak_mb']:7.0f}"
            f"{row['bound_mb']:7.0f} {row['forward_ms']:11.1f} {row['ms_a_loss']:8.1f}",
            flush=True,
        )
    if not options.short:
        record("inplace_memory", {"rows": rows}, folder=options.results)
    missed = [r for r in rows if r["engine"] == "inplace" and r["peak_mb"] > r["bound_mb"]]
    if missed:
        raise SystemExit(f"above the bound: {missed}")


ENGINES = ("inplace", "general")


if __name__ == "__main__":
    main()
