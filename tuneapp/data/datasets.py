"""Images from `torch.utils.data.Dataset` objects: torchvision's by name, or user-defined ones."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
import torchvision
from filelock import FileLock
from PIL import Image, ImageOps

from tuneapp.config import Data
from tuneapp.data.cache import cache_dir
from tuneapp.data.decode import Unreadable, to_rgb
from tuneapp.data.examples import Example, ImageSet, Labels, sorted_classes
from tuneapp.errors import ConfigError, DataError, did_you_mean, first_line, say_cause
from tuneapp.own import find_own

_PREFIX = "torchvision:"
Parts = Mapping[str, Mapping[str, Any]]
Opener = Callable[[Example], Image.Image]

_BY_FLAG: Parts = {"train": {"train": True}, "test": {"train": False}}
_BY_SPLIT: Parts = {"train": {"split": "train"}, "test": {"split": "test"}}
_THREE: Parts = {**_BY_SPLIT, "val": {"split": "val"}}
_NO_TEST: Parts = {"train": {"split": "train"}, "val": {"split": "val"}}
_WHOLE: Parts = {"train": {}}

# The arguments by which torchvision's classification data sets give their own splits.
_TORCHVISION: Mapping[str, Parts] = MappingProxyType(
    {
        "CIFAR10": _BY_FLAG,
        "CIFAR100": _BY_FLAG,
        "Caltech101": _WHOLE,
        "Caltech256": _WHOLE,
        "Country211": {**_BY_SPLIT, "val": {"split": "valid"}},
        "DTD": _THREE,
        "EuroSAT": _WHOLE,
        "FER2013": _BY_SPLIT,
        "FGVCAircraft": _THREE,
        "FashionMNIST": _BY_FLAG,
        "Flowers102": _THREE,
        "Food101": _BY_SPLIT,
        "GTSRB": _BY_SPLIT,
        "ImageNet": _NO_TEST,
        "Imagenette": _NO_TEST,
        "KMNIST": _BY_FLAG,
        "MNIST": _BY_FLAG,
        "OxfordIIITPet": {"train": {"split": "trainval"}, "test": {"split": "test"}},
        "PCAM": _THREE,
        "QMNIST": _BY_FLAG,
        "RenderedSST2": _THREE,
        "SEMEION": _WHOLE,
        "STL10": _BY_SPLIT,
        "SUN397": _WHOLE,
        "SVHN": _BY_SPLIT,
        "StanfordCars": _BY_SPLIT,
        "USPS": _BY_FLAG,
    }
)
TORCHVISION_NAMES = tuple(_TORCHVISION)


@dataclass(frozen=True)
class _Part:
    """One Dataset object, and the split to which its examples belong."""

    split: str
    dataset: Any


def read_dataset(data: Data) -> ImageSet:
    """Return the images of a Dataset, in its own splits if it has some, else in `train`.

    Labels are read from `targets` (for torchvision's also `labels` and similar names) if the object
    has them, else from every example.

    Raises:
        DataError: it is not available or empty, or its labels or images are of the wrong kind.
        ConfigError: there is no such data set.
    """
    parts = _parts(data)
    raw = {part.split: _raw_labels(part.dataset, data) for part in parts}
    every = [label for labels in raw.values() for label in labels]
    if not every:
        raise DataError(f"{data.source} holds no example")
    is_multilabel = isinstance(every[0], tuple)
    if any(isinstance(label, tuple) != is_multilabel for label in every):
        raise DataError(f"{data.source} mixes single labels with lists of 0 and 1")
    classes = _class_names(parts[0].dataset, every, data)
    if len(classes) < 2 or len(set(classes)) < len(classes):
        names = ", ".join(classes[:5])
        raise DataError(
            f"{data.source} has the classes {names or '(none)'}; at least two with different "
            "names are required"
        )
    examples = []
    for part in parts:
        for index, label in enumerate(raw[part.split]):
            checked = _checked(label, classes, f"{data.source}, {part.split} example {index}")
            examples.append(Example(f"{part.split}/{index:07d}", checked, part.split, 0))
    return ImageSet(None, tuple(classes), tuple(examples), data, is_multilabel)


def open_dataset(data: Data) -> Opener:
    """Return a function that decodes an example of `read_dataset(data)`, in RGB."""
    by_split = {part.split: part.dataset for part in _parts(data)}

    def open_example(example: Example) -> Image.Image:
        split, _, index = example.path.partition("/")
        try:
            # Both calls: an image may be opened lazily here, and decoded in `as_rgb`.
            return as_rgb(by_split[split][int(index)][0])
        except Unreadable:
            raise
        except Exception as error:  # user-defined code, or a damaged file of torchvision
            raise Unreadable(f"cannot be read: {say_cause(error)}") from None

    return open_example


def as_rgb(image: object) -> Image.Image:
    """Return an image of a Dataset in RGB.

    Args:
        image: a PIL image; a uint8 tensor (H, W), (1, H, W) or (3, H, W); or a uint8 array (H, W)
            or (H, W, 3).

    Raises:
        Unreadable: it is none of these.
    """
    if isinstance(image, Image.Image):
        return to_rgb(ImageOps.exif_transpose(image))
    if isinstance(image, torch.Tensor) and image.dtype == torch.uint8:
        image = (image.permute(1, 2, 0) if image.dim() == 3 else image).numpy()
    if not isinstance(image, np.ndarray) or image.dtype != np.uint8:
        what = getattr(image, "dtype", type(image).__name__)
        raise Unreadable(f"is {what}; a Dataset must give PIL images, or uint8 tensors or arrays")
    pixels = image[..., 0] if image.ndim == 3 and image.shape[-1] == 1 else image
    if pixels.ndim not in (2, 3) or (pixels.ndim == 3 and pixels.shape[-1] != 3):
        raise Unreadable(f"has the shape {tuple(image.shape)}: neither a grey nor an RGB image")
    return Image.fromarray(np.ascontiguousarray(pixels)).convert("RGB")


def _parts(data: Data) -> list[_Part]:
    if data.source.startswith(_PREFIX):
        return _torchvision_parts(data, data.source.removeprefix(_PREFIX))
    return _own_parts(data)


def _torchvision_parts(data: Data, name: str) -> list[_Part]:
    """Open a torchvision data set, downloading it if it is not there yet; one process at a time."""
    if name not in _TORCHVISION:
        raise ConfigError(
            f"--data {data.source}: no such data set{did_you_mean(name, _TORCHVISION)}; there are "
            f"{', '.join(_TORCHVISION)}"
        )
    root = cache_dir() / "data" if data.data_root is None else Path(data.data_root)
    kind = getattr(torchvision.datasets, name)
    can_download = "download" in inspect.signature(kind).parameters
    arguments = {"download": True} if can_download or name in ("QMNIST",) else {}
    try:
        root.mkdir(parents=True, exist_ok=True)
        with FileLock(root / f".{name}.lock"):
            return [
                _Part(split, _opened_or_downloaded(kind, root, chosen, arguments))
                for split, chosen in sorted(_TORCHVISION[name].items(), key=_train_first)
            ]
    except Exception as error:  # torchvision, its archives and the network raise many kinds
        way_out = "" if not arguments else ", or connect this machine to the network"
        raise DataError(
            f"{data.source} is not available: {first_line(error, named=True)}; put its files into "
            f"{root} (--data-root), in the layout of torchvision.datasets.{name}{way_out}"
        ) from None


def _opened_or_downloaded(
    kind: Any, root: Path, chosen: Mapping[str, Any], arguments: Mapping[str, Any]
) -> Any:
    """Return the data set from its files; download them only if they are missing."""
    if arguments:
        try:
            return kind(str(root), **chosen)
        except Exception:  # each data set has its own error for missing files
            return kind(str(root), **chosen, **arguments)
    return kind(str(root), **chosen)


def _train_first(item: tuple[str, object]) -> int:
    return ("train", "val", "test").index(item[0])


def _own_parts(data: Data) -> list[_Part]:
    """Call the user-defined function: once, or, if it has a parameter `split`, for each split."""
    build = find_own(data.source, "data")
    try:
        takes_split = "split" in inspect.signature(build).parameters
    except (TypeError, ValueError):
        takes_split = False
    parts = []
    for split in ("train", "val", "test") if takes_split else ("train",):
        try:
            dataset = build(split=split) if takes_split else build()
        except Exception as error:
            called = f"(split={split!r})" if takes_split else "()"
            raise DataError(f"--data {data.source}: {called} raised {say_cause(error)}") from None
        if dataset is None and split != "train":
            continue  # there is no such split
        if not hasattr(dataset, "__getitem__") or not hasattr(dataset, "__len__"):
            raise DataError(
                f"--data {data.source} returned {type(dataset).__name__}; it must return a "
                "torch.utils.data.Dataset, with __getitem__ and __len__"
            )
        parts.append(_Part(split, dataset))
    return parts


def _raw_labels(dataset: Any, data: Data) -> list[Any]:
    """Return the label of each example: an int, or a tuple of 0 and 1."""
    # In a user-defined Dataset, the meaning of other names than `targets` is not known.
    for name in ("targets",) if data.is_own else ("targets", "labels", "y", "_labels"):
        found: Any = getattr(dataset, name, None)
        is_list = hasattr(found, "__len__") and len(found) == len(dataset)
        # QMNIST's targets are rows of values, of which the first is the label.
        is_plain = data.is_own or getattr(found, "ndim", 1) == 1
        if is_list and is_plain and getattr(dataset, "target_transform", None) is None:
            return [_plain(label, data) for label in found]
    samples = None if data.is_own else getattr(dataset, "_samples", None)
    if samples is not None and len(samples) == len(dataset):
        return [_plain(sample[1], data) for sample in samples]
    labels = []
    for index in range(len(dataset)):
        try:
            _, label = dataset[index]
        except Exception as error:
            raise DataError(
                f"{data.source}, example {index}: it must give (image, label): {say_cause(error)}; "
                "with a `targets` attribute, labels are read without loading the examples"
            ) from None
        labels.append(_plain(label, data))
    return labels


def _plain(label: Any, data: Data) -> Labels:
    if hasattr(label, "tolist"):
        label = label.tolist()
    if isinstance(label, list | tuple):
        return tuple(int(flag) if flag in (0, 1) else -1 for flag in label)
    if isinstance(label, bool) or not isinstance(label, int):
        raise DataError(
            f"{data.source} gives the label {label!r}; it must be a whole number, or a list with 0 "
            "or 1 for each class"
        )
    return label


def _class_names(dataset: Any, labels: Sequence[Any], data: Data) -> list[str]:
    if data.classes is not None:
        return list(data.classes)
    for attribute in ("classes", "categories"):
        named = getattr(dataset, attribute, None)
        if isinstance(named, np.ndarray):
            named = named.tolist()
        if not isinstance(named, list | tuple) or not named:
            continue
        # ImageNet's are tuples of synonyms.
        first = [name[0] if isinstance(name, tuple) and name else name for name in named]
        if all(isinstance(name, str) for name in first):
            return first
    if isinstance(labels[0], tuple):
        return [str(i) for i in range(len(labels[0]))]
    return sorted_classes([str(i) for i in range(max(max(labels), 0) + 1)])


def _checked(label: Labels, classes: Sequence[str], where: str) -> Labels:
    """Return the indices of the classes that a label stands for."""
    if isinstance(label, tuple):
        if len(label) != len(classes) or -1 in label:
            raise DataError(f"{where}: the label must be {len(classes)} values 0 or 1, got {label}")
        return tuple(i for i, flag in enumerate(label) if flag)
    if not 0 <= label < len(classes):
        raise DataError(
            f"{where}: label {label} is outside the {len(classes)} classes 0 to {len(classes) - 1}"
        )
    return label
