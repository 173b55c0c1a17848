"""Images to train and attack on: labelled ``uint8`` arrays in memory, and batches of them with standard augmentation.

`load` finds CIFAR-10, CIFAR-100, a folder of your own images or scikit-learn's digits (no download needed) and returns
an `ImageDataset`. `Batches` turns its arrays into float images in [0, 1] and labels. `Stream` does the same for a
`torch.utils.data.Dataset` or ``DataLoader``. Both draw only from the generator they are given. Nothing here knows about
models or solvers; torchvision, PIL and scikit-learn are imported only if a data set needs them.
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
