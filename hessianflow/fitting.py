"""Fits open settings to the user's own image files, whose number and size no preset can know."""

from dataclasses import replace
from typing import Any

from hessianflow.config import TrainConfig
from hessianflow.data.datasets import FILE_SIDE, data_set
from hessianflow.data.image_files import training_images, usual_side


def fitted(config: TrainConfig) -> TrainConfig:
    """Return the given settings with the open ones fitted to the files below `data_dir`.

    Neither the cap on the batch size nor the probe exceeds the training set. Images of the data set
    "folder" are cut to the size that they have, or to 224 pixels where they are larger. Nothing
    changes for other data sets, or where the folder does not exist.
    """
    if data_set(config.data).read is not None:
        return config
    preset = data_set(config.data).preset.settings
    sized = ("max_batch_size", "probe_examples")
    changes: dict[str, Any] = {}
    wanted = [name for name in (*sized, "image_size") if getattr(config, name) is None]
    files = (
        training_images(config.data_dir, preset["max_batch_size"])
        if wanted and config.data_dir
        else []
    )
    for name in sized:
        if name in wanted and 0 < len(files) < preset[name]:
            changes[name] = min(len(files), config.train_examples or len(files))
    if "max_batch_size" in changes:
        changes["max_batch_size"] = max(
            changes["max_batch_size"], config.batch_size or preset["batch_size"]
        )
    if "image_size" in wanted:
        from_files = config.data == "folder" and config.resolutions is None and files
        side = usual_side(files, FILE_SIDE) if from_files else FILE_SIDE
        changes["image_size"] = config.resolutions[-1] if config.resolutions else side
    return replace(config, **changes)
