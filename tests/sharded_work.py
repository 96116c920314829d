"""What each process of test_sharded.py does: compares sharded modules with the same ones whole."""

from __future__ import annotations

import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastvol
from fastvol import _backend
from fastvol._layout import ParameterLayout
from fastvol._objective import Objective
from fastvol._scale import Scale
from fastvol.checkpoints import Folder
from fastvol.engines import Indexed, InPlaceEngine, plan_in_place
from fastvol.losses import model_loss
from fastvol.metrics import FilterMetric

RAYS = Indexed(7, np.array([0, 3, 2**33, 12]), antithetic=True)
RADII = np.array([0.0, 0.3, 1.0, 4.0])


# Where the processes of one world find each other's files.
SHARED = Path()


def start(rank: int, world: int, folder: str) -> None:
    """Runs all checks of one world; what fails is written to ``folder``."""
    global SHARED
    SHARED = Path(folder)
    torch.set_num_threads(1)
    distributed = torch.distributed
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world
    )
    try:
        for check in CHECKS[world]:
            check(rank, world)
    except BaseException:
        Path(folder, f"failed{rank}").write_text(traceback.format_exc())
        raise
    finally:
        distributed.destroy_process_group()


def run(rank: int, world: int, store: str, folder: str, n: int) -> None:
    """A run of n directions that is kept in a folder."""
    torch.set_num_threads(1)
    distributed = torch.distributed
    method = f"file://{store}"
    distributed.init_process_group("gloo", init_method=method, rank=rank, world_size=world)
    measured(Path(folder), F.cross_entropy, n)
    distributed.destroy_process_group()


def mesh_of(*shape: int) -> Any:
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh("cpu", shape, mesh_dim_names=("a", "b")[: len(shape)])


def perceptron(dtype: torch.dtype = torch.float32) -> nn.Module:
    """Sizes that no world divides: of the last bias the last of four processes has nothing."""
    torch.manual_seed(0)
    inner = nn.Sequential(nn.Linear(15, 7), nn.Tanh())
    return nn.Sequential(nn.Linear(6, 15), nn.Tanh(), inner, nn.Linear(7, 5)).to(dtype)


def examples(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(24, 6, generator=generator)
    return x.to(dtype), torch.randint(5, (24,), generator=generator)


def llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=13, hidden_size=8, intermediate_size=12, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=16, pad_token_id=0,
        tie_word_embeddings=True,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def texts() -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(2)
    tokens = torch.randint(1, 13, (6, 7), generator=generator)
    mask = (torch.arange(7) < torch.tensor([7, 3, 5, 7, 4, 6])[:, None]).long()
    labels = torch.where(mask == 1, tokens, -100)
    batch = {"input_ids": tokens * mask, "attention_mask": mask, "labels": labels}
    return [{k: v[:2] for k, v in batch.items()}, {k: v[2:] for k, v in batch.items()}]


def shard(model: nn.Module, inner: list[nn.Module], **options: Any) -> nn.Module:
    from torch.distributed.fsdp import fully_shard

    for module in [*inner, model]:
        fully_shard(module, **options)
    return model


def engine_on(
    model: nn.Module, loss_fn: Any, data: Any, make_scale: Callable[[ParameterLayout], Scale]
) -> InPlaceEngine:
    layout = ParameterLayout(model)
    objective = Objective(model, loss_fn, data, layout.device, layout.group)
    objective.prepare(None)
    backend = _backend.select("cpp")
    plan = plan_in_place(objective, layout, backend, lanes=4, block=8, rays=8, reason="")
    scale = make_scale(layout)
    return InPlaceEngine(objective, layout, scale, plan, backend, toward_origin=True)


def compare(
    whole: nn.Module,
    sharded: nn.Module,
    loss_fn: Any,
    data: Any,
    make_scale: Callable[[ParameterLayout], Scale],
    own_data: Any = None,
) -> None:
    """Noise shards bit for bit, norms, losses, and the parameters afterwards."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    reference = engine_on(whole, loss_fn, data, make_scale)
    engine = engine_on(sharded, loss_fn, data if own_data is None else own_data, make_scale)
    layout, expected = engine._layout, reference._layout
    assert layout.is_sharded
    assert not expected.is_sharded
    assert layout.describe() == expected.describe()
    scale, flat = engine._scale, reference._scale
    assert engine.dim == scale.dim == flat.dim
    assert scale.digest() == flat.digest()
    np.testing.assert_allclose(scale.log_sum, flat.log_sum, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(scale.length, flat.length, rtol=1e-12)
    # The same data in each process count once in each.
    copies = torch.distributed.get_world_size() if own_data is None else 1
    assert engine._objective.weight == copies * reference._objective.weight
    np.testing.assert_allclose(engine._objective.loss0, reference._objective.loss0, rtol=1e-5)

    lanes = np.arange(4)
    before = [part.values.clone() for part in layout.local]
    info, wanted = engine.load(lanes, RAYS), reference.load(lanes, RAYS)
    np.testing.assert_allclose(info.norm, wanted.norm, rtol=1e-12)
    np.testing.assert_allclose(info.dot, wanted.dot, rtol=1e-6, atol=1e-12)
    # One factor for both, so that every bit of θ is the noise's own.
    engine._factor[:] = reference._factor
    engine._write(3, 2.5)
    reference._write(3, 2.5)
    changed = False
    parts = zip(layout.parameters, layout.local, expected.local, before, strict=True)
    for parameter, own, other, old in parts:
        assert isinstance(parameter, DTensor)
        placed = distribute_tensor(
            other.values.clone(), parameter.device_mesh, parameter.placements
        )
        assert torch.equal(own.values, placed.to_local())
        changed = changed or not torch.equal(own.values, old)
    assert changed or not any(len(old) for old in before)
    layout.restore()
    expected.restore()

    for limit in (float("inf"), 3.0):
        values = engine.loss(RADII, limit=limit).values
        told = reference.loss(RADII, limit=limit).values
        near = told < 3.0
        np.testing.assert_allclose(values[near], told[near], rtol=1e-5)
        assert (values[~near] >= 3.0).all()
    for part, old in zip(layout.local, before, strict=True):
        assert torch.equal(part.values, old)


def uniform(layout: ParameterLayout) -> Scale:
    return Scale.uniform(layout, 0.5)


def filtered(layout: ParameterLayout) -> Scale:
    """Of the language model the padding's embedding is left out, of which one process knows."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", fastvol.FastvolWarning)
        return FilterMetric("drop").scale_of(layout)


def check_perceptron(rank: int, world: int) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        model = perceptron(dtype)
        shard(model, [model[2]])
        for scale in (uniform, filtered):
            compare(perceptron(dtype), model, F.cross_entropy, examples(dtype), scale)


def check_replicas(rank: int, world: int) -> None:
    """Two shards, each on two processes; a copy counts once."""
    model = perceptron(torch.float64)
    shard(model, [model[2]], mesh=mesh_of(2, world // 2))
    data = examples(torch.float64)
    compare(perceptron(torch.float64), model, F.cross_entropy, data, filtered)


def check_columns(rank: int, world: int) -> None:
    """Matrices divided by columns: a shard is many stretches of the direction."""
    from torch.distributed.tensor import Shard

    def make() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5))

    model = shard(make(), [], shard_placement_fn=lambda p: Shard(1) if p.dim() == 2 else None)
    compare(make(), model, F.cross_entropy, examples(), filtered)


def check_transformer(rank: int, world: int) -> None:
    """Tied embeddings, a mask, labels that do not count; two batches, held or read."""
    model = llama()
    shard(model, list(model.model.layers))
    compare(llama(), model, model_loss, texts(), uniform)
    compare(llama(), model, model_loss, Stream(texts()), filtered)


class Stream:
    """Batches that are read anew; may fail at one of them."""

    def __init__(self, batches: list[Any], fails_at: int | None = None) -> None:
        self.batches, self.fails_at = batches, fails_at

    def __iter__(self) -> Iterator[Any]:
        for index, batch in enumerate(self.batches):
            if index == self.fails_at:
                raise OSError("the disk is gone")
            yield batch


def check_divided_data(rank: int, world: int) -> None:
    """Each process its own part of the examples: the loss is over all of them."""
    x, y = examples()
    part = slice(24 * rank // world, 24 * (rank + 1) // world)
    held = [(x[part][:2], y[part][:2]), (x[part][2:], y[part][2:])]
    for own in (held, Stream(held)):
        model = perceptron()
        shard(model, [model[2]])
        compare(perceptron(), model, F.cross_entropy, (x, y), uniform, own)


def check_data_out_of_step(rank: int, world: int) -> None:
    x, y = examples()
    batches = list(zip(x.split(6), y.split(6), strict=True))
    for own in (batches[: 3 + rank], Stream(batches[: 3 + rank])):
        model = shard(perceptron(), [])
        with pytest.raises(ValueError, match="more batches in some processes"):
            fastvol.estimate(model, F.cross_entropy, 2, data=own)
    broken = Stream(batches, fails_at=1 if rank == world - 1 else None)
    with pytest.raises((OSError, fastvol.FastvolError)) as caught:
        fastvol.estimate(shard(perceptron(), []), F.cross_entropy, 2, data=broken)
    words = "the disk is gone" if rank == world - 1 else "could not be read in another"
    assert words in str(caught.value)


def check_estimate(rank: int, world: int) -> None:
    options: dict[str, Any] = {"data": examples(), "increase": 0.3, "rtol": 1e-3}
    gaussian = fastvol.Gaussian(0.3, center="origin")
    for own in ({"metric": "filter"}, {"measure": gaussian}):
        whole = fastvol.estimate(
            perceptron(), F.cross_entropy, 3, engine="inplace", method="radial", **own, **options
        )
        model = perceptron()
        shard(model, [model[2]])
        model.train()
        local = [p.to_local().clone() for p in model.parameters()]
        result = fastvol.estimate(model, F.cross_entropy, 3, **own, **options)
        np.testing.assert_allclose(result.log_radii, whole.log_radii, rtol=0, atol=1e-3)
        assert abs(result.log_volume - whole.log_volume) < 0.3
        assert result.config["point_sha256"] == whole.config["point_sha256"]
        assert result.plan["engine"] == result.provenance["engine"] == "inplace"
        assert "sharded" in result.provenance["engine_reason"]
        assert result.dim == whole.dim
        assert model.training
        for p, old in zip(model.parameters(), local, strict=True):
            assert torch.equal(p.to_local(), old)
        # The module goes on as it was: gathered anew, without leftovers.
        x, _ = examples()
        torch.testing.assert_close(model(x), perceptron()(x), rtol=1e-6, atol=1e-6)
        # Every process has the same result.
        told = [None] * world
        torch.distributed.all_gather_object(told, result.log_radii.tobytes())
        assert len(set(told)) == 1


class Counted:
    """A loss that counts its calls, and may end the process's run at one of them."""

    def __init__(self, fails_at: int | None = None) -> None:
        self.calls, self.fails_at = 0, fails_at

    def __call__(self, output: Tensor, target: Tensor) -> Tensor:
        self.calls += 1
        if self.calls == self.fails_at:
            raise RuntimeError("here")
        return F.cross_entropy(output, target)


def measured(folder: Path | None, loss: Any, n: int, **options: Any) -> fastvol.VolumeEstimate:
    """A call in blocks of two directions, sharded as the caller says."""
    model = options.pop("model", None)
    if model is None:
        model = perceptron()
        shard(model, [model[2]], **options.pop("sharding", {}))
    settings = {"data": examples(), "increase": 0.3, "rtol": 1e-3, "lanes": 2, **options}
    plan = dict(PLAN)
    return fastvol.estimate(model, loss, n, checkpoint=folder, plan=plan, **settings)


PLAN: dict[str, Any] = {
    "engine": "inplace", "chunk": 1, "lanes": 2, "keep_rows": False, "dtype": "float32",
    "threads": 1, "noise_threads": 1, "backend": "cpp", "block": 2,
}  # fmt: skip


def check_checkpoint(rank: int, world: int) -> None:
    """A run that is ended halfway goes on to the same numbers, and takes no loss twice."""
    whole_loss = Counted()
    after: list[int] = []
    whole = measured(None, whole_loss, 6, callbacks=[lambda _: after.append(whole_loss.calls)])
    told: list[Any] = [None] * world
    torch.distributed.all_gather_object(told, after)
    # Only the first process shows and tells.
    assert not any(told[1:])
    folder = SHARED / "checkpoint"
    with pytest.raises(fastvol.FastvolError, match="here"):
        measured(folder, Counted(fails_at=told[0][1] + 1), 6)
    torch.distributed.barrier()
    blocks = sorted(path.name for path in folder.glob("threshold-*/blocks/*"))
    assert len(blocks) == 2
    rest = Counted()
    resumed = measured(folder, rest, 6)
    assert rest.calls < whole_loss.calls
    assert resumed.log_radii.tobytes() == whole.log_radii.tobytes()
    assert resumed.log_volume == whole.log_volume
    assert resumed.n_loss == whole.n_loss
    # Everything is there now: θ* is looked at, and nothing else.
    again = Counted()
    assert measured(folder, again, 6).log_volume == whole.log_volume
    assert again.calls <= 2
    larger = measured(folder, Counted(), 8)
    assert larger.log_radii[:6].tobytes() == whole.log_radii.tobytes()


def check_other_worlds(rank: int, world: int) -> None:
    """Begun by two processes, gone on with by all four."""
    from torch.distributed.device_mesh import DeviceMesh

    pair = DeviceMesh("cpu", [0, 1])
    folder = SHARED / "worlds"
    if rank < 2:
        first = measured(folder, F.cross_entropy, 4, sharding={"mesh": pair})
        assert first.provenance["processes"] == 2
    torch.distributed.barrier()
    everything = measured(folder, F.cross_entropy, 8)
    alone = measured(None, F.cross_entropy, 8, model=perceptron())
    np.testing.assert_allclose(everything.log_radii, alone.log_radii, rtol=0, atol=1e-3)
    if rank < 2:
        assert everything.log_radii[:4].tobytes() == first.log_radii.tobytes()
    # A module that is not sharded goes on there too, wherever its examples were.
    torch.distributed.barrier()
    if rank == 3:
        x, y = examples()
        data = [(x[:5], y[:5]), (x[5:], y[5:])]
        own = measured(folder, F.cross_entropy, 8, model=perceptron(), data=data, distributed=False)
        assert own.log_radii.tobytes() == everything.log_radii.tobytes()


def check_refused_folders(rank: int, world: int) -> None:
    """All processes end, also where only the first one sees why."""
    folder = SHARED / "refused"
    measured(folder, F.cross_entropy, 2)
    x, y = examples()
    with pytest.raises(fastvol.FastvolError, match="data sha256 is"):
        measured(folder, F.cross_entropy, 2, data=(x, y.flip(0)))
    with pytest.raises(fastvol.FastvolError, match="seed is 1"):
        measured(folder, F.cross_entropy, 2, seed=1)
    with pytest.raises(fastvol.FastvolError, match="all processes of a group"):
        measured(None, F.cross_entropy, 2, seed=rank)
    # Another process's part of the data may be this one's now.
    part = slice(24 * rank // world, 24 * (rank + 1) // world)
    measured(SHARED / "parts", F.cross_entropy, 2, data=(x[part], y[part]))
    turned = (rank + 1) % world
    other = slice(24 * turned // world, 24 * (turned + 1) // world)
    measured(SHARED / "parts", F.cross_entropy, 2, data=(x[other], y[other]))
    damaged = sorted((SHARED / "parts").glob("threshold-*/blocks/*"))[0]
    torch.distributed.barrier()
    if rank == 0:
        damaged.write_bytes(damaged.read_bytes()[:-3])
    torch.distributed.barrier()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        measured(SHARED / "parts", F.cross_entropy, 2, data=(x[part], y[part]))
    assert any("is damaged" in str(w.message) for w in caught) == (rank == 0)
    (SHARED / "file").touch()
    torch.distributed.barrier()
    with pytest.raises((NotADirectoryError, fastvol.FastvolError), match="not a folder"):
        measured(SHARED / "file", F.cross_entropy, 2)
    # Only the first process finds that it cannot write.
    broken = SHARED / "broken"
    if rank == 0:
        real, calls = Folder.write, [0]

        def write(self: Folder, place: str, piece: Any) -> None:
            calls[0] += 1
            if calls[0] == 3:
                raise OSError("no space left")
            real(self, place, piece)

        Folder.write = write  # type: ignore[method-assign]
    with pytest.raises((OSError, fastvol.FastvolError), match="no space left"):
        measured(broken, F.cross_entropy, 8)
    if rank == 0:
        Folder.write = real  # type: ignore[method-assign]


def check_after_an_exception(rank: int, world: int) -> None:
    model = shard(perceptron(), [])
    local = [p.to_local().clone() for p in model.parameters()]
    calls = [0]

    def loss_fn(output: Tensor, target: Tensor) -> Tensor:
        calls[0] += 1
        if calls[0] > 9:
            raise RuntimeError("here")
        return F.cross_entropy(output, target)

    with pytest.raises(fastvol.FastvolError, match="here"):
        fastvol.estimate(model, loss_fn, 4, data=examples())
    for p, old in zip(model.parameters(), local, strict=True):
        assert torch.equal(p.to_local(), old)


def check_refusals(rank: int, world: int) -> None:
    model, data = shard(perceptron(), []), examples()
    calls: list[tuple[dict[str, Any], str]] = [
        ({"engine": "general"}, "cannot run a sharded module"),
        ({"noise": "rowspace"}, "cannot run a sharded module"),
        ({"method": "annealed"}, "use method='radial'"),
        ({"metric": torch.ones(5)}, "metric of a sharded module must be"),
        ({"measure": fastvol.Gaussian({"0.weight": 1.0})}, "std of a sharded module must be"),
    ]
    for options, words in calls:
        with pytest.raises((ValueError, fastvol.FastvolError), match=words):
            fastvol.estimate(model, F.cross_entropy, 2, data=data, **options)
    # Only one process sees the row.
    empty = perceptron()
    with torch.no_grad():
        empty[0].weight[14] = 0.0
    with pytest.raises(ValueError, match=r"parameter '0\.weight' has norm 0"):
        fastvol.estimate(shard(empty, []), F.cross_entropy, 2, data=data, metric="filter")
    broken = perceptron()
    with torch.no_grad():
        broken[0].weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"parameter '0\.weight' contains values"):
        fastvol.estimate(shard(broken, []), F.cross_entropy, 2, data=data)


CHECKS: dict[int, list[Callable[[int, int], None]]] = {
    2: [
        check_perceptron,
        check_columns,
        check_transformer,
        check_divided_data,
        check_data_out_of_step,
        check_estimate,
        check_checkpoint,
        check_refused_folders,
        check_after_an_exception,
        check_refusals,
    ],
    4: [
        check_perceptron,
        check_replicas,
        check_transformer,
        check_divided_data,
        check_other_worlds,
    ],
}
