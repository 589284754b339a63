"""The language study: its grid, worked out by hand, and its table from made-up rows."""

import math
from pathlib import Path
from typing import Any

import pytest

from experiments.language.grid import ADAMW_RATE, MUON_RATE, cells
from experiments.language.report import report
from hessianflow.config import from_dict
from hessianflow.resolve import resolve


def test_all_methods_see_the_same_bytes_and_rates_follow_the_root_of_the_batch() -> None:
    found = {cell.method: cell.settings for cell in cells("cpu", [0]) if cell.problem == "python"}
    lengths = {(s["train_examples"] * s["epochs"], s["block_length"]) for s in found.values()}
    assert lengths == {(18_432, 64)}
    for method, times, rate in (
        ("adamw-1x", 1, ADAMW_RATE),
        ("adamw-16x", 16, 4 * ADAMW_RATE),
        ("muon-8x", 8, math.sqrt(8) * MUON_RATE),
    ):
        assert found[method]["batch_size"] == 16 * times
        assert found[method]["lr"] == pytest.approx(rate)
    assert found["muon-seesaw"]["max_batch_size"] == 32 * 16


def test_growing_batches_move_the_rate_by_the_root_or_not_at_all() -> None:
    """Seesaw has its own rule, and the norm test leaves the rate unchanged, as published."""
    for cell in cells("cpu", [0]):
        config = resolve(from_dict(cell.settings, cell.name))
        if cell.method.endswith(("critical", "noise-scale")):
            assert config.lr_rule == "sqrt", cell.method
        if cell.method.endswith("seesaw"):
            assert config.controller.options["exchange"] == "sqrt"


def row(problem: str, method: str, seed: int, updates: int, loss: float) -> dict[str, Any]:
    epoch = {"batch_size": 16, "updates": updates, "eval_loss": loss}
    settings = {"block_length": 64, "train_examples": 100}
    figures = {"updates": updates, "largest_batch": 16, "seconds": 10.0}
    return {
        **{"problem": problem, "method": method, "seed": seed, "settings": settings},
        **figures,
        "epochs": [{**epoch, "updates": updates // 2, "eval_loss": loss + 1}, epoch],
    }


def test_the_table_holds_losses_bits_and_shares_of_the_updates(tmp_path: Path) -> None:
    rows = [row("tuning", "adamw-0.001", 2, 100, 3.0)]
    rows += [row("python", "adamw-1x", seed, 300, 1.5 + seed / 10) for seed in (0, 1)]
    rows += [row("python", "muon-8x", 0, 75, math.log(4))]
    report(rows, tmp_path / "results.png")
    lines = (tmp_path / "language.md").read_text().splitlines()
    assert lines[2:] == [
        "| tuning adamw-0.001 | 1 | 3.000 | 4.328 | 100 | 1.00 | 16 | 10 |",
        "| adamw-1x | 2 | 1.500 1.600 | 2.236 | 300 | 1.00 | 16 | 10 |",
        "| muon-8x | 1 | 1.386 | 2.000 | 75 | 0.25 | 16 | 10 |",
    ]
    assert (tmp_path / "results.png").read_bytes().startswith(b"\x89PNG")
