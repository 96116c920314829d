"""Hugging Face's causal language models and classifiers, with random weights: batches as dicts."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

import fastvol
from fastvol import _backend
from fastvol._layout import ParameterLayout
from fastvol._objective import PREFIX, Objective
from fastvol._scale import Scale
from fastvol.engines import GeneralEngine, Indexed, InPlaceEngine, Plan
from fastvol.losses import model_loss

transformers = pytest.importorskip("transformers")

VOCABULARY, LENGTH = 13, 7
SMALL = {
    "vocab_size": VOCABULARY, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1,
    "num_attention_heads": 2, "max_position_embeddings": 16, "pad_token_id": 0,
}  # fmt: skip


def gpt2(dtype: torch.dtype = torch.float32) -> nn.Module:
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY, n_positions=8, n_embd=8, n_layer=1, n_head=2, bos_token_id=0,
        eos_token_id=0, loss_type="ForCausalLM",
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config).to(dtype)


def llama(dtype: torch.dtype = torch.float32) -> nn.Module:
    config = transformers.LlamaConfig(**SMALL, num_key_value_heads=1, tie_word_embeddings=True)
    return transformers.LlamaForCausalLM(config).to(dtype)


def bert(dtype: torch.dtype = torch.float32) -> nn.Module:
    config = transformers.BertConfig(**SMALL, num_labels=3)
    return transformers.BertForSequenceClassification(config).to(dtype)


def masked(dtype: torch.dtype = torch.float32) -> nn.Module:
    return transformers.BertForMaskedLM(transformers.BertConfig(**SMALL)).to(dtype)


CAUSAL = {"gpt2": gpt2, "llama": llama}
MODELS: dict[str, Callable[..., nn.Module]] = {**CAUSAL, "bert": bert, "masked": masked}


def texts(count: int = 5) -> dict[str, Tensor]:
    """Tokens of several lengths, padded; the padding is neither seen nor asked for."""
    tokens = torch.randint(1, VOCABULARY, (count, LENGTH))
    mask = (torch.arange(LENGTH) < torch.randint(3, LENGTH + 1, (count, 1))).long()
    return {"input_ids": tokens * mask, "attention_mask": mask}


def batch_for(name: str, count: int = 5) -> dict[str, Tensor]:
    batch = texts(count)
    if name == "bert":
        return {**batch, "labels": torch.randint(3, (count,))}
    labels = torch.where(batch["attention_mask"] == 1, batch["input_ids"], -100)
    return {**batch, "labels": labels}


def parts_of(batch: dict[str, Tensor], sizes: list[int]) -> list[dict[str, Tensor]]:
    split = {key: value.split(sizes) for key, value in batch.items()}
    return [{key: value[i] for key, value in split.items()} for i in range(len(sizes))]


def by_hand(model: nn.Module, batch: dict[str, Tensor]) -> float:
    """The mean over everything that counts, from the logits."""
    with torch.no_grad():
        logits = model.eval()(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]
        ).logits
    labels = batch["labels"]
    if isinstance(model, tuple(type(make()) for make in CAUSAL.values())):
        logits, labels = logits[:, :-1], labels[:, 1:]
    return float(F.cross_entropy(logits.double().flatten(0, -2), labels.flatten()))


@pytest.mark.parametrize("name", MODELS)
def test_batches_are_weighted_by_what_counts(name: str) -> None:
    """However the texts fall into batches, the loss is the mean over all labels that count."""
    model, batch = MODELS[name](torch.float64).eval(), batch_for(name)
    expected = by_hand(model, batch)
    device = torch.device("cpu")
    if name in CAUSAL:
        count = int((batch["labels"][:, 1:] != -100).sum())
    else:
        count = int((batch["labels"] != -100).sum())
    for data in (batch, [batch], parts_of(batch, [1, 4]), parts_of(batch, [2, 2, 1])):
        objective = Objective(model, model_loss, data, device)
        # The models make the loss itself in float32.
        assert objective.prepare(None) == pytest.approx(expected, rel=1e-6)
        assert objective.weight == count


def engine_for(
    model: nn.Module, loss_fn: Any, data: Any, kind: str, lanes: int
) -> InPlaceEngine | GeneralEngine:
    layout = ParameterLayout(model)
    objective = Objective(model, loss_fn, data, layout.device)
    objective.prepare(layout.unflatten(layout.flatten(), PREFIX))
    scale, backend = Scale.uniform(layout), _backend.select("cpp")
    plan = Plan(kind, 1, lanes, False, "float32", 1, 1, "cpp")
    if kind == "inplace":
        return InPlaceEngine(objective, layout, scale, plan, backend)
    return GeneralEngine(objective, layout, scale.flat, plan, backend)


@pytest.mark.parametrize("kind", ["general", "inplace"])
@pytest.mark.parametrize("name", ["gpt2", "llama", "bert"])
def test_losses_along_rays(name: str, kind: str) -> None:
    """Those of a loss_fn(model) over all at once, from lists, loaders and whole dicts."""
    model, batch = MODELS[name]().eval(), batch_for(name)
    before = [p.detach().clone() for p in model.parameters()]
    ids, radii = np.arange(3), np.array([0.1, 1.0, 5.0])
    alone = engine_for(model, lambda m: m(**batch).loss, None, "general", 3)
    alone.load(ids, Indexed(2, ids))
    expected = alone.loss(radii).values
    assert np.ptp(expected) > 1e-3
    rows = [{key: value[i] for key, value in batch.items()} for i in range(5)]
    for data in (batch, parts_of(batch, [3, 2]), DataLoader(rows, batch_size=2)):
        engine = engine_for(model, model_loss, data, kind, 3)
        engine.load(ids, Indexed(2, ids))
        np.testing.assert_allclose(engine.loss(radii).values, expected, rtol=2e-5)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_estimate() -> None:
    model, batch = gpt2(), batch_for("gpt2")
    result = fastvol.estimate(
        model, model_loss, 2, data=parts_of(batch, [3, 2]), increase=0.5, method="radial",
        engine="inplace", rtol=0.05,
    )  # fmt: skip
    assert model.training
    assert result.dim == sum(p.numel() for p in model.parameters())
    assert np.isfinite(result.log_radii).all()
    assert result.config["loss0"] == pytest.approx(by_hand(model, batch), rel=1e-5)


def test_tied_embeddings_move_once() -> None:
    model = gpt2().eval()
    layout = ParameterLayout(model)
    assert [s.name for s in layout.segments].count("transformer.wte.weight") == 1
    assert not any("lm_head" in s.name for s in layout.segments)
    objective = Objective(model, model_loss, batch_for("gpt2"), layout.device)
    objective.prepare(None)
    seen = []
    model.lm_head.register_forward_hook(
        lambda module, args, output: seen.append(
            torch.equal(module.weight, model.transformer.wte.weight)
            and not torch.equal(module.weight, start)
        )
    )
    start = model.lm_head.weight.detach().clone()
    plan = Plan("inplace", 1, 1, False, "float32", 1, 1, "cpp")
    backend = _backend.select("cpp")
    engine = InPlaceEngine(objective, layout, Scale.uniform(layout), plan, backend)
    engine.load(np.array([0]), Indexed(0, np.array([0])))
    engine.loss(np.array([1.0]))
    assert seen == [True]


def test_bfloat16() -> None:
    """Weights in half precision, noise and sums in more: the loss of the rounded weights."""
    model, batch = llama(torch.bfloat16).eval(), batch_for("llama")
    layout = ParameterLayout(model)
    objective = Objective(model, model_loss, parts_of(batch, [2, 3]), layout.device)
    objective.prepare(None)
    scale = Scale.uniform(layout)
    backend = _backend.select("cpp")
    plan = Plan("inplace", 1, 3, False, "float32", 1, 1, "cpp")
    engine = InPlaceEngine(objective, layout, scale, plan, backend)
    ids, radii = np.arange(3), np.array([0.5, 2.0, 8.0])
    info = engine.load(ids, Indexed(1, ids))
    values = engine.loss(radii).values
    z = torch.empty(3, layout.size)
    backend.normals(z, 1, 0, ids)
    for k in range(3):
        theta = layout.flatten() + np.float32(radii[k] / info.norm[k]) * z[k]
        with torch.no_grad():
            moved = objective.call(
                layout.unflatten(theta, PREFIX),
                next(iter(Objective(model, model_loss, batch, layout.device).batches())),
            )
        assert values[k] == pytest.approx(float(moved), rel=0.02)


def test_a_loss_of_ones_own_gets_output_and_batch() -> None:
    model, batch = bert(), batch_for("bert")

    def loss_fn(output: Any, batch: dict[str, Tensor]) -> Tensor:
        return F.cross_entropy(output.logits, batch["labels"])

    device = torch.device("cpu")
    own = Objective(model.eval(), loss_fn, parts_of(batch, [1, 4]), device).prepare(None)
    assert own == pytest.approx(by_hand(model, batch), rel=1e-6)


def test_two_dicts_are_two_batches() -> None:
    model, batch = bert().eval(), batch_for("bert")
    first, second = parts_of(batch, [2, 3])
    device = torch.device("cpu")
    for data in ([first, second], (first, second)):
        assert len(list(Objective(model, model_loss, data, device).batches())) == 2
    # Other names: a dict of inputs with a dict of targets.
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}

    def loss_fn(output: Any, target: dict[str, Tensor]) -> Tensor:
        return F.cross_entropy(output.logits, target["labels"])

    pair = Objective(model, loss_fn, (inputs, {"labels": batch["labels"]}), device)
    assert pair.prepare(None) == pytest.approx(by_hand(model, batch), rel=1e-6)


def test_a_tokenizer_s_batch() -> None:
    """BatchEncoding is a mapping, if not a dict."""
    model, batch = bert().eval(), batch_for("bert")
    encoded = transformers.BatchEncoding(batch)
    value = Objective(model, model_loss, encoded, torch.device("cpu")).prepare(None)
    assert value == pytest.approx(by_hand(model, batch), rel=1e-6)


def test_divergence_of_predictions() -> None:
    """fastvol.losses.KLDivergence takes the logits of an output."""
    model, batch = bert(), batch_for("bert")
    kl = fastvol.losses.KLDivergence()
    result = fastvol.estimate(
        model, kl, 2, data=parts_of(batch, [2, 3]), increase=0.1, engine="inplace", rtol=0.05,
        method="radial",
    )  # fmt: skip
    assert result.config["loss0"] == pytest.approx(0.0, abs=1e-6)
    assert np.isfinite(result.log_radii).all()


@pytest.mark.parametrize(
    ("loss_fn", "change", "message"),
    [
        (F.cross_entropy, {}, r"data: batch 0 is a dict.*fastvol\.losses\.model_loss"),
        (nn.CrossEntropyLoss(), {}, "data: batch 0 is a dict"),
        (functools.partial(F.cross_entropy, label_smoothing=0.1), {}, "data: batch 0 is a dict"),
        (model_loss, {"labels": None}, "loss_fn .* the model's output has no loss"),
        (model_loss, {"input_ids": torch.ones(0, 3).long()}, "data: batch 0 is empty"),
    ],
)
def test_what_cannot_be_used_is_said(loss_fn: Any, change: dict[str, Any], message: str) -> None:
    batch = {**batch_for("bert"), **change}
    with pytest.raises((TypeError, ValueError, fastvol.FastvolError), match=message):
        fastvol.estimate(bert(), loss_fn, 2, data=[batch])


def test_which_losses_cannot_be_negative() -> None:
    assert model_loss.nonnegative(gpt2())
    assert model_loss.nonnegative(bert())
    assert not model_loss.nonnegative(nn.Linear(1, 1))


def test_the_example_of_the_documentation(capsys: pytest.CaptureFixture[str]) -> None:
    page = Path(__file__).parent.parent / "docs" / "large_models.md"
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(), flags=re.DOTALL)
    (block,) = [block for block in blocks if "torchrun" not in block]
    names: dict[str, Any] = {}
    exec(block, names)
    assert names["basin"].plan["engine"] == "inplace"
    assert "lower bound" in capsys.readouterr().out
