"""Data sets by name, and resumable batches of them, whose size may change at any time."""

from hessianflow.data.augment import Augmentation
from hessianflow.data.datasets import ImageSet, load, names
from hessianflow.data.device_batches import DeviceBatches
from hessianflow.data.download import FileReport, fetch, verify
from hessianflow.data.images import ImageFolder, Normalise
from hessianflow.data.sampling import AdaptiveBatches
from hessianflow.data.stream_batches import StreamBatches
from hessianflow.data.text import TextBatches, TextSet

__all__ = [
    "AdaptiveBatches",
    "Augmentation",
    "DeviceBatches",
    "FileReport",
    "ImageFolder",
    "ImageSet",
    "Normalise",
    "StreamBatches",
    "TextBatches",
    "TextSet",
    "fetch",
    "load",
    "names",
    "verify",
]
