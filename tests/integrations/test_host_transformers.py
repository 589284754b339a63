"""The Trainer of transformers with a growing batch, compared with the Trainer alone."""

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peers import library
from torch import nn
from torch.utils.data import Dataset

import hessianflow as hf
from hessianflow.interfaces import HessianFlowError

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

library("transformers")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import transformers
    from transformers import BertConfig, GPT2Config, LlamaConfig

    from hessianflow.integrations.transformers import AdaptiveTrainer, CurvatureCallback
    from hessianflow.integrations.transformers_callbacks import ControlCallback


class Sentences(Dataset[dict[str, Any]]):
    """Tokens of different lengths, with the label of the sentence or those of the tokens."""

    def __init__(self, count: int = 96, *, tokens: bool = False) -> None:
        self.count = count
        self.tokens = tokens

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Any]:
        source = torch.Generator().manual_seed(index)
        ids = torch.randint(1, 40, (4 + index % 7,), generator=source)
        labels = ids.clone() if self.tokens else ids.sum() % 2
        return {"input_ids": ids, "labels": labels}


def padded(items: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    ids = nn.utils.rnn.pad_sequence([item["input_ids"] for item in items], batch_first=True)
    batch = {"input_ids": ids, "attention_mask": (ids > 0).long()}
    labels = [item["labels"] for item in items]
    if labels[0].ndim:
        batch["labels"] = nn.utils.rnn.pad_sequence(labels, batch_first=True, padding_value=-100)
    else:
        batch["labels"] = torch.stack(labels)
    return batch


SMALL = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}


def bert() -> nn.Module:
    config = BertConfig(vocab_size=50, intermediate_size=16, **SMALL)
    return transformers.BertForSequenceClassification(config)


def tagger() -> nn.Module:
    config = BertConfig(vocab_size=50, intermediate_size=16, num_labels=50, **SMALL)
    return transformers.BertForTokenClassification(config)


def gpt2() -> nn.Module:
    sizes = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 16}
    return transformers.GPT2LMHeadModel(GPT2Config(vocab_size=50, **sizes))


def llama() -> nn.Module:
    config = LlamaConfig(vocab_size=50, intermediate_size=16, num_key_value_heads=2, **SMALL)
    return transformers.LlamaForCausalLM(config)


def arguments(folder: Path, **options: Any) -> Any:
    chosen = {
        "per_device_train_batch_size": 8,
        "num_train_epochs": 4,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "remove_unused_columns": False,
        **options,
    }
    return transformers.TrainingArguments(str(folder), **chosen)


def trainer(folder: Path, model: Any = bert, *, tokens: bool = False, **options: Any) -> Any:
    """Return an adaptive trainer that doubles the batch twice."""
    torch.manual_seed(0)
    own = {
        name: options.pop(name) for name in ("controller", "every", "curvature") if name in options
    }
    chosen = {"controller": hf.control.AdaBatch(8, 32, every_epochs=1), "every": 60, **own}
    return AdaptiveTrainer(
        model(),
        arguments(folder, **options),
        train_dataset=Sentences(tokens=tokens),
        data_collator=padded,
        **chosen,
    )


ALWAYS = {"budget": None}


def absa() -> hf.control.ABSA:
    return hf.control.ABSA(8, 32, patience=1)


def logged(host: Any, name: str) -> list[float]:
    return [row[name] for row in host.state.log_history if name in row]


def weights(model: nn.Module) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in model.parameters()]


def test_the_batch_grows_in_the_middle_of_a_pass_and_the_run_ends_where_it_should(
    tmp_path: Path,
) -> None:
    host = trainer(tmp_path)
    sizes: list[int] = []
    step = host.training_step

    def counted(model: nn.Module, inputs: Any, *others: Any) -> torch.Tensor:
        sizes.append(len(inputs["labels"]))
        return step(model, inputs, *others)

    host.training_step = counted
    host.train()
    assert sizes[:8] == [8] * 8
    assert sizes[8:10] == [16, 16]  # 64 examples are past 60; the first pass has 96
    assert sizes[-1] == 32
    assert sum(sizes) == 4 * 96
    assert host.state.global_step == host.state.max_steps == len(sizes)
    assert host.state.epoch == 4
    assert logged(host, "epoch")[:2] == pytest.approx([8 / 96, 16 / 96])
    assert logged(host, "batch/size")[:2] == [16, 32]
    assert len(logged(host, "loss")) == len(sizes)  # none is lost to the figures of curvature
    assert logged(host, "curvature/edge_share")
    assert all(0.5 < loss < 1 for loss in logged(host, "loss"))  # a mean, whatever the batch


def test_the_schedule_follows_the_examples_and_ends_at_zero(tmp_path: Path) -> None:
    host = trainer(tmp_path, controller=hf.control.Seesaw(8, 32))
    host.train()
    assert host.lr_scheduler.get_last_lr()[0] == 0
    assert host.optimizer.param_groups[0]["lr"] == 0
    host = trainer(tmp_path, lr_scheduler_type="constant")
    host.train()
    rates = logged(host, "learning_rate")
    assert rates[0] == pytest.approx(1e-3)
    assert rates[8] == pytest.approx(0.75e-3)  # with the controller's factor


def test_max_steps_is_the_number_of_updates(tmp_path: Path) -> None:
    host = trainer(tmp_path, max_steps=40)
    host.train()
    assert host.state.global_step == 40
    assert host.lr_scheduler.get_last_lr()[0] == 0
    assert host.state.epoch > 5


@pytest.mark.parametrize("save_at", [10, 15, 10_000], ids=["10", "15", "end of a pass"])
def test_a_resumed_run_is_equal_bit_for_bit(save_at: int, tmp_path: Path) -> None:
    options: dict[str, Any] = {"save_strategy": "steps", "save_steps": save_at}
    if save_at == 10_000:
        options = {"save_strategy": "epoch"}
    whole = trainer(tmp_path, controller=absa(), curvature=ALWAYS, **options)
    whole.train()
    folder = sorted(tmp_path.glob("checkpoint-*"), key=lambda p: int(p.name.split("-")[1]))[0]
    resumed = trainer(tmp_path, controller=absa(), curvature=ALWAYS, **options)
    resumed.train(resume_from_checkpoint=str(folder))
    for one, other in zip(weights(whole.model), weights(resumed.model), strict=True):
        assert torch.equal(one, other)
    assert whole.state.global_step == resumed.state.global_step
    assert logged(whole, "batch/size") == logged(resumed, "batch/size")
    assert logged(whole, "batch/size")[-1] == 32
    eigenvalues = logged(whole, "curvature/eigenvalue")
    assert len(eigenvalues) > 3
    assert eigenvalues == logged(resumed, "curvature/eigenvalue")


@pytest.mark.parametrize(
    ("model", "tokens"), [(bert, False), (tagger, True), (gpt2, True), (llama, True)]
)
def test_the_gradient_is_that_of_the_host_on_the_whole_batch(
    model: Any, tokens: bool, tmp_path: Path
) -> None:
    """This holds for every size of the microbatches, with padding and with labels of -100."""
    gradients = []
    losses = []
    batch = padded([Sentences(tokens=tokens)[index] for index in range(24)])
    torch.manual_seed(0)
    first = model()
    for size in (24, 7):
        torch.manual_seed(0)
        host = trainer(tmp_path, model, tokens=tokens, per_device_train_batch_size=size)
        host.model.load_state_dict(first.state_dict())
        for module in host.model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        host.create_optimizer()
        items = host._get_num_items_in_batch([batch], host.args.device)
        losses.append(host.training_step(host.model, copy.copy(batch), items))
        gradients.append([p.grad.clone() for p in host.model.parameters() if p.grad is not None])
    plain = transformers.Trainer(
        copy.deepcopy(first), arguments(tmp_path, per_device_train_batch_size=24)
    )
    for module in plain.model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    plain.create_optimizer()
    plain.current_gradient_accumulation_steps = 1
    items = plain._get_num_items_in_batch([batch], plain.args.device)
    losses.append(plain.training_step(plain.model, copy.copy(batch), items))
    gradients.append([p.grad for p in plain.model.parameters() if p.grad is not None])
    for other in gradients[1:]:
        for one, two in zip(gradients[0], other, strict=True):
            torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-6)
    assert float(losses[0]) == pytest.approx(float(losses[1]), abs=1e-6)
    assert float(losses[0]) == pytest.approx(float(losses[2]), abs=1e-6)


def test_measuring_alone_changes_nothing_and_keeps_its_state(tmp_path: Path) -> None:
    def run(measured: bool, resume: str | None = None) -> Any:
        torch.manual_seed(0)
        host = transformers.Trainer(
            bert(),
            arguments(tmp_path, save_strategy="steps", save_steps=24),
            train_dataset=Sentences(),
            data_collator=padded,
        )
        if measured:
            host.add_callback(CurvatureCallback(host, every=48, budget=None))
        host.train(resume_from_checkpoint=resume)
        return host

    plain = run(measured=False)
    host = run(measured=True)
    for one, other in zip(weights(plain.model), weights(host.model), strict=True):
        assert torch.equal(one, other)
    assert len(logged(host, "curvature/eigenvalue")) == 8
    assert len(logged(host, "loss")) == 48
    resumed = run(measured=True, resume=str(tmp_path / "checkpoint-24"))
    assert logged(resumed, "curvature/eigenvalue") == logged(host, "curvature/eigenvalue")


def test_a_second_part_that_sets_the_batch_size_is_refused(tmp_path: Path) -> None:
    with pytest.raises(HessianFlowError, match="gradient_accumulation_steps=2 and the controller"):
        trainer(tmp_path, gradient_accumulation_steps=2)
    host = trainer(tmp_path)
    host.add_callback(ControlCallback(host, hf.control.FixedBatch(8)))
    with pytest.raises(HessianFlowError, match="both set the batch size of this Trainer: leave"):
        host.train()


def test_what_the_trainer_would_ignore_is_refused(tmp_path: Path) -> None:
    with pytest.raises(HessianFlowError, match="would not use train_sampling_strategy='seq"):
        trainer(tmp_path, train_sampling_strategy="sequential")
    host = trainer(tmp_path, label_smoothing_factor=0.1)
    with pytest.raises(HessianFlowError, match="the Trainer trains with label_smoothing_factor"):
        host.train()
    host = trainer(tmp_path)
    host.compute_loss_func = lambda outputs, labels, num_items_in_batch=None: outputs.loss
    with pytest.raises(HessianFlowError, match="the Trainer trains with compute_loss_func"):
        host.train()


def test_a_checkpoint_of_another_trainer_is_refused(tmp_path: Path) -> None:
    plain = transformers.Trainer(
        bert(),
        arguments(tmp_path, save_strategy="steps", save_steps=5, max_steps=5),
        train_dataset=Sentences(),
        data_collator=padded,
    )
    plain.train()
    with pytest.raises(HessianFlowError, match=r"holds no hessianflow\.pt"):
        trainer(tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))


def test_workers_are_not_restarted(tmp_path: Path) -> None:
    host = trainer(tmp_path, dataloader_num_workers=1, num_train_epochs=1)
    host.train()
    alone = trainer(tmp_path, num_train_epochs=1)
    alone.train()
    for one, other in zip(weights(host.model), weights(alone.model), strict=True):
        assert torch.equal(one, other)
    assert host.passes.batch_size == 16
