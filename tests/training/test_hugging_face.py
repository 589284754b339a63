"""Models of transformers, peft and timm with random weights: the trainer and the operators take
their batches and their own losses as they are.

The oracles are plain autograd on the whole batch, and the Trainer of transformers.
"""

import copy
import importlib.machinery
import importlib.util
import sys
import types
import warnings
from pathlib import Path
from typing import Any, ClassVar
from unittest.mock import MagicMock

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, default_collate

import hessianflow as hf
from hessianflow.curvature import FisherOperator, GGNOperator, HessianOperator, noise_scale
from hessianflow.training import AfterEpoch, Metrics, Passes, Reporting, evaluate

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # deprecations inside the library
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

WORDS, LENGTH, ROWS = 50, 10, 16
QUIET = Reporting(show_progress=False)
SIZES = {"vocab_size": WORDS, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}


def bert() -> nn.Module:
    config = transformers.BertConfig(
        **SIZES, intermediate_size=24, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
    )
    config.num_labels = 3
    return transformers.BertForSequenceClassification(config).double()


def gpt2() -> nn.Module:
    sizes = {"vocab_size": WORDS, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": LENGTH}
    drops = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    config = transformers.GPT2Config(**sizes, **drops, bos_token_id=0, eos_token_id=0)
    model = transformers.GPT2LMHeadModel(config).double()
    # Its Trainer then counts the shifted labels, as the model does.
    model.loss_type = "ForCausalLM"
    return model


def llama() -> nn.Module:
    config = transformers.LlamaConfig(**SIZES, intermediate_size=24, pad_token_id=0)
    return transformers.LlamaForCausalLM(config).double()


def vit() -> nn.Module:
    config = transformers.ViTConfig(
        **{name: size for name, size in SIZES.items() if name != "vocab_size"},
        intermediate_size=24,
        image_size=8,
        patch_size=4,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    config.num_labels = 3
    return transformers.ViTForImageClassification(config).double()


def lora() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft = pytest.importorskip("peft", reason="peft is not installed")
        config = peft.LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True)
        model = peft.get_peft_model(gpt2(), config).double()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # zero at the start, so that half of the gradients would be, too
            nn.init.normal_(parameter, std=0.1)
    return model


MODELS: dict[str, Any] = {"bert": bert, "gpt2": gpt2, "llama": llama, "vit": vit, "lora": lora}


def items(name: str, rows: int = ROWS) -> list[dict[str, Any]]:
    """Return examples of different lengths, padded to one length; labels of padding are ignored."""
    source = torch.Generator().manual_seed(1)
    made: list[dict[str, Any]] = []
    for row in range(rows):
        if name == "vit":
            pixels = torch.randn(3, 8, 8, generator=source, dtype=torch.float64)
            made.append({"pixel_values": pixels, "labels": torch.tensor(row % 3)})
            continue
        mask = (torch.arange(LENGTH) < 3 + row % 7).long()
        words = torch.randint(1, WORDS, (LENGTH,), generator=source) * mask
        labels = torch.where(mask > 0, words, -100)
        if name == "bert":
            labels = torch.tensor(row % 3)
        made.append({"input_ids": words, "attention_mask": mask, "labels": labels})
    return made


def built(name: str) -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = MODELS[name]()
    return model


def trained(model: nn.Module, data: Any, **options: Any) -> Any:
    wanted: dict[str, Any] = {"loss_fn": hf.ModelLoss(), "epochs": 1, "reporting": QUIET, **options}
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    return hf.AdaptiveBatchTrainer(model, data, optimizer=optimizer, **wanted).fit()


def step_of(model: nn.Module, loss: Tensor) -> list[Tensor]:
    """Return the weights after one step of SGD at rate 1."""
    weights = [p for p in model.parameters() if p.requires_grad]
    slopes = torch.autograd.grad(loss, weights, allow_unused=True, materialize_grads=True)
    return [(w - s).detach() for w, s in zip(weights, slopes, strict=True)]


def weights_of(model: nn.Module) -> list[Tensor]:
    return [p.detach() for p in model.parameters() if p.requires_grad]


def assert_near(found: list[Tensor], expected: list[Tensor]) -> None:
    """Compare to 1e-6, because the losses of transformers are computed in float32."""
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", MODELS)
def test_an_accumulated_step_equals_that_of_the_whole_batch(name: str) -> None:
    model = built(name)
    whole = default_collate(items(name))
    expected = step_of(model, model(**whole).loss)
    data = hf.data.AdaptiveBatches(items(name), ROWS, shuffle=False)
    history = trained(model, data, passes=Passes(microbatch_size=5), eval_data=whole)
    assert_near(weights_of(model), expected)
    (epoch,) = history.epochs
    with torch.no_grad():
        assert epoch["eval_loss"] == pytest.approx(float(model(**whole).loss), rel=1e-6)


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama"])
def test_a_step_equals_that_of_the_trainer_of_transformers(name: str, tmp_path: Path) -> None:
    pytest.importorskip("accelerate", reason="the Trainer of transformers needs accelerate")
    model = built(name)
    if name == "bert":
        # It takes num_items_in_batch and ignores it; its Trainer would add up the means.
        model.accepts_loss_kwargs = False
    host = copy.deepcopy(model)
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path),
        per_device_train_batch_size=4,
        gradient_accumulation_steps=ROWS // 4,
        max_steps=1,
        max_grad_norm=0.0,
        learning_rate=1.0,
        lr_scheduler_type="constant",
        optim="sgd",
        weight_decay=0.0,
        use_cpu=True,
        report_to=[],
        logging_strategy="no",
        save_strategy="no",
        disable_tqdm=True,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        transformers.Trainer(host, arguments, train_dataset=items(name)).train()
    data = hf.data.AdaptiveBatches(items(name), ROWS)
    trained(model, data, passes=Passes(microbatch_size=4))
    assert_near(weights_of(model), weights_of(host))


@pytest.mark.parametrize("size", [None, 5])
@pytest.mark.parametrize("name", MODELS)
def test_the_operators_equal_those_of_the_whole_batch(name: str, size: int | None) -> None:
    model = built(name).eval()
    model.set_attn_implementation("eager")
    batch = default_collate(items(name))
    loss = hf.ModelLoss()
    operator = HessianOperator(model, loss, batch, microbatch_size=size, check_product=False)
    vector = torch.randn(operator.size, generator=torch.Generator().manual_seed(2)).double()
    weights = [p for p in model.parameters() if p.requires_grad]
    result = model(**batch)
    slopes = torch.autograd.grad(result.loss, weights, create_graph=True, materialize_grads=True)
    flat = torch.cat([slope.reshape(-1) for slope in slopes])
    second = torch.autograd.grad(flat @ vector, weights, materialize_grads=True)
    expected = torch.cat([one.reshape(-1) for one in second])
    scale = float(expected.abs().max())
    torch.testing.assert_close(operator @ vector, expected, rtol=0, atol=1e-5 * scale)
    # J^T (d^2 loss / d logits^2) J v, with J v from the derivative of J^T u by u.
    result = model(**batch)
    u = torch.zeros_like(result.logits, requires_grad=True)
    pulled = torch.autograd.grad(
        result.logits, weights, u, create_graph=True, materialize_grads=True
    )
    pulled_flat = torch.cat([one.reshape(-1) for one in pulled])
    (moved,) = torch.autograd.grad(pulled_flat @ vector, u, retain_graph=True)
    (by_logits,) = torch.autograd.grad(result.loss, result.logits, create_graph=True)
    (bent,) = torch.autograd.grad(by_logits, result.logits, moved, retain_graph=True)
    back = torch.autograd.grad(result.logits, weights, bent, materialize_grads=True)
    expected = torch.cat([one.reshape(-1) for one in back])
    found = GGNOperator(model, loss, batch, microbatch_size=size, check_product=False) @ vector
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


def test_the_fisher_of_a_language_model_has_a_row_for_each_sequence() -> None:
    model = built("gpt2").eval()
    batch = default_collate(items("gpt2", 6))
    fisher = FisherOperator(model, hf.ModelLoss(), batch, microbatch_size=4, check_product=False)
    vector = torch.randn(fisher.size, generator=torch.Generator().manual_seed(2)).double()
    expected = torch.zeros_like(vector)
    whole = 0.0
    for row in range(6):
        one = {name: entry[row : row + 1] for name, entry in batch.items()}
        slopes = torch.autograd.grad(model(**one).loss, list(model.parameters()))
        flat = torch.cat([slope.reshape(-1) for slope in slopes])
        tokens = float((one["labels"][:, 1:] != -100).sum())
        expected += tokens * flat * (flat @ vector)
        whole += tokens
    expected /= whole
    torch.testing.assert_close(
        fisher @ vector, expected, rtol=0, atol=1e-5 * float(expected.abs().max())
    )


def test_figures_count_tokens() -> None:
    model = built("gpt2").eval()
    batch = default_collate(items("gpt2"))
    result = model(**batch)
    targets = batch["labels"][:, 1:]
    counts = targets != -100
    hits = (result.logits[:, :-1].argmax(-1) == targets) & counts
    found = evaluate(model, DataLoader(items("gpt2"), batch_size=5), hf.ModelLoss())
    assert found.accuracy == pytest.approx(float(hits.sum() / counts.sum()))
    assert found.loss == pytest.approx(float(result.loss.detach()), rel=1e-6)
    assert found.examples == ROWS
    operator = HessianOperator(model, hf.ModelLoss(), DataLoader(items("gpt2"), batch_size=5))
    assert operator.loss_weight == float(counts.sum())
    assert noise_scale(model, hf.ModelLoss(), batch, parts=4).num_examples == ROWS


def test_a_microbatch_of_padding_adds_nothing() -> None:
    model = built("gpt2")
    rows = items("gpt2")
    for row in rows[:4]:
        row["labels"] = torch.full((LENGTH,), -100)
    expected = step_of(model, model(**default_collate(rows)).loss)
    data = hf.data.AdaptiveBatches(rows, ROWS, shuffle=False)
    (epoch,) = trained(model, data, passes=Passes(microbatch_size=4)).epochs
    assert_near(weights_of(model), expected)
    assert epoch["train_loss"] > 0


def test_the_output_of_a_tokenizer_with_text_beside_it() -> None:
    def collate(rows: list[Any]) -> Any:
        encoding = transformers.BatchEncoding(default_collate(rows))
        encoding["text"] = [f"row {number}" for number in range(len(rows))]
        return encoding

    model = built("gpt2")
    expected = step_of(model, model(**default_collate(items("gpt2"))).loss)
    data = hf.data.AdaptiveBatches(items("gpt2"), ROWS, shuffle=False, collate_fn=collate)
    trained(model, data, passes=Passes(microbatch_size=5))
    assert_near(weights_of(model), expected)
    operator = HessianOperator(model, hf.ModelLoss(), collate(items("gpt2")), microbatch_size=5)
    assert operator.num_examples == ROWS


def test_a_pair_and_a_loss_of_torch_with_the_output_of_a_model() -> None:
    """The loss receives the logits instead of the object that holds them."""
    model = built("vit")
    whole = default_collate(items("vit"))
    pair = whole["pixel_values"], whole["labels"]
    expected = step_of(model, model(**whole).loss)
    data = hf.data.AdaptiveBatches(torch.utils.data.TensorDataset(*pair), ROWS, shuffle=False)
    loss = nn.CrossEntropyLoss()
    (epoch,) = trained(model, data, loss_fn=loss, eval_data=pair).epochs
    assert_near(weights_of(model), expected)
    assert 0 <= epoch["eval_accuracy"] <= 1
    vector = torch.randn(GGNOperator(model, loss, pair).size).double()
    of_pair = GGNOperator(model, loss, pair) @ vector
    of_dict = GGNOperator(model, hf.ModelLoss(), whole) @ vector
    torch.testing.assert_close(of_pair, of_dict, rtol=1e-5, atol=1e-8)


def test_a_metric_of_torchmetrics_is_recorded_after_the_epoch() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        kinds = pytest.importorskip(
            "torchmetrics.classification", reason="torchmetrics is not installed"
        )
    model = built("bert")
    f1 = kinds.MulticlassF1Score(num_classes=3, average="macro")
    held_out = DataLoader(items("bert"), batch_size=5)
    watch = Metrics(model, held_out, hf.ModelLoss(), {"f1": f1})
    data = hf.data.AdaptiveBatches(items("bert"), 8)
    history = trained(model, data, after_epoch=AfterEpoch(measurements=[watch]))
    (record,) = [row for row in history.records if row["kind"] == "metrics"]
    whole = default_collate(items("bert"))
    f1.reset()
    expected = f1(model.eval()(**whole).logits, whole["labels"])
    assert record["f1"] == pytest.approx(float(expected))


def test_a_model_without_labels_says_so() -> None:
    model = built("gpt2")
    rows = [{"input_ids": row["input_ids"]} for row in items("gpt2")]
    with pytest.raises(hf.HessianFlowError, match="without a loss: put the targets"):
        trained(model, hf.data.AdaptiveBatches(rows, ROWS))


def test_a_tensordict_is_a_batch() -> None:
    tensordict = pytest.importorskip("tensordict", reason="tensordict is not installed")
    model = built("bert")
    whole = default_collate(items("bert"))
    expected = step_of(model, model(**whole).loss)

    def collate(rows: list[Any]) -> Any:
        return tensordict.TensorDict(default_collate(rows), batch_size=[len(rows)])

    data = hf.data.AdaptiveBatches(items("bert"), ROWS, shuffle=False, collate_fn=collate)
    trained(model, data, passes=Passes(microbatch_size=5))
    assert_near(weights_of(model), expected)


class _Stub(types.ModuleType):
    """A module with any attribute, for imports of transforms that no model uses."""

    __path__: ClassVar[list[str]] = []

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return MagicMock()


@pytest.fixture
def timm(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Import timm without torchvision, whose transforms it imports but its models do not need."""
    if importlib.util.find_spec("torchvision") is None:
        for name in ("", ".datasets.folder", ".ops.misc", ".transforms.functional"):
            parts = ("torchvision" + name).split(".")
            for end in range(1, len(parts) + 1):
                stub = _Stub(".".join(parts[:end]))
                stub.__spec__ = importlib.machinery.ModuleSpec(stub.__name__, None)
                monkeypatch.setitem(sys.modules, stub.__name__, stub)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("timm", reason="timm cannot be imported", exc_type=ImportError)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("resnet10t", {"channels": (8, 8, 8, 8), "stem_width": 8, "in_chans": 3}),
        (
            "vit_tiny_patch16_224",
            {"img_size": 8, "patch_size": 4, "embed_dim": 16, "depth": 1, "num_heads": 2},
        ),
    ],
)
def test_models_of_timm(timm: Any, name: str, options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=3, **options).double()
    whole = default_collate(items("vit"))
    pair = whole["pixel_values"], whole["labels"]
    loss = nn.CrossEntropyLoss()
    oracle = copy.deepcopy(model).train()
    step = step_of(oracle, loss(oracle(pair[0]), pair[1]))
    data = hf.data.AdaptiveBatches(torch.utils.data.TensorDataset(*pair), ROWS, shuffle=False)
    trained(model, data, loss_fn=loss, eval_data=pair)
    assert_near(weights_of(model), step)
    operator = HessianOperator(model, loss, pair, microbatch_size=5)
    assert operator.mean_loss() == pytest.approx(
        float(loss(model.eval()(pair[0]), pair[1]).detach()), rel=1e-10
    )
    assert torch.isfinite(operator @ torch.ones(operator.size).double()).all()
