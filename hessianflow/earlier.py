"""Runs of earlier releases: what they were trained with and did not record, so that they go on as
they began."""

from collections.abc import Mapping
from typing import Any

from hessianflow.config import SCALED
from hessianflow.data.datasets import FOLDER_SETS
from hessianflow.presets import ADAPTIVE
from hessianflow.settings import FILE_SIDE


def before_image_size(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings of a run from before image files had a size of their own, and adaptive
    optimizers the square-root rule.

    Args:
        settings: as recorded; nothing changes for those of later runs.
    """
    if "image_size" in settings:
        return {}
    found: dict[str, Any] = {}
    if settings.get("data") in FOLDER_SETS:
        found["image_size"] = (settings.get("resolutions") or [FILE_SIDE])[-1]
    has_own_rate = settings.get("lr_rule") is not None or settings.get("edge_share")
    if (
        settings.get("optimizer") in ADAPTIVE
        and settings.get("controller") in SCALED
        and not has_own_rate
    ):
        found["lr_rule"] = "linear"
    # it measured on what was there
    if settings.get("probe_examples") and settings.get("train_examples"):
        found["probe_examples"] = min(settings["probe_examples"], settings["train_examples"])
    return found
