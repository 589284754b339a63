"""One batch in any holder, and a loss that runs the model: trained, evaluated and measured as by
plain autograd on the whole batch, or refused in one line."""

import copy
from collections import UserDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

import hessianflow as hf
from hessianflow.adversarial import FGSM, ConcurrentAdversary
from hessianflow.curvature import (
    CurvatureProbe,
    FisherOperator,
    GGNOperator,
    HessianOperator,
    critical_rate,
    noise_scale,
)
from hessianflow.training import (
    AfterEpoch,
    Metrics,
    Passes,
    Reporting,
    evaluate,
)

ROWS, LENGTH, WORDS = 24, 6, 7


@dataclass
class Output:
    loss: Tensor | None
    logits: Tensor


class Model(nn.Module):
    """Predicts the next word, and computes its own loss, as models of transformers do."""

    def __init__(self, dropout: float = 0.0, normalised: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words = nn.Embedding(WORDS, 5)
        self.dropout = nn.Dropout(dropout)
        self.norm = nn.BatchNorm1d(LENGTH) if normalised else nn.Identity()
        self.head = nn.Linear(5, WORDS)
        self.double()

    def forward(self, ids: Tensor, mask: Tensor | None = None, labels: Any = None) -> Output:
        hidden = self.norm(self.dropout(self.words(ids)))
        if mask is not None:
            hidden = hidden * mask[..., None]
        logits = self.head(hidden.cumsum(1))
        if labels is None:
            return Output(None, logits)
        shifted = logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
        return Output(cross_entropy(*shifted), logits)


@dataclass
class Record:
    ids: Tensor
    mask: Tensor
    labels: Tensor
    name: str = "all"


class Named(NamedTuple):
    ids: Tensor
    mask: Tensor
    labels: Tensor


def whole(rows: int = ROWS) -> dict[str, Tensor]:
    """Return sentences of 2 to 6 words; the first five have no word that counts."""
    source = torch.Generator().manual_seed(3)
    mask = (torch.arange(LENGTH) < 2 + torch.arange(rows)[:, None] % 5).long()
    ids = torch.randint(WORDS, (rows, LENGTH), generator=source)
    labels = torch.where(mask > 0, ids, -100)
    labels[:5] = -100
    return {"ids": ids, "mask": mask, "labels": labels}


def items(rows: int = ROWS) -> list[dict[str, Tensor]]:
    batch = whole(rows)
    return [{name: entry[row] for name, entry in batch.items()} for row in range(rows)]


def own(model: Any, batch: Any) -> Any:
    return model(batch["ids"], batch["mask"], batch["labels"])


def scalar(model: Any, batch: Any) -> Tensor:
    loss: Tensor = own(model, batch).loss
    return loss


def of_attributes(model: Any, batch: Any) -> Any:
    return model(batch.ids, batch.mask, batch.labels)


def of_places(model: Any, batch: Any) -> Any:
    return {"loss": model(*batch).loss}


def stacked(rows: list[Any]) -> dict[str, Tensor]:
    return {name: torch.stack([row[name] for row in rows]) for name in ("ids", "mask", "labels")}


def named(rows: list[Any]) -> Any:
    return UserDict(stacked(rows), text=[str(row["ids"].tolist()) for row in rows])


FORMS: dict[str, tuple[Any, Any]] = {
    "the model's own": (stacked, hf.ModelLoss()),
    "an object with a loss": (stacked, own),
    "a scalar": (stacked, scalar),
    "a mapping with text": (named, hf.ModelLoss()),
    "a dataclass": (lambda rows: Record(**stacked(rows)), of_attributes),
    "a dataclass by its fields": (
        lambda rows: Record(**stacked(rows)),
        hf.ModelLoss(of_attributes),
    ),
    "a named tuple": (lambda rows: Named(**stacked(rows)), of_attributes),
    "a tuple of three": (lambda rows: tuple(stacked(rows).values()), hf.ModelLoss(of_places)),
    "a stated weight": (
        stacked,
        hf.ModelLoss(weight=lambda batch: (batch["labels"][:, 1:] != -100).sum()),
    ),
    "a weight with a name": (stacked, hf.ModelLoss(weight="next tokens")),
    "a stated weight of both": (
        stacked,
        hf.WeightedLoss(
            hf.ModelLoss(scalar), lambda _, batch: (batch["labels"][:, 1:] != -100).sum()
        ),
    ),
}


def trained(model: nn.Module, data: Any, **options: Any) -> Any:
    wanted: dict[str, Any] = {"loss_fn": hf.ModelLoss(), "epochs": 1, **options}
    wanted.setdefault("reporting", Reporting(show_progress=False))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
    return hf.AdaptiveBatchTrainer(model, data, optimizer=optimizer, **wanted).fit()


def weights(model: nn.Module) -> Tensor:
    return torch.cat([parameter.detach().reshape(-1) for parameter in model.parameters()])


@pytest.mark.parametrize("size", [None, 5])
@pytest.mark.parametrize("form", FORMS)
def test_every_form_trains_as_the_whole_batch(form: str, size: int | None) -> None:
    """In microbatches of five, the first one holds no word that counts."""
    collate, loss = FORMS[form]
    model = Model()
    slopes = torch.autograd.grad(model(**whole()).loss, list(model.parameters()))
    expected = weights(model) - 0.5 * torch.cat([slope.reshape(-1) for slope in slopes])
    value = float(model(**whole()).loss.detach())
    data = hf.data.AdaptiveBatches(items(), ROWS, shuffle=False, collate_fn=collate)
    history = trained(model, data, loss_fn=loss, passes=Passes(microbatch_size=size))
    torch.testing.assert_close(weights(model), expected, rtol=1e-12, atol=1e-14)
    assert history.epochs[0]["train_loss"] == pytest.approx(value, rel=1e-12)


@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_evaluated_as_the_whole_batch(form: str) -> None:
    collate, loss = FORMS[form]
    model = Model()
    result = model(**whole())
    loader = DataLoader(items(), batch_size=5, collate_fn=collate)  # type: ignore[arg-type]
    found = evaluate(model, loader, loss)
    assert found.loss == pytest.approx(float(result.loss.detach()), rel=1e-12)
    targets = whole()["labels"][:, 1:]
    hits = (result.logits[:, :-1].argmax(-1) == targets).sum() / (targets != -100).sum()
    if "both" not in form:
        assert found.accuracy == pytest.approx(float(hits), rel=1e-6)
    assert found.examples == ROWS


def hessian() -> Tensor:
    model = Model()
    parameters = dict(model.named_parameters())
    sizes = [parameter.numel() for parameter in parameters.values()]

    def loss(flat: Tensor) -> Tensor:
        pieces = torch.split(flat, sizes)
        shaped = {
            name: piece.view_as(parameter)
            for piece, (name, parameter) in zip(pieces, parameters.items(), strict=True)
        }
        value: Tensor = torch.func.functional_call(model, shaped, (), whole()).loss
        return value

    return torch.autograd.functional.hessian(loss, weights(model))


@pytest.mark.parametrize("size", [None, 5])
@pytest.mark.parametrize("form", [form for form in FORMS if "three" not in form])
def test_every_form_has_the_hessian_of_the_whole_batch(form: str, size: int | None) -> None:
    collate, loss = FORMS[form]
    operator = HessianOperator(Model(), loss, collate(items()), microbatch_size=size)
    vector = torch.randn(operator.size, generator=torch.Generator().manual_seed(4)).double()
    torch.testing.assert_close(operator @ vector, hessian() @ vector, rtol=1e-10, atol=1e-12)
    assert operator.loss_weight == float((whole()["labels"][:, 1:] != -100).sum())


@pytest.mark.parametrize("size", [None, 5])
def test_gauss_newton_and_fisher_of_a_model_with_its_own_loss(size: int | None) -> None:
    """The oracle passes the same targets and outputs as a pair."""

    class Inner(nn.Module):
        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.model = model

        def forward(self, part: Any) -> Any:
            return self.model(part["ids"], part["mask"]).logits

    def shifted(outputs: Tensor, targets: Tensor) -> Tensor:
        return cross_entropy(outputs[:, :-1].flatten(0, 1), targets[:, 1:].flatten())

    model, batch = Model(), whole()
    pair = {"ids": batch["ids"], "mask": batch["mask"]}, batch["labels"]
    for kind in (GGNOperator, FisherOperator):
        oracle = kind(Inner(model), shifted, pair)
        vector = torch.randn(oracle.size, generator=torch.Generator().manual_seed(4)).double()
        expected = oracle @ vector
        for loss in (hf.ModelLoss(), own, hf.ModelLoss(own, outputs=lambda made: made.logits)):
            found = kind(model, loss, batch, microbatch_size=size) @ vector
            torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-13)
    operator = FisherOperator(Model(normalised=True), own, batch, norm_mode="batch")
    with pytest.raises(hf.HessianFlowError, match=r"Fisher.*norm_mode"):
        operator.dense()


def test_the_figures_of_a_hand_written_loop() -> None:
    model, batch = Model(), whole(64)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loss = hf.ModelLoss()
    figures = hf.monitor(model, loss, batch, optimizer)
    assert figures["sharpness"] > 0
    assert CurvatureProbe(model, loss, batch)().converged
    assert noise_scale(model, loss, batch, parts=8).num_parts >= 4
    for form in ("forward", "product"):
        found = critical_rate(model, loss, batch, optimizer, form=form)  # type: ignore[arg-type]
        assert found.critical > 0


def test_the_check_of_the_parts_of_a_loss_leaves_no_trace() -> None:
    """The check runs the model again, but changes neither random numbers nor statistics."""
    checked, free = Model(0.5, normalised=True), Model(0.5, normalised=True)
    count = lambda batch: (batch["labels"][:, 1:] != -100).sum()  # noqa: E731
    for model, loss in ((checked, hf.ModelLoss()), (free, hf.ModelLoss(weight=count))):
        torch.manual_seed(5)
        data = hf.data.AdaptiveBatches(items(64), 16)
        trained(model, data, loss_fn=loss, epochs=2, passes=Passes(microbatch_size=8))
    torch.testing.assert_close(weights(checked), weights(free), rtol=1e-12, atol=1e-14)
    for one, other in zip(checked.buffers(), free.buffers(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14)


def test_a_loss_whose_parts_do_not_add_up_is_refused() -> None:
    """A mean over sentences of means over words divides by neither number."""

    def by_sentence(model: Any, batch: Any) -> Tensor:
        logits = model(batch["ids"], batch["mask"]).logits[:, :-1].transpose(1, 2)
        losses = cross_entropy(logits, batch["labels"][:, 1:], reduction="none")
        return losses.sum() / (losses > 0).sum() * (1 + 0.1 * len(losses))

    rows = items()[5:]
    before = Model()
    model = copy.deepcopy(before)
    data = hf.data.AdaptiveBatches(rows, len(rows), shuffle=False)
    with pytest.raises(hf.HessianFlowError, match="weighted by") as caught:
        trained(model, data, loss_fn=by_sentence, passes=Passes(microbatch_size=7))
    assert "\n" not in str(caught.value)
    assert torch.equal(weights(model), weights(before))


def test_a_resumed_run_continues_where_it_stopped(tmp_path: Path) -> None:
    def trainer(epochs: int, **options: Any) -> tuple[nn.Module, Any]:
        model = Model()
        data = hf.data.AdaptiveBatches(items(), 8, seed=1, collate_fn=named)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
        made = hf.AdaptiveBatchTrainer(
            model,
            data,
            optimizer=optimizer,
            loss_fn=hf.ModelLoss(),
            epochs=epochs,
            passes=Passes(microbatch_size=3),
            reporting=Reporting(show_progress=False),
            **options,
        )
        return model, made

    whole_run, at_once = trainer(2)
    at_once.fit()
    _, first = trainer(1, run_dir=tmp_path)
    first.fit()
    model, second = trainer(2)
    second.resume(tmp_path)
    assert torch.equal(weights(model), weights(whole_run))


def test_metrics_are_recorded_beside_the_epoch() -> None:
    class Count:
        """Counts rows, as an object of torchmetrics would."""

        def __init__(self) -> None:
            self.rows = 100

        def reset(self) -> None:
            self.rows = 0

        def update(self, outputs: Tensor, targets: Tensor) -> None:
            assert outputs.shape[:2] == targets.shape
            self.rows += len(targets)

        def compute(self) -> Tensor:
            return torch.tensor(float(self.rows))

    model = Model()
    metrics = {"rows": Count(), "mean": lambda outputs, _: outputs.mean()}
    watch = Metrics(model, DataLoader(items(), batch_size=7), hf.ModelLoss(), metrics)
    data = hf.data.AdaptiveBatches(items(), 8)
    history = trained(model, data, after_epoch=AfterEpoch(measurements=[watch]))
    (record,) = [row for row in history.records if row["kind"] == "metrics"]
    assert record["rows"] == ROWS
    assert record["mean"] == pytest.approx(float(model(**whole()).logits.mean().detach()))


@pytest.mark.parametrize("loss", [hf.ModelLoss(), hf.ModelLoss(weight="next tokens")])
def test_a_batch_in_which_nothing_counts_moves_nothing(loss: Any) -> None:
    """Curvature has nothing to divide by, and the error says so."""
    model = Model()
    before = weights(model)
    padding = [{**row, "labels": torch.full((LENGTH,), -100)} for row in items()]
    data = hf.data.AdaptiveBatches(padding, ROWS)
    trained(model, data, loss_fn=loss, passes=Passes(microbatch_size=5))
    assert torch.equal(weights(model), before)
    with pytest.raises(hf.HessianFlowError, match="no target counts"):
        HessianOperator(model, loss, stacked(padding)).mean_loss()


@pytest.mark.parametrize(
    ("loss", "collate", "options", "message"),
    [
        (cross_entropy, stacked, {}, r"must be a pair \(inputs, targets\), got a dict of 3.*Mod"),
        (hf.ModelLoss(), lambda rows: tuple(stacked(rows).values()), {}, "with names.*a tuple"),
        (own, lambda rows: tuple(stacked(rows).values()), {}, "must be a pair .* tuple of 3"),
        (lambda _m, _b: 1.0, stacked, {}, "the loss must be a tensor.*got a float"),
        (lambda m, b: m(b["ids"]), stacked, {}, "an Output was returned without a loss: put"),
        (lambda _m, _b: {"logits": 0}, stacked, {}, "a dict was returned without a loss: put"),
        (
            hf.ModelLoss(weight=lambda batch: batch["mask"].sum(1)),
            stacked,
            {},
            r"weight must return a number or a scalar tensor, got a tensor of shape \[8\]",
        ),
        (hf.ModelLoss(), stacked, {"transform": lambda i, t, _p: (i, t)}, "the transform takes"),
        (
            hf.ModelLoss(),
            stacked,
            {"adversary": ConcurrentAdversary(FGSM(0.1, value_range=None), share=0.5)},
            r"attacks the inputs of pairs \(inputs, targets\), got a dict",
        ),
    ],
)
def test_batches_and_losses_that_do_not_fit_are_refused_in_one_line(
    loss: Any, collate: Any, options: dict[str, Any], message: str
) -> None:
    data = hf.data.AdaptiveBatches(items(), 8, collate_fn=collate)
    with pytest.raises(hf.HessianFlowError, match=message) as caught:
        trained(Model(), data, loss_fn=loss, **options)
    assert "\n" not in str(caught.value)


def test_outputs_of_a_pair_are_replaced_by_their_logits() -> None:
    model, batch = Model(), whole()
    pair = batch["ids"], batch["ids"]
    loss = lambda outputs, targets: cross_entropy(outputs.flatten(0, 1), targets.flatten())  # noqa: E731
    outputs = model(batch["ids"]).logits
    found = evaluate(model, pair, loss)
    assert found.loss == pytest.approx(float(loss(outputs, batch["ids"]).detach()))
    assert found.accuracy == pytest.approx(
        float((outputs.argmax(-1) == batch["ids"]).double().mean())
    )
    with pytest.raises(hf.HessianFlowError, match=r"receives outputs\.logits of the Output"):
        evaluate(model, pair, lambda made, targets: loss(made.logits, targets))
    chosen = hf.ModelLoss(lambda made, two: loss(made(two[0]).logits, two[1]))
    assert evaluate(model, pair, chosen).loss == pytest.approx(found.loss)


@pytest.mark.slow
def test_a_compiled_model_runs_its_own_loss() -> None:
    model = Model()
    compiled = torch.compile(copy.deepcopy(model), backend="eager")
    loss = hf.ModelLoss(weight="next tokens")
    for one in (model, compiled):
        data = hf.data.AdaptiveBatches(items(), 12, seed=1)
        trained(one, data, loss_fn=loss, passes=Passes(microbatch_size=5))  # type: ignore[arg-type]
    hidden = torch.compile(Model(), backend="aot_eager")
    with pytest.raises(hf.HessianFlowError, match="compiled model hides what its loss divides by"):
        trained(hidden, hf.data.AdaptiveBatches(items(), 12))  # type: ignore[arg-type]
    torch.testing.assert_close(
        weights(compiled),  # type: ignore[arg-type]
        weights(model),
        rtol=1e-12,
        atol=1e-14,
    )
