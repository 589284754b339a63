"""Image sets, and resumable batches of them whose size may change at any time."""

from hessianflow.data.augment import Augmentation
from hessianflow.data.datasets import ImageSet, load, names
from hessianflow.data.device_batches import DeviceBatches
from hessianflow.data.sampling import AdaptiveBatches

__all__ = ["AdaptiveBatches", "Augmentation", "DeviceBatches", "ImageSet", "load", "names"]
