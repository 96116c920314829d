"""The experiments: their cache and sweeps, their data, their command line, and short forms."""

from __future__ import annotations

import io
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import fastvol
from experiments import NAMES
from experiments.__main__ import main
from experiments.base import figures, generated, results
from experiments.base.cache import Cache, Outcome, config_digest
from experiments.base.errors import ExperimentError
from experiments.base.images import load_images
from experiments.base.laboratory import Laboratory, Probe, Training
from experiments.base.networks import Net
from experiments.base.protocols import (
    CIFAR_CNN,
    CIFAR_MLP,
    MNIST_CNN,
    MNIST_MLP,
    MODULAR_MLP,
    SPIRALS_MLP,
)
from experiments.base.published import published
from experiments.base.samples import Sample
from experiments.base.statistics import over_seeds, ranking, straight_line
from experiments.base.sweep import Unit, sweep
from experiments.base.training import Recipe
from experiments.base.volumes import Measurement, common_radius
from experiments.overall_volume.classes import aligned, components, joined

REPOSITORY = Path(__file__).parent.parent
RESULTS = sorted((REPOSITORY / "experiments").glob("*/results/*.json"))
RESULTS = [path for path in RESULTS if path.stem != "smoke"]


def _unit(name: str, made: list[str], *, fail: bool = False) -> Unit:
    def work(tick: Any) -> Outcome:
        if fail:
            raise KeyboardInterrupt
        made.append(name)
        tick(0.5)
        return Outcome({"name": name, "odd": math.inf}, {"weight": torch.arange(5.0)})

    return Unit("thing", {"name": name, "shape": (1, 2)}, 1.0, work)


def test_a_killed_sweep_goes_on(tmp_path: Path) -> None:
    made: list[str] = []
    cache = Cache(tmp_path)
    units = [_unit("a", made), _unit("b", made, fail=True), _unit("c", made)]
    with pytest.raises(KeyboardInterrupt):
        sweep(cache, units, "killed", quiet=True)
    again = [_unit(name, made) for name in "abc"]
    outcomes = sweep(Cache(tmp_path), again, "resumed", quiet=True)
    assert made == ["a", "b", "c"]
    assert [outcome.facts["name"] for outcome in outcomes] == ["a", "b", "c"]
    assert outcomes[0].tensors is not None
    assert outcomes[0].tensors["weight"].tolist() == [0, 1, 2, 3, 4]
    assert outcomes[0].facts["odd"] == math.inf
    assert not list(tmp_path.rglob("*.part"))


@pytest.mark.parametrize("damage", ["cut", "emptied", "altered", "weights cut", "weights gone"])
def test_a_damaged_unit_is_made_again(tmp_path: Path, damage: str) -> None:
    made: list[str] = []
    cache, unit = Cache(tmp_path), _unit("a", made)
    sweep(cache, [unit], "first", quiet=True)
    path = cache.path(unit.kind, unit.config)
    weights = path.with_suffix(".safetensors")
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-20])
    elif damage == "emptied":
        path.write_bytes(b"")
    elif damage == "altered":
        path.write_text(path.read_text().replace('"name": "a"', '"name": "b"', 2))
    elif damage == "weights cut":
        weights.write_bytes(weights.read_bytes()[:-4])
    else:
        weights.unlink()
    assert cache.read(unit.kind, unit.config) is None
    (outcome,) = sweep(cache, [unit], "second", quiet=True)
    assert made == ["a", "a"]
    assert outcome.facts["name"] == "a"
    assert cache.read(unit.kind, unit.config) is not None


def test_one_unit_twice_in_a_sweep_is_made_once(tmp_path: Path) -> None:
    made: list[str] = []
    sweep(Cache(tmp_path), [_unit("a", made), _unit("a", made)], "twice", quiet=True)
    assert made == ["a"]


def test_digests_tell_configs_apart() -> None:
    assert config_digest({"a": 1, "b": [2]}) == config_digest({"b": (2,), "a": 1})
    assert config_digest({"a": 1}) != config_digest({"a": 2})


@pytest.mark.parametrize(
    ("net", "pool", "count"),
    [
        (MNIST_MLP, "mnist", 235_146),
        (MNIST_CNN, "mnist", 421_642),
        (CIFAR_MLP, "cifar10", 1_707_274),
        (CIFAR_CNN, "cifar10", 1_276_234),
        (SPIRALS_MLP, "spirals", 4_353),
        (MODULAR_MLP, "modular", 73_097),
        (Net("gpt", (384,), layers=6, heads=6), "text", 10_745_088),
    ],
)
def test_networks_are_the_published_ones(net: Net, pool: str, count: int) -> None:
    shapes = {"mnist": (1, 28, 28), "cifar10": (3, 32, 32), "text": (256,)}
    if pool in shapes:
        like = generated.digits()
        classes = 65 if pool == "text" else 10
        object.__setattr__(like, "inputs", torch.zeros(1, *shapes[pool]))
        object.__setattr__(like, "classes", classes)
    else:
        like = {"spirals": generated.spirals, "modular": generated.modular}[pool]()
    state = torch.get_rng_state()
    assert sum(p.numel() for p in net.build(like).parameters()) == count
    assert torch.equal(state, torch.get_rng_state())


def test_samples_are_nested_and_poison_is_wrong() -> None:
    pool = generated.digits()
    small, large = Sample(11, 60, 40), Sample(11, 60, 400)
    x, y = small.examples(pool)
    big_x, big_y = large.examples(pool)
    assert torch.equal(x, big_x[:100])
    assert torch.equal(y, big_y[:100])
    poisoned = Sample(11, 60, poison=40)
    px, py = poisoned.examples(pool)
    assert torch.equal(px, x)
    assert torch.equal(py[:60], y[:60])
    assert (py[60:] != y[60:]).all()
    assert poisoned.landscape(60) == Sample(11, 60)
    uneven = Sample(11, 100, 200, imbalance=0.9).examples(pool)[1]
    assert int((uneven[:100] < 2).sum()) == 90
    assert uneven[100:].bincount(minlength=10).tolist() == [20] * 10
    noisy = Sample(11, 60, noise=50)
    assert noisy.examples(pool)[0].shape == (110, 1, 8, 8)
    with pytest.raises(ExperimentError, match="digits has 1297 examples, 2060 were asked for"):
        Sample(1, 60, 2000).examples(pool)


def test_what_is_left_over_tests_modular_addition() -> None:
    pool = generated.modular(7)
    sample = Sample(1, 10, 5)
    inputs, labels = sample.tests(pool)
    assert len(labels) == 49 - 15
    drawn = {tuple(row) for row in sample.examples(pool)[0].tolist()}
    assert not drawn & {tuple(row) for row in inputs.tolist()}


def _parquet(folder: Path, count: int, *, column: str = "image") -> list[int]:
    import pyarrow as pa
    import pyarrow.parquet as parquet
    from PIL import Image

    folder.mkdir(parents=True)
    labels = [k % 10 for k in range(count)]
    entries = []
    for k in range(count):
        file = io.BytesIO()
        Image.fromarray(np.full((28, 28), k, dtype=np.uint8)).save(file, format="PNG")
        entries.append({"bytes": file.getvalue(), "path": f"{k}.png"})
    for split in ("train", "test"):
        parquet.write_table(
            pa.table({column: entries, "label": labels}), folder / f"{split}.parquet"
        )
    return labels


@pytest.mark.parametrize("column", ["image", "img"])
def test_images_from_a_folder(tmp_path: Path, column: str) -> None:
    labels = _parquet(tmp_path / "data" / "mnist", 12, column=column)
    pool = load_images("mnist", str(tmp_path / "data"), tmp_path / "cache")
    assert pool.inputs.shape == (12, 1, 28, 28)
    assert pool.labels.tolist() == labels
    expected = (torch.arange(12) / 255 - 0.1307) / 0.3081
    torch.testing.assert_close(pool.inputs[:, 0, 3, 4], expected)
    kept = next((tmp_path / "cache").glob("mnist-*.safetensors"))
    kept.write_bytes(kept.read_bytes()[:100])
    again = load_images("mnist", str(tmp_path / "data" / "mnist"), tmp_path / "cache")
    assert again.digest == pool.digest


def test_images_that_cannot_be_had(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ExperimentError, match=r"--data: there is no folder .*nowhere"):
        load_images("mnist", str(tmp_path / "nowhere"), tmp_path)
    with pytest.raises(ExperimentError, match=r"holds neither mnist/train.parquet"):
        load_images("mnist", str(tmp_path), tmp_path)
    folder = tmp_path / "mnist"
    folder.mkdir()
    for split in ("train", "test"):
        (folder / f"{split}.parquet").write_bytes(b"PAR1 half")
    with pytest.raises(ExperimentError, match="cannot be read"):
        load_images("mnist", str(tmp_path), tmp_path / "cache")

    import datasets

    def offline(*_: Any, **__: Any) -> None:
        raise ConnectionError("no route\nto the hub")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(ExperimentError, match=r"--data hub: ylecun/mnist .*no route\)\. Without"):
        load_images("mnist", "hub", tmp_path / "cache")


def test_text_that_cannot_be_had(tmp_path: Path) -> None:
    with pytest.raises(ExperimentError, match="no text file"):
        generated.text(str(tmp_path / "missing.txt"), 8)
    short = tmp_path / "short.txt"
    short.write_text("too short")
    with pytest.raises(ExperimentError, match="has 9 characters; windows of 8 take at least 360"):
        generated.text(str(short), 8)
    short.write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(ExperimentError, match="not UTF-8"):
        generated.text(str(short), 8)


def test_training_is_repeatable_and_kept_along_the_way(tmp_path: Path) -> None:
    laboratory = Laboratory(Cache(tmp_path / "a"), quiet=True)
    training = Training(
        Net("mlp", (16,), seed=3), Recipe(40, rate=1e-2, keep=(10, 20)), Sample(13, 60), "mnist"
    )
    (run,) = laboratory.train([training])
    assert run.epochs == (10, 20, 40)
    assert run.end["train_loss"] < run.facts[0]["train_loss"]
    (again,) = Laboratory(Cache(tmp_path / "b"), quiet=True).train([training])
    for name, weight in laboratory.model(run).named_parameters():
        assert torch.equal(weight, dict(laboratory.model(again).named_parameters())[name])
    early = laboratory.model(run, 10).state_dict()["1.weight"]
    assert not torch.equal(early, laboratory.model(run).state_dict()["1.weight"])
    stopping = replace(training, recipe=Recipe(400, rate=1e-2, stop_loss=0.5))
    (stopped,) = laboratory.train([stopping])
    assert stopped.end["train_loss"] <= 0.5
    assert stopped.epochs[-1] < 400


def test_sam_climbs_before_it_descends(tmp_path: Path) -> None:
    laboratory = Laboratory(Cache(tmp_path), quiet=True)
    plain = Training(Net("mlp", (8,)), Recipe(5), Sample(1, 30), "digits")
    sharp = replace(plain, recipe=Recipe(5, sam=0.05))
    runs = laboratory.train([plain, sharp])
    weights = [laboratory.model(run).state_dict()["1.weight"] for run in runs]
    assert 0 < float((weights[0] - weights[1]).abs().max()) < 0.05


def test_a_basin_that_has_vanished_says_so(tmp_path: Path) -> None:
    laboratory = Laboratory(Cache(tmp_path), quiet=True)
    training = Training(Net("mlp", (16,)), Recipe(60, rate=1e-2), Sample(1, 30), "digits")
    (run,) = laboratory.train([training])
    own, wide = laboratory.measure(
        [
            Probe(run, training.sample, Measurement(150, threshold=0.3)),
            Probe(run, training.sample.landscape(600), Measurement(150, threshold=0.3)),
        ]
    )
    assert own.volume is not None
    assert wide.volume is None
    assert wide.loss > 0.3
    radius = common_radius([own.volume, wide.volume])
    assert radius is not None
    assert 0 < radius < math.inf


def test_the_published_grid_rounds_up(tmp_path: Path) -> None:
    laboratory = Laboratory(Cache(tmp_path), quiet=True)
    training = Training(Net("mlp", (8,)), Recipe(80, rate=2e-2), Sample(1, 20), "digits")
    (run,) = laboratory.train([training])
    model, pool = laboratory.model(run), laboratory.pool("digits")
    examples = laboratory.examples(training.sample, "digits")
    found = published(model, pool, examples, threshold=0.5, directions=30)
    assert 0 < found["grid"] - found["exact"] < 2 * found["step"]
    ours = fastvol.estimate(
        model,
        torch.nn.functional.cross_entropy,
        n=3000,
        data=examples,
        threshold=0.5,
        metric="filter",
        method="radial",
        progress=False,
    )
    # One law of directions: the share below the median of others is a half, ± 0.5/√30.
    below = float((ours.log_radii < found["median_log_radius"]).mean())
    assert abs(below - 0.5) < 3 * 0.5 / math.sqrt(30)


def test_rankings_and_fits() -> None:
    def volume(scale: float, seed: int = 0) -> fastvol.VolumeEstimate:
        model = torch.nn.Linear(3, 1, bias=False).double()
        torch.nn.init.zeros_(model.weight)

        def loss(m: torch.nn.Module) -> torch.Tensor:
            (w,) = m.parameters()
            return (w.square() * torch.tensor([1.0, 4.0, 9.0])).sum() / scale**2

        return fastvol.estimate(
            model, loss, n=500, threshold=1.0, method="radial", seed=seed, progress=False
        )

    volumes = [volume(3.0), volume(2.0), volume(1.0)]
    found = ranking(volumes, [10, 20, 30], honest=True)
    assert found is not None
    assert (found["tau"], found["probability_first_is_largest"]) == (-1.0, 1.0)
    turned = ranking(volumes[::-1], [10, 20, 30], honest=False)
    assert turned is not None
    assert (turned["tau"], turned["probability_first_is_largest"]) == (1.0, 0.0)
    tied = ranking([volumes[0], volumes[0]], [10, 20], honest=True)
    assert tied is not None
    assert tied["probability_first_is_largest"] == 0.0

    line = straight_line([0, 1, 2, 3], [1, 3, 5, 7.001])
    assert line["slope_low"] < 2.0003 < line["slope_high"]
    assert abs(line["slope"] - 2.0003) < 1e-9
    assert math.isnan(straight_line([0, 1], [1, 2])["slope"])
    entries = [{"value": v, "stderr": 0.3, "reliable": True} for v in (1.0, 2.0, 3.0)]
    mean = over_seeds([*entries, {"vanished": True}])
    assert (mean["value"], mean["left"], mean["seeds"]) == (2.0, 3, 4)
    assert mean["stderr"] == pytest.approx(math.sqrt((0.3**2 + 1.0) / 3))


def test_copies_are_found_again_and_classes_counted() -> None:
    generator = torch.Generator().manual_seed(0)
    units, inputs = 4, 2
    reference = torch.randn(units * (inputs + 2) + 1, generator=generator)
    weights = reference[: units * inputs].reshape(units, inputs)
    rest = reference[units * inputs :]
    order, sign = torch.tensor([2, 0, 3, 1]), torch.tensor([1.0, -1.0, -1.0, 1.0])
    copy = torch.cat(
        [
            (sign[:, None] * weights[order]).reshape(-1),
            sign * rest[:units][order],
            sign * rest[units : 2 * units][order],
            rest[-1:],
        ]
    )
    assert torch.equal(aligned(copy, reference, units, inputs), reference)
    far = torch.zeros(2, 3)
    far[1, 0] = 2.0
    assert joined(far[0], far[1], lambda points: (points[:, 0] - 1).square(), 1.0)
    assert not joined(far[0], far[1], lambda points: 2 - (points[:, 0] - 1).square(), 1.5)
    links = torch.eye(5, dtype=torch.bool)
    for a, b in ((0, 3), (3, 4)):
        links[a, b] = links[b, a] = True
    assert components(links) == [3, 1, 1]


def test_bad_input_is_told_without_a_traceback(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def said(*arguments: str) -> str:
        assert main([*arguments, "--cache", str(tmp_path / "cache"), "--quiet"]) == 2
        return capsys.readouterr().err

    out = ["--json", str(tmp_path / "out.json")]
    assert "no experiment 'poisonous'; there are poisoned, largest" in said("poisonous", *out)
    assert "there is no folder" in said("largest", "--data", str(tmp_path / "nowhere"), *out)
    assert "must end in .json" in said("largest", "--json", str(tmp_path / "out.txt"))
    assert "--device: cuda:99 cannot be used" in said("largest", "--device", "cuda:99", *out)
    assert "cannot be read" in said("largest", "--redraw", *out)
    assert not (tmp_path / "out.json").exists()
    (tmp_path / "file").write_text("")
    blocked = ["--cache", str(tmp_path / "file"), "--quiet", *out]
    assert main(["largest", *blocked]) == 2
    assert "--cache" in capsys.readouterr().err


def test_the_list(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(NAMES)
    assert all((REPOSITORY / "experiments" / name / "README.md").is_file() for name in NAMES)


@pytest.mark.parametrize(
    "name",
    [
        name if name in ("largest", "slices") else pytest.param(name, marks=pytest.mark.slow)
        for name in NAMES
    ],
)
def test_short_forms(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "out.json"
    common = ["--quiet", "--cache", str(tmp_path / "cache"), "--json", str(path)]
    assert main([name, *common]) == 0
    title = capsys.readouterr().out.splitlines()[0]
    found = results.read(path)
    assert (found["experiment"], found["size"]) == (name, "smoke")
    assert len(found["commit"] or "") in (0, 40)
    assert figures.source_of(path.with_suffix(".png")) == results.checksum(path)
    assert path.with_suffix(".pdf").stat().st_size > 1000
    _assert_flagged(found)
    # The second time nothing is made, and the same is found.
    units = {p: p.stat().st_mtime_ns for p in (tmp_path / "cache").rglob("*") if p.is_file()}
    assert main([name, *common]) == 0
    assert capsys.readouterr().out.splitlines()[0] == title
    assert units == {p: p.stat().st_mtime_ns for p in units}
    again = results.read(path)
    for key in ("date", "seconds"):
        found.pop(key), again.pop(key)
    assert found == again


def _assert_flagged(value: Any) -> None:
    """Every volume in the results carries its error and whether it is reliable."""
    if isinstance(value, dict):
        if "value" in value and not value.get("vanished"):
            assert {"stderr", "reliable"} <= set(value)
        for entry in value.values():
            _assert_flagged(entry)
    elif isinstance(value, list):
        for entry in value:
            _assert_flagged(entry)


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: f"{path.parent.parent.name}-{path.stem}")
def test_committed_results_say_what_made_them(path: Path) -> None:
    found = json.loads(path.read_text())
    assert found["experiment"] == path.parent.parent.name
    assert found["size"] == path.stem
    assert len(found["commit"]) == 40
    assert not found["dirty"]
    assert found["config"]
    assert found["made_by"]["commits"]
    assert not found["made_by"]["dirty"]
    assert figures.source_of(path.with_suffix(".png")) == results.checksum(path)
    _assert_flagged(found)
