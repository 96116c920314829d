"""The demo: honest data, honest training, and words that follow from the numbers."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from fastvol import FastvolError, compare, demo
from fastvol.demo import training

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")


@pytest.fixture(scope="module")
def outcome() -> demo.Demo:
    return demo.run(n=400, seed=0)


def _swapped(outcome: demo.Demo) -> demo.Demo:
    """The same two basins, each under the other's name."""
    clean, poisoned = outcome.poisoned, outcome.clean
    comparison = compare(clean.estimate, poisoned.estimate)
    return dataclasses.replace(outcome, clean=clean, poisoned=poisoned, comparison=comparison)


def _uncomparable(outcome: demo.Demo) -> demo.Demo:
    nothing = dataclasses.replace(
        outcome.comparison,
        radius=math.nan,
        log_ratio=math.nan,
        stderr=math.nan,
        probability=math.nan,
        reliable=False,
    )
    return dataclasses.replace(outcome, comparison=nothing)


def test_the_wrong_labels_are_always_wrong_and_all_sets_are_apart() -> None:
    from sklearn import datasets

    images, classes = datasets.load_digits(return_X_y=True)
    truth: dict[bytes, set[int]] = {}
    for image, label in zip(torch.tensor(images / 16, dtype=torch.float32), classes, strict=True):
        truth.setdefault(image.numpy().tobytes(), set()).add(int(label))
    digits = training.load_digits(seed=3)

    def known(part: tuple[torch.Tensor, torch.Tensor]) -> list[bool]:
        return [
            int(target) in truth[image.numpy().tobytes()]
            for image, target in zip(*part, strict=True)
        ]

    assert all(known(digits.clean))
    assert all(known(digits.test))
    assert not any(known(digits.poison))
    sizes = [len(part[1]) for part in (digits.clean, digits.poison, digits.test)]
    assert sizes == [300, 100, len(classes) - 400]
    parts = [{x.numpy().tobytes() for x in part[0]} for part in (digits.clean, digits.poison)]
    assert not parts[0] & parts[1]
    # Every wrong class occurs.
    assert set(digits.poison[1].tolist()) == set(range(10))


def test_the_seed_decides_and_the_global_generator_does_not() -> None:
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    first, again, other = training.network(5), training.network(5), training.network(6)
    assert torch.equal(torch.random.get_rng_state(), before)
    flat = [torch.nn.utils.parameters_to_vector(m.parameters()) for m in (first, again, other)]
    assert torch.equal(flat[0], flat[1])
    assert not torch.equal(flat[0], flat[2])
    assert torch.equal(training.load_digits(5).poison[1], training.load_digits(5).poison[1])


def test_training_that_does_not_arrive_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "_MAX_STEPS", 3)
    with pytest.raises(FastvolError, match="after 3 steps"):
        training.train(training.network(0), training.load_digits(0).clean)


def test_both_reach_the_same_training_loss(outcome: demo.Demo) -> None:
    for twin in (outcome.clean, outcome.poisoned):
        # The first step at or below the target: not far below it.
        assert 0.9 * training.TRAINING_LOSS < twin.training_loss <= training.TRAINING_LOSS
        assert twin.clean_loss < outcome.threshold
        assert twin.steps > 0
    assert outcome.clean.clean_loss == pytest.approx(outcome.clean.training_loss, rel=1e-5)


def test_both_are_asked_the_same_question(outcome: demo.Demo) -> None:
    clean, poisoned = outcome.clean.estimate, outcome.poisoned.estimate
    assert clean.dim == poisoned.dim == 6570
    assert clean.n == poisoned.n == 400
    assert clean.seed == poisoned.seed == outcome.seed
    for key in ("threshold", "metric", "measure", "layout", "antithetic"):
        assert clean.config[key] == poisoned.config[key], key
    assert clean.config["threshold"] == outcome.threshold
    assert clean.config["metric"] == "filter"
    assert outcome.comparison.paired


def test_wrong_labels_cost_accuracy(outcome: demo.Demo) -> None:
    assert outcome.clean.test_accuracy > 0.9
    assert outcome.poisoned.test_accuracy < outcome.clean.test_accuracy - 0.1


def test_a_run_can_be_repeated() -> None:
    a, b = demo.run(n=8, seed=2), demo.run(n=8, seed=2)
    assert a.poisoned.steps == b.poisoned.steps
    # The plan is timed, so the chunks may differ between the two: equal to the search's tolerance.
    tolerance = 2 * a.poisoned.estimate.config["pilot"]["rtol"]
    for one, other in ((a.clean, b.clean), (a.poisoned, b.poisoned)):
        assert one.estimate.log_radii == pytest.approx(other.estimate.log_radii, abs=tolerance)


def test_the_number_of_threads_is_given_back() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        demo.run(n=2)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_the_table_says_what_was_measured(outcome: demo.Demo) -> None:
    text = demo.table(outcome)
    lines = text.splitlines()
    assert max(map(len, lines)) <= 88
    for name in ("test accuracy", "loss on the clean images", "mean log radius", "directions n"):
        assert any(line.startswith(name) for line in lines), name
    (uncapped,) = [line for line in lines if line.startswith("log volume without a cap")]
    assert uncapped.count("a bound") == 2
    (filled,) = [line for line in lines if "φ(R)" in line]
    assert f"R = {outcome.comparison.radius:#.3g}" in filled
    assert f"{outcome.poisoned.filled(outcome.comparison.radius)[0]:.2f}" in filled


def test_the_words_follow_the_numbers(outcome: demo.Demo) -> None:
    assert outcome.comparison.reliable
    larger, smaller = "The clean network's basin is larger", "The poisoned twin's basin is larger"
    expected, opposite = (
        (larger, smaller) if outcome.comparison.log_ratio > 0 else (smaller, larger)
    )
    swapped = _swapped(outcome)
    for tell in (demo.finding, demo.title):
        assert tell(outcome).startswith(expected)
        assert tell(swapped).startswith(opposite)
    assert f"{outcome.comparison.log_ratio:.2f}" in demo.finding(outcome)


def test_where_nothing_is_known_nothing_is_claimed(outcome: demo.Demo) -> None:
    nothing = _uncomparable(outcome)
    for tell in (demo.finding, demo.title):
        assert tell(nothing).startswith("This run cannot tell")
        assert "nan" not in tell(nothing)
    assert "φ(R)" not in demo.table(nothing)
    undecided = dataclasses.replace(
        outcome, comparison=dataclasses.replace(outcome.comparison, probability=0.6)
    )
    assert demo.finding(undecided).startswith("This run cannot tell")
    assert "0.6000" in demo.finding(undecided)


@pytest.mark.parametrize("change", [lambda same: same, _swapped, _uncomparable])
def test_a_picture_is_written(change, outcome: demo.Demo, tmp_path) -> None:
    path = tmp_path / "figure.png"
    demo.draw(change(outcome), path)
    assert path.read_bytes().startswith(b"\x89PNG")
    assert path.stat().st_size > 10_000


def test_an_unknown_kind_of_picture_is_refused_before_the_work(tmp_path) -> None:
    demo.check_figure(tmp_path / "figure.PDF")
    for name in ("figure.txt", "figure"):
        with pytest.raises(ValueError, match="--output"):
            demo.check_figure(tmp_path / name)
