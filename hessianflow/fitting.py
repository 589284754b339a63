"""The fitting of open settings to the user's own image files, which no preset can know."""

from dataclasses import replace
from typing import Any

from hessianflow.config import TrainConfig
from hessianflow.data.datasets import FILE_SIDE, data_set
from hessianflow.data.image_files import training_images, usual_side


def fitted(config: TrainConfig) -> TrainConfig:
    """Return the settings with the open ones fitted to the image files below `data_dir`.

    Neither the cap on the batch size nor the probe exceeds the training set. Images of the data set
    "folder" are cut to the size that they have, but to 224 pixels at most. Settings of data sets
    that are not trees of files, or without a folder, stay as they are.
    """
    if data_set(config.data).read is not None:
        return config
    preset = data_set(config.data).preset.settings
    sized = ("max_batch_size", "probe_examples")
    changes: dict[str, Any] = {}
    open_ones = [name for name in (*sized, "image_size") if getattr(config, name) is None]
    files = []
    if open_ones and config.data_dir:
        files = training_images(config.data_dir, preset["max_batch_size"])
    for name in sized:
        if name in open_ones and 0 < len(files) < preset[name]:
            changes[name] = min(len(files), config.train_examples or len(files))
    if "max_batch_size" in changes:
        changes["max_batch_size"] = max(
            changes["max_batch_size"], config.batch_size or preset["batch_size"]
        )
    if "image_size" in open_ones:
        changes["image_size"] = FILE_SIDE
        if config.resolutions:
            changes["image_size"] = config.resolutions[-1]
        elif config.data == "folder" and config.resolutions is None and files:
            changes["image_size"] = usual_side(files, FILE_SIDE)
    return replace(config, **changes)
