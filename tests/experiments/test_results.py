"""The rows that studies keep of a run."""

from collections import defaultdict
from typing import Any

from experiments.results import row_of
from hessianflow import History


def test_the_eigenvalue_of_a_row_is_that_of_the_hessian() -> None:
    """Readers of results multiply it with the rate of SGD, or feed it to the rule of ABSA."""
    records: list[dict[str, Any]] = []
    epoch = {"batch_size": 8, "lr": 0.1, "updates": 1, "train_loss": 1.0, "eval_accuracy": 0.5}
    for number, matrix in enumerate([None, "Hessian", "preconditioned Hessian"], 1):
        place = {"epoch": number, "examples": 8 * number}
        reading: dict[str, Any] = {"kind": "curvature", **place, "eigenvalue": 2.0}
        if matrix is not None:
            reading["matrix"] = matrix
        records += [reading, {"kind": "epoch", **place, **epoch}]
    summary: dict[str, Any] = defaultdict(int)
    row = row_of("p", "m", {"seed": 0}, History(records, {"environment": {}}, summary))
    assert [each["eigenvalue"] for each in row["epochs"]] == [2.0, 2.0, None]
