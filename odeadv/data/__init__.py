"""Images for training and attacks: labelled ``uint8`` arrays in memory, and batches with standard augmentation.

`load` finds CIFAR-10, CIFAR-100, a folder of your own images, or scikit-learn's digits (without a download). It returns
an `ImageDataset`. `to_float` turns its arrays into float images in [0, 1], and `Batches` does so batch by batch, with
augmentation. `Stream` makes the same batches from a `torch.utils.data.Dataset` or ``DataLoader``. Batches draw random
numbers only from the generator that you pass. docs/training.md shows them in use.
"""

from odeadv.data._batches import Batches, as_model_input, random_crop_flip, to_float
from odeadv.data._dataset import ImageDataset
from odeadv.data._load import DatasetNotFoundError, load, names
from odeadv.data._transforms import make_transform
from odeadv.data.stream import Stream

__all__ = [
    "Batches",
    "DatasetNotFoundError",
    "ImageDataset",
    "Stream",
    "as_model_input",
    "load",
    "make_transform",
    "names",
    "random_crop_flip",
    "to_float",
]
