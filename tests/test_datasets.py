"""Dataset objects: the user's own by import path, and torchvision's from files in their format."""

import hashlib
import http.server
import inspect
import itertools
import json
import os
import pickle
import struct
import subprocess
import sys
import tarfile
import threading
import time
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torchvision
from PIL import Image

from tuneapp.config import Data
from tuneapp.data.datasets import _TORCHVISION, as_rgb, open_dataset, read_dataset
from tuneapp.data.decode import Unreadable
from tuneapp.data.examples import ImageSet
from tuneapp.data.reading import open_image, read_example
from tuneapp.data.source import read_images
from tuneapp.data.store import require_repeatable
from tuneapp.errors import ConfigError, DataError, TuneappError
from tuneapp.own import import_from, offer

_numbers = itertools.count()

HEAD = """
import numpy as np
import torch
from PIL import Image


class Pictures:
    def __init__(self, count=20, kind="pil", classes=2):
        self.count, self.kind, self.number = count, kind, classes

    def __len__(self):
        return self.count

    def pixels(self, index):
        grey = np.full((5, 6), index, dtype=np.uint8)
        return np.stack([grey, grey // 2, 255 - grey], axis=-1)

    def __getitem__(self, index):
        return Image.fromarray(self.pixels(index)), index % self.number
"""

Own = Callable[[str], str]


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Own:
    """Return a maker of modules; it returns their names, beside which one writes `:name`."""
    monkeypatch.setattr(sys, "path", list(sys.path))

    def write(text: str) -> str:
        name = f"own_images_{next(_numbers)}"
        folder = tmp_path / "modules"
        folder.mkdir(exist_ok=True)
        (folder / f"{name}.py").write_text(HEAD + text)
        import_from([str(folder)])
        return name

    return write


def refusal(data: Data, kind: type[TuneappError] = DataError) -> str:
    with pytest.raises(kind) as caught:
        read_dataset(data)
    message = str(caught.value)
    assert "\n" not in message
    assert data.source in message
    return message


def pixels(index: int) -> Any:
    grey = np.full((5, 6), index, dtype=np.uint8)
    return np.stack([grey, grey // 2, 255 - grey], axis=-1)


def labels(images: ImageSet, split: str = "train") -> list[Any]:
    return [e.label for e in images.of(split)]


# --- One's own ------------------------------------------------------------------------------------


def test_a_function_or_a_class_of_ones_own_gives_the_examples(own: Own) -> None:
    module = own("def build():\n    return Pictures(classes=3)\n")
    for name in ("build", "Pictures"):
        images = read_dataset(Data(source=f"{module}:{name}"))
        number = 3 if name == "build" else 2
        assert labels(images) == [i % number for i in range(20)]
        assert images.classes == tuple(map(str, range(number)))
        assert images.root is None
        assert not images.is_multilabel
        assert len({e.path for e in images.examples}) == 20
        for index, example in enumerate(images.examples):
            assert np.array_equal(np.asarray(open_image(images, example)), pixels(index))


def test_examples_without_a_split_are_split_and_still_open_as_themselves(own: Own) -> None:
    module = own("")
    images = read_images(Data(source=f"{module}:Pictures"), seed=1)
    assert {e.split for e in images.examples} == {"train", "val", "test"}
    opened = sorted(int(np.asarray(open_image(images, e))[0, 0, 0]) for e in images.examples)
    assert opened == list(range(20))
    for e in images.examples:
        assert np.asarray(open_image(images, e))[0, 0, 0] % 2 == e.label


KINDS = {
    "PIL": "Image.fromarray(rgb)",
    "tensor CHW": "torch.from_numpy(rgb).permute(2, 0, 1)",
    "array HWC": "rgb",
}
GREY_KINDS = {
    "PIL": "Image.fromarray(grey)",
    "tensor HW": "torch.from_numpy(grey)",
    "tensor 1HW": "torch.from_numpy(grey)[None]",
    "array HW": "grey",
    "array HW1": "grey[..., None]",
}
OF_KIND = """
class Kind(Pictures):
    targets = [0, 1] * 10

    def __getitem__(self, index):
        rgb = self.pixels(index)
        grey = rgb[..., 0].copy()
        return {image}, index % 2
"""


@pytest.mark.parametrize("kind", KINDS)
def test_colour_images_may_come_in_every_usual_form(kind: str, own: Own) -> None:
    data = Data(source=f"{own(OF_KIND.format(image=KINDS[kind]))}:Kind")
    images = read_dataset(data)
    image = open_image(images, images.examples[7])
    assert image.mode == "RGB"
    assert np.array_equal(np.asarray(image), pixels(7))


@pytest.mark.parametrize("kind", GREY_KINDS)
def test_grey_images_may_come_in_every_usual_form(kind: str, own: Own) -> None:
    data = Data(source=f"{own(OF_KIND.format(image=GREY_KINDS[kind]))}:Kind")
    images = read_dataset(data)
    image = open_image(images, images.examples[7])
    assert np.array_equal(np.asarray(image), np.full((5, 6, 3), 7))


@pytest.mark.parametrize(
    ("image", "told"),
    [
        ("torch.rand(3, 5, 6)", "is torch.float32; a Dataset must give PIL images, or uint8"),
        ("torch.rand(3, 5, 6, requires_grad=True)", "is torch.float32"),
        ("torch.rand(3, 5, 6).bfloat16()", "is torch.bfloat16"),
        ("rgb / 255.0", "is float64"),
        ("rgb.astype(np.int64)", "is int64"),
        ("rgb.tolist()", "is list"),
        ("None", "is NoneType"),
        ("'a.png'", "is str"),
        ("torch.zeros(4, 5, 6, dtype=torch.uint8)", "has the shape (5, 6, 4): neither"),
        ("np.zeros((5, 6, 2), np.uint8)", "has the shape (5, 6, 2)"),
        ("np.zeros((2, 5, 6, 3), np.uint8)", "has the shape (2, 5, 6, 3)"),
        ("np.zeros(5, np.uint8)", "has the shape (5,)"),
        ("Image.new('F', (4, 4))", "has floating-point numbers as pixels"),
        ("1 / 0", "cannot be read: ZeroDivisionError: division by zero (own_images_"),
    ],
)
def test_what_is_no_image_is_named_when_it_is_opened(image: str, told: str, own: Own) -> None:
    images = read_dataset(Data(source=f"{own(OF_KIND.format(image=image))}:Kind"))
    with pytest.raises(Unreadable) as caught:
        read_example(images, images.examples[3])
    assert str(caught.value).startswith(told)
    with pytest.raises(DataError, match=rf"^own_images_\d+:Kind train/0000003 {told[:8]}"):
        open_image(images, images.examples[3])


def test_a_damaged_file_that_a_dataset_opens_lazily_is_an_unreadable_image(
    own: Own, tmp_path: Path
) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    file = tmp_path / "cut.jpg"
    Image.fromarray(noise).save(file)
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    module = own(OF_KIND.format(image=f"Image.open({str(file)!r})"))
    images = read_dataset(Data(source=f"{module}:Kind"))
    with pytest.raises(Unreadable, match=r"^cannot be read: OSError: image file is truncated"):
        read_example(images, images.examples[0])


def test_what_is_transparent_lies_on_white_as_in_files() -> None:
    clear = Image.new("RGBA", (2, 2), (0, 0, 0, 0))
    assert np.asarray(as_rgb(clear)).min() == 255


# --- Labels ---------------------------------------------------------------------------------------


def test_targets_spare_opening_the_images(own: Own) -> None:
    module = own(
        "class Costly(Pictures):\n"
        "    def __init__(self):\n        super().__init__()\n        self.targets = {targets}\n"
        "    def __getitem__(self, index):\n        raise RuntimeError('opened')\n".format(
            targets="[i % 2 for i in range(20)]"
        )
    )
    assert labels(read_dataset(Data(source=f"{module}:Costly"))) == [0, 1] * 10


@pytest.mark.parametrize(
    "targets", ["torch.arange(20) % 3", "np.arange(20) % 3", "[np.int8(i % 3) for i in range(20)]"]
)
def test_targets_may_be_tensors_arrays_or_lists(targets: str, own: Own) -> None:
    module = own(f"def build():\n    p = Pictures()\n    p.targets = {targets}\n    return p\n")
    assert labels(read_dataset(Data(source=f"{module}:build"))) == [i % 3 for i in range(20)]


@pytest.mark.parametrize(
    "attribute",
    [
        "targets = [1]",
        "targets = None",
        "labels = ['cat'] * 20",
        "y = 5",
        "samples = ['a.png'] * 20",
        "samples = [{'path': 'a.png'}] * 20",
        "samples = np.zeros((20, 2))",
        "targets = [1] * 20\n    target_transform = staticmethod(lambda label: label)",
    ],
)
def test_other_attributes_of_ones_own_are_not_taken_for_labels(attribute: str, own: Own) -> None:
    module = own(f"class Odd(Pictures):\n    {attribute}\n")
    assert labels(read_dataset(Data(source=f"{module}:Odd"))) == [0, 1] * 10


def test_a_subset_of_another_dataset_is_asked_for_each_label(own: Own) -> None:
    module = own(
        "def build():\n"
        "    whole = Pictures(40, classes=4)\n"
        "    whole.targets = [i % 4 for i in range(40)]\n"
        "    return torch.utils.data.Subset(whole, list(range(0, 40, 3)))\n"
    )
    images = read_dataset(Data(source=f"{module}:build"))
    assert labels(images) == [i % 4 for i in range(0, 40, 3)]
    assert np.array_equal(np.asarray(open_image(images, images.examples[2])), pixels(6))


@pytest.mark.parametrize(
    "row", ["[i % 2, 1, 0]", "torch.tensor([i % 2, 1, 0])", "np.array([i % 2, 1.0, 0.0])"]
)
@pytest.mark.parametrize("listed", [True, False])
def test_lists_of_0_and_1_are_several_labels(row: str, listed: bool, own: Own) -> None:
    row = row.replace("i %", "index %") if not listed else row
    module = own(
        f"class Several(Pictures):\n    targets = [{row} for i in range(20)]\n"
        if listed
        else f"class Several(Pictures):\n    def __getitem__(self, index):\n"
        f"        return super().__getitem__(index)[0], {row}\n"
    )
    images = read_dataset(Data(source=f"{module}:Several"))
    assert images.is_multilabel
    assert images.classes == ("0", "1", "2")
    assert labels(images) == [(1,), (0, 1)] * 10


def test_an_array_of_0_and_1_is_several_labels_of_the_named_classes(own: Own) -> None:
    module = own(
        "class Several(Pictures):\n"
        "    targets = np.eye(3, dtype=int)[np.arange(20) % 3] * (np.arange(20) > 0)[:, None]\n"
        "    classes = ['sky', 'sea', 'sand']\n"
    )
    images = read_dataset(Data(source=f"{module}:Several"))
    assert images.classes == ("sky", "sea", "sand")
    assert labels(images)[:4] == [(), (1,), (2,), (0,)]


@pytest.mark.parametrize(
    ("classes", "wanted"),
    [
        ("['cat', 'dog']", ("cat", "dog")),
        ("('cat', 'dog', 'emu')", ("cat", "dog", "emu")),
        ("np.array(['cat', 'dog'])", ("cat", "dog")),
        ("None", ("0", "1")),
        ("[]", ("0", "1")),
        ("[0, 1]", ("0", "1")),
        ("{'cat': 0}", ("0", "1")),
    ],
)
def test_class_names_come_from_the_attribute_where_they_are_names(
    classes: str, wanted: tuple[str, ...], own: Own
) -> None:
    module = own(f"class Named(Pictures):\n    classes = {classes}\n")
    assert read_dataset(Data(source=f"{module}:Named")).classes == wanted


def test_given_classes_name_the_labels(own: Own) -> None:
    module = own("class Named(Pictures):\n    classes = ['x', 'y']\n")
    data = Data(source=f"{module}:Named", classes=["cat", "dog"])
    assert read_dataset(data).classes == ("cat", "dog")


def test_more_than_ten_numbered_classes_are_in_the_order_of_their_labels(own: Own) -> None:
    module = own("def build():\n    return Pictures(classes=12)\n")
    images = read_dataset(Data(source=f"{module}:build"))
    assert images.classes == tuple(map(str, range(12)))
    assert labels(images)[10] == 10


@pytest.mark.parametrize(
    ("targets", "told"),
    [
        ("['cat', 'dog'] * 10", "gives the label 'cat'; it must be a whole number, or a list"),
        ("[0.0, 1.0] * 10", "gives the label 0.0; it must be a whole number"),
        ("[True, False] * 10", "gives the label True"),
        ("[None] * 20", "gives the label None"),
        ("[0, -1] * 10", "train example 1: label -1 is outside the 2 classes 0 to 1"),
        ("[0, 1, 2, 5] * 5", "train example 2: label 2 is outside the 2 classes 0 to 1"),
        ("[[0, 1], [1, 2]] * 10", "example 1: the label must be 2 values 0 or 1, got (1, -1)"),
        ("[[0, 1], [1]] * 10", "train example 1: the label must be 2 values 0 or 1, got (1,)"),
        ("[[0, 1], [0.5, 1]] * 10", "example 1: the label must be 2 values 0 or 1, got (-1, 1)"),
        ("[[0, 1], 1] * 10", "mixes single labels with lists of 0 and 1"),
    ],
)
def test_labels_of_the_wrong_kind_are_named(targets: str, told: str, own: Own) -> None:
    module = own(f"class Bad(Pictures):\n    classes = ['a', 'b']\n    targets = {targets}\n")
    assert told in refusal(Data(source=f"{module}:Bad"))


@pytest.mark.parametrize(
    "body",
    ["    targets = [0] * 20", "    targets = [[1]] * 20", "    targets = [[]] * 20",
     "    classes = ['cat']\n    targets = [0] * 20", "    classes = ['cat', 'cat']"],
)  # fmt: skip
def test_fewer_than_two_classes_of_different_names_are_refused(body: str, own: Own) -> None:
    module = own(f"class Few(Pictures):\n{body}\n")
    message = refusal(Data(source=f"{module}:Few"))
    assert "at least two with different names are required" in message


def test_a_class_number_that_no_example_has_is_refused_once_the_split_is_drawn(own: Own) -> None:
    module = own("class Gap(Pictures):\n    targets = [0, 2] * 10\n")
    with pytest.raises(DataError, match="no image of 1 would be in train"):
        read_images(Data(source=f"{module}:Gap"), seed=0)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ("raise KeyError('gone')", "example 0: it must give (image, label): KeyError: 'gone'"),
        ("return 'only an image'", "example 0: it must give (image, label): ValueError"),
        ("return 1, 2, 3", "example 0: it must give (image, label): ValueError"),
        ("return {'image': 1}", "example 0: it must give (image, label): ValueError"),
    ],
)
def test_an_example_that_is_no_pair_is_named_with_the_line(given: str, told: str, own: Own) -> None:
    module = own(f"class Bad(Pictures):\n    def __getitem__(self, index):\n        {given}\n")
    message = refusal(Data(source=f"{module}:Bad"))
    assert told in message
    assert ".py:" in message
    assert "with a `targets` attribute, labels are read without" in message


# --- Splits of one's own --------------------------------------------------------------------------

SPLITS = """
def build(split, root="somewhere"):
    counts = {"train": 12, "val": 6, "test": 4}
    return Pictures(counts[split])


def no_test(*, split="train"):
    return None if split == "test" else build(split)


def only_train(split):
    return build(split) if split == "train" else None


def nothing(split):
    return None


class Split(Pictures):
    def __init__(self, split):
        super().__init__({"train": 12, "val": 6, "test": 4}[split])
"""


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("build", {"train": 12, "val": 6, "test": 4}),
        ("Split", {"train": 12, "val": 6, "test": 4}),
        ("no_test", {"train": 12, "val": 6, "test": 0}),
        ("only_train", {"train": 12, "val": 0, "test": 0}),
    ],
)
def test_a_function_that_takes_a_split_is_called_for_each(
    name: str, wanted: dict[str, int], own: Own
) -> None:
    images = read_dataset(Data(source=f"{own(SPLITS)}:{name}"))
    assert {split: len(images.of(split)) for split in wanted} == wanted
    assert len({e.path for e in images.examples}) == sum(wanted.values())
    for split, size in wanted.items():
        opened = [np.asarray(open_image(images, e))[0, 0, 0] for e in images.of(split)]
        assert opened == list(range(size))


def test_the_splits_of_a_dataset_stay_and_missing_ones_are_drawn(own: Own) -> None:
    module = own(SPLITS)
    images = read_images(Data(source=f"{module}:build"), seed=0)
    assert [len(images.of(s)) for s in ("train", "val", "test")] == [12, 6, 4]
    images = read_images(Data(source=f"{module}:only_train"), seed=0)
    assert all(images.of(s) for s in ("train", "val", "test"))


def test_a_dataset_without_training_examples_is_refused(own: Own) -> None:
    message = refusal(Data(source=f"{own(SPLITS)}:nothing"))
    assert "returned NoneType; it must return a torch.utils.data.Dataset" in message


@pytest.mark.parametrize(
    ("text", "told", "kind"),
    [
        ("build = 5", ".build is an int, not a function", ConfigError),
        ("build = Pictures()", ".build is a Pictures, not a function", ConfigError),
        ("bild = Pictures", "has no build; did you mean 'bild'?", ConfigError),
        ("raise OSError('disk')", "OSError: disk", ConfigError),
        ("def build():\n    raise OSError('disk')", "() raised OSError: disk (own_", DataError),
        ("def build(split):\n    raise OSError('x')", "(split='train') raised OSError", DataError),
        ("def build(root):\n    return 1", "() raised TypeError: ", DataError),
        ("def build():\n    return iter([1])", "with __getitem__ and __len__", DataError),
        ("def build():\n    return None", "returned NoneType", DataError),
        (
            "class build(torch.utils.data.Dataset):\n    def __getitem__(self, i):\n        pass",
            "returned build; it must return a torch.utils.data.Dataset, with",
            DataError,
        ),
        ("def build():\n    return Pictures(0)", "holds no example", DataError),
    ],
)  # fmt: skip
def test_what_is_no_dataset_is_named(
    text: str, told: str, kind: type[TuneappError], own: Own
) -> None:
    assert told in refusal(Data(source=f"{own(text)}:build"), kind)


def test_a_module_that_is_not_there_is_named_with_the_way_out() -> None:
    message = refusal(Data(source="no.such_module:build"), ConfigError)
    assert "cannot import no.such_module" in message
    assert "beside the search space" in message


# --- torchvision's: files in their own format -----------------------------------------------------

CIFAR_NAMES = ["plane", "car", "bird"]


def md5(file: Path) -> str:
    return hashlib.md5(file.read_bytes(), usedforsecurity=False).hexdigest()


def make_cifar(folder: Path) -> dict[str, str]:
    """Write CIFAR-10's files, six images in each, and return their digests."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    names = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]
    for number, name in enumerate(names):
        entry = {
            "batch_label": name,
            "labels": [(number + i) % 3 for i in range(6)],
            "data": rng.integers(0, 256, (6, 3072), dtype=np.uint8),
            "filenames": [f"{i}.png" for i in range(6)],
        }
        (folder / name).write_bytes(pickle.dumps(entry))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": CIFAR_NAMES}))
    return {file.name: md5(file) for file in folder.iterdir()}


def cifar_settings(digests: dict[str, str]) -> dict[str, Any]:
    """Return the attributes of torchvision's class that make it accept the files."""
    return {
        "train_list": [[f"data_batch_{i}", digests[f"data_batch_{i}"]] for i in range(1, 6)],
        "test_list": [["test_batch", digests["test_batch"]]],
        "meta": {
            "filename": "batches.meta",
            "key": "label_names",
            "md5": digests["batches.meta"],
        },
    }


NOWHERE = "http://127.0.0.1:9/cifar.tar.gz"  # a port on which nothing answers


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "url", NOWHERE)


@pytest.mark.usefixtures("offline")
def test_cifar10_is_read_from_its_files_without_any_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "cifar-10-batches-py"
    for name, value in cifar_settings(make_cifar(folder)).items():
        monkeypatch.setattr(torchvision.datasets.CIFAR10, name, value)
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "download", None)  # it must not be called
    images = read_dataset(Data(source="torchvision:CIFAR10", data_root=str(tmp_path)))
    assert images.classes == tuple(CIFAR_NAMES)
    assert labels(images) == [(batch + i) % 3 for batch in range(5) for i in range(6)]
    assert labels(images, "test") == [(5 + i) % 3 for i in range(6)]
    assert images.of("val") == ()
    for split, position, file in (("train", 14, "data_batch_3"), ("test", 4, "test_batch")):
        rows = pickle.loads((folder / file).read_bytes())["data"]  # noqa: S301 - our own file
        # A row is the red plane, then the green, then the blue one (cs.toronto.edu/~kriz/cifar).
        wanted = rows[position % 6].reshape(3, 32, 32).transpose(1, 2, 0)
        opened = open_image(images, images.of(split)[position])
        assert np.array_equal(np.asarray(opened), wanted)


@pytest.mark.usefixtures("offline")
def test_the_training_images_of_cifar10_give_the_validation_split(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in cifar_settings(make_cifar(tmp_path / "cifar-10-batches-py")).items():
        monkeypatch.setattr(torchvision.datasets.CIFAR10, name, value)
    data = Data(source="torchvision:CIFAR10", data_root=str(tmp_path), val_share=0.2)
    images = read_images(data, seed=0)
    assert [len(images.of(s)) for s in ("train", "val", "test")] == [24, 6, 6]
    whole = read_dataset(data)
    opened = open_dataset(data)
    for e in images.of("val"):
        before = next(x for x in whole.examples if x.path == e.path)
        assert e.label == before.label
        assert opened(e).size == (32, 32)


def idx(array: Any, kind: int) -> bytes:
    """Return the format of Y. LeCun's files: magic number, sizes, values, all big-endian."""
    sizes = struct.pack(f">{array.ndim}I", *array.shape)
    big_endian = array.astype(array.dtype.newbyteorder(">"))
    return bytes([0, 0, kind, array.ndim]) + sizes + big_endian.tobytes()


@pytest.mark.usefixtures("offline")
def test_mnist_is_read_from_its_files(tmp_path: Path) -> None:
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    rng = np.random.default_rng(1)
    made = {}
    for part, count in (("train", 30), ("t10k", 20)):
        scans = rng.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        digits = (np.arange(count) * 7 % 10).astype(np.uint8)
        (raw / f"{part}-images-idx3-ubyte").write_bytes(idx(scans, 8))
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(idx(digits, 8))
        made[part] = (scans, digits)
    images = read_dataset(Data(source="torchvision:MNIST", data_root=str(tmp_path)))
    assert len(images.classes) == 10
    for split, part in (("train", "train"), ("test", "t10k")):
        scans, digits = made[part]
        assert labels(images, split) == digits.tolist()
        opened = np.asarray(open_image(images, images.of(split)[11]))
        assert np.array_equal(opened, np.repeat(scans[11][..., None], 3, axis=-1))


@pytest.mark.usefixtures("offline")
def test_the_rows_of_numbers_of_qmnist_are_no_sets_of_labels(tmp_path: Path) -> None:
    raw = tmp_path / "QMNIST" / "raw"
    raw.mkdir(parents=True)
    for part, count in (("train", 20), ("test", 10)):
        rows = np.zeros((count, 8), dtype=np.int32)
        rows[:, 0] = np.arange(count) % 10
        rows[:, 2] = 1
        scans = np.zeros((count, 28, 28), dtype=np.uint8)
        (raw / f"qmnist-{part}-images-idx3-ubyte").write_bytes(idx(scans, 8))
        (raw / f"qmnist-{part}-labels-idx2-int").write_bytes(idx(rows, 12))
    images = read_dataset(Data(source="torchvision:QMNIST", data_root=str(tmp_path)))
    assert not images.is_multilabel
    assert labels(images) == [i % 10 for i in range(20)]
    assert len(images.of("test")) == 10


# --- torchvision's: downloaded --------------------------------------------------------------------


@pytest.fixture
def server(tmp_path: Path) -> Iterator[tuple[str, list[str]]]:
    """Serve a folder; yields its address and the paths that were asked for, as they come."""
    folder = tmp_path / "served"
    folder.mkdir()
    asked: list[str] = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args, directory=str(folder))

        def do_GET(self) -> None:
            if self.headers.get("Method") != "HEAD":  # as torchvision looks for redirections
                asked.append(self.path)
            time.sleep(0.5)  # so that a second process would come meanwhile
            super().do_GET()

        def log_message(self, *args: object) -> None:
            pass

    serving = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=serving.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{serving.server_port}", asked
    serving.shutdown()
    thread.join()
    serving.server_close()


READ_CIFAR = """
import json, sys
import torchvision
from tuneapp.config import Data
from tuneapp.data.datasets import read_dataset

for name, value in json.loads(sys.argv[1]).items():
    setattr(torchvision.datasets.CIFAR10, name, value)
print("ready", flush=True)
sys.stdin.readline()
images = read_dataset(Data(source="torchvision:CIFAR10"))
print("read", len(images.examples), *images.classes)
"""


def test_two_processes_at_once_download_a_data_set_once(
    server: tuple[str, list[str]], tmp_path: Path
) -> None:
    address, asked = server
    made = tmp_path / "made" / "cifar-10-batches-py"
    settings = cifar_settings(make_cifar(made))
    archive = tmp_path / "served" / "cifar.tar.gz"
    with tarfile.open(archive, "w:gz") as packed:
        packed.add(made, "cifar-10-batches-py")
    settings |= {"url": f"{address}/cifar.tar.gz", "tgz_md5": md5(archive)}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", READ_CIFAR, json.dumps(settings)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "TUNEAPP_CACHE": str(tmp_path / "cache"), "no_proxy": "127.0.0.1"},
        )
        for _ in range(2)
    ]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    for process in processes:
        out, err = process.communicate(timeout=50)
        assert out.splitlines()[-1:] == ["read 36 plane car bird"], err
    assert asked == ["/cifar.tar.gz"]
    assert (tmp_path / "cache" / "data" / "cifar-10-batches-py" / "test_batch").is_file()


@pytest.mark.usefixtures("offline")
def test_without_files_and_network_one_line_says_where_to_put_them(tmp_path: Path) -> None:
    data = Data(source="torchvision:CIFAR10", data_root=str(tmp_path / "root"))
    message = refusal(data)
    assert message.startswith("torchvision:CIFAR10 is not available: URLError: ")
    assert f"put its files into {tmp_path / 'root'} (--data-root)" in message
    assert "in the layout of torchvision.datasets.CIFAR10" in message
    assert message.endswith("or connect this machine to the network")


@pytest.mark.usefixtures("offline")
def test_damaged_files_of_a_data_set_are_refused_in_one_line(tmp_path: Path) -> None:
    make_cifar(tmp_path / "cifar-10-batches-py")  # whose digests torchvision does not know
    data = Data(source="torchvision:CIFAR10", data_root=str(tmp_path))
    assert "torchvision:CIFAR10 is not available: " in refusal(data)


def test_a_data_set_that_cannot_be_downloaded_does_not_ask_for_the_network(tmp_path: Path) -> None:
    message = refusal(Data(source="torchvision:FER2013", data_root=str(tmp_path)))
    assert "train.csv not found in" in message
    assert message.endswith("in the layout of torchvision.datasets.FER2013")


def test_a_root_that_cannot_be_made_is_told_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    data = Data(source="torchvision:MNIST", data_root=str(tmp_path / "file" / "below"))
    assert "torchvision:MNIST is not available: NotADirectoryError" in refusal(data)


@pytest.mark.parametrize(
    ("name", "near"), [("CIFAR1O", "'CIFAR10'"), ("cifar100", "'CIFAR100'"), ("Flower102", "'Fl")]
)
def test_an_unknown_name_is_answered_by_its_near_miss_and_all_there_are(
    name: str, near: str
) -> None:
    message = refusal(Data(source=f"torchvision:{name}"), ConfigError)
    assert f"no such data set; did you mean {near}" in message
    assert all(known in message for known in _TORCHVISION)


# --- torchvision's: the table of their splits -----------------------------------------------------

PARTS = [(name, split) for name, parts in _TORCHVISION.items() for split in parts]


def test_every_named_data_set_has_training_images_and_its_splits_differ() -> None:
    for name, parts in _TORCHVISION.items():
        assert "train" in parts, name
        assert set(parts) <= {"train", "val", "test"}
        given = [tuple(arguments.items()) for arguments in parts.values()]
        assert len(set(given)) == len(given), name


@pytest.mark.parametrize(("name", "split"), PARTS, ids=lambda value: str(value))
def test_torchvision_knows_the_data_set_and_the_arguments_of_its_split(
    name: str, split: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind = getattr(torchvision.datasets, name)
    monkeypatch.setitem(sys.modules, "h5py", types.ModuleType("h5py"))  # PCAM looks for it first
    arguments = dict(_TORCHVISION[name][split])
    known = inspect.signature(kind).parameters
    assert set(arguments) <= set(known)
    # Without files it fails for want of them, after it has looked at its arguments.
    with pytest.raises((RuntimeError, OSError)) as caught:
        kind(str(tmp_path), **arguments)
    assert "nknown value" not in str(caught.value)
    if "split" in arguments:
        with pytest.raises(ValueError, match="nknown value"):
            kind(str(tmp_path), split="no such split")


def test_a_data_set_with_an_argument_for_its_splits_is_not_taken_as_a_whole() -> None:
    for name, parts in _TORCHVISION.items():
        known = inspect.signature(getattr(torchvision.datasets, name)).parameters
        for argument in ("split", "train"):
            if argument in known:
                assert all(argument in arguments for arguments in parts.values()), name


def test_a_dataset_that_draws_its_images_is_refused_before_they_are_frozen() -> None:
    class Drawn:
        targets = (0, 1) * 20
        classes = ("a", "b")

        def __len__(self) -> int:
            return 40

        def __getitem__(self, index: int) -> tuple[Image.Image, int]:
            noise = np.random.default_rng().integers(0, 256, (8, 8, 3), dtype=np.uint8)
            return Image.fromarray(noise), index % 2

    module = types.ModuleType("drawn_images")
    module.build = Drawn
    offer("drawn_images", module, "", Path("drawn_images.py"))
    images = read_images(Data(source="drawn_images:build"), seed=0)
    with pytest.raises(DataError, match=r"another image each time.*augment="):
        require_repeatable(images)
