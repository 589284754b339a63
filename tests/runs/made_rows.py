"""Rows as runs write them, for the tests of this room."""

from typing import Any


def place(kind: str, number: int = 1) -> dict[str, Any]:
    return {"kind": kind, "epoch": number, "examples": 64 * number, "updates": 8 * number}


def epoch(number: int = 1, **more: Any) -> dict[str, Any]:
    return (
        place("epoch", number)
        | {"batch_size": 8, "lr": 0.1, "train_loss": 1.5, "eval_accuracy": 0.5}
        | more
    )


def curvature(number: int = 1, eigenvalue: float | None = 2.5, **more: Any) -> dict[str, Any]:
    return place("curvature", number) | {"eigenvalue": eigenvalue} | more


def batch(before: int, after: int, number: int = 1, **more: Any) -> dict[str, Any]:
    return (
        place("batch", number)
        | {"from": before, "to": after, "lr_factor": 1.0, "reason": "why"}
        | more
    )


def event(name: str = "preempted", number: int = 1, **more: Any) -> dict[str, Any]:
    return place("event", number) | {"event": name, "message": "because"} | more
