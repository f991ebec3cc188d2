import gc
import random
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from PIL import Image
from torch import Tensor

from tests.states import config_of
from tuneapp.data.batches import Batch, Batches
from tuneapp.data.examples import Example, ImageSet
from tuneapp.data.pixels import Preprocessing
from tuneapp.data.sampling import InOrder, Shuffled, view_seeds
from tuneapp.data.store import Store, open_store
from tuneapp.data.views import check_augment, draw_view, evaluation_view, mixing, training_view
from tuneapp.errors import ConfigError, DataError

SMALL = Preprocessing(40, 32, "bilinear", (0.4, 0.5, 0.6), (0.2, 0.25, 0.5))
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> ImageSet:
    """Thirteen training images of four classes and five for validation, of several shapes."""
    root = tmp_path_factory.mktemp("photos")
    examples = []
    for i in range(18):
        shape = (44 + i, 61 - i, 3)
        coarse = np.random.default_rng(i).integers(0, 256, (7, 9, 3), dtype=np.uint8)
        image = Image.fromarray(coarse).resize(shape[1::-1], Image.Resampling.BICUBIC)
        image.save(root / f"{i:02d}.jpg")
        now = (root / f"{i:02d}.jpg").stat()
        side = "train" if i < 13 else "val"
        examples.append(
            Example(f"{i:02d}.jpg", i % 4, side, now.st_size, modified_ns=now.st_mtime_ns)
        )
    return ImageSet(root, tuple("abcd"), tuple(examples))


@pytest.fixture(scope="module")
def stores(
    photos: ImageSet, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, Store]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TUNEAPP_CACHE", str(tmp_path_factory.mktemp("batches")))
        streamed = open_store(photos, SMALL, budget=0)
        stored = open_store(photos, SMALL)
        assert (stored.is_streamed, streamed.is_streamed) == (False, True)
        yield {"stored": stored, "streamed": streamed}


def batches_of(
    store: Store,
    *,
    workers: int = 0,
    mix: tuple[float, float] = (0.0, 0.0),
    augment: str = "strong",
    batch_size: int = 4,
) -> Batches:
    return Batches(
        store,
        Shuffled(store, config_of(), 3),
        view=training_view(augment, SMALL),
        preprocessing=SMALL,
        batch_size=batch_size,
        device=CPU,
        join_single=True,
        mix=mixing(*mix, num_classes=4),
        mix_seed=3,
        workers=workers,
    )


@pytest.fixture(scope="module")
def by_workers(stores: dict[str, Store]) -> Iterator[dict[str, Batches]]:
    """Batches that two processes make; those of streamed images are mixed."""
    made = {
        "stored": batches_of(stores["stored"], workers=2),
        "streamed": batches_of(stores["streamed"], workers=2, mix=(0.8, 1.0)),
    }
    yield made
    made.clear()


def are_same(a: list[Batch], b: list[Batch]) -> bool:
    pairs = zip(a, b, strict=True)
    return all(torch.equal(x, y) and torch.equal(s, t) for (x, s), (y, t) in pairs)


MIX_OF = {"stored": (0.0, 0.0), "streamed": (0.8, 1.0)}
each_place = pytest.mark.parametrize("place", MIX_OF)


# --- Wherever they are made -----------------------------------------------------------------------


@pytest.mark.parametrize("mix", MIX_OF.values(), ids=["plain", "mixed"])
def test_streamed_batches_are_the_stored_ones_to_the_last_bit(
    mix: tuple[float, float], stores: dict[str, Store]
) -> None:
    stored, streamed = (batches_of(stores[place], mix=mix) for place in ("stored", "streamed"))
    for epoch in (1, 2):
        assert are_same(list(stored.epoch(epoch)), list(streamed.epoch(epoch)))
    assert (stored.is_streamed, streamed.is_streamed) == (False, True)


@each_place
def test_workers_make_the_batches_that_are_made_here_to_the_last_bit(
    place: str, stores: dict[str, Store], by_workers: dict[str, Batches]
) -> None:
    here = batches_of(stores["stored"], mix=MIX_OF[place])
    assert by_workers[place].workers == 2
    for epoch in (1, 2, 1):
        assert are_same(list(by_workers[place].epoch(epoch)), list(here.epoch(epoch)))
    assert not are_same(list(here.epoch(1)), list(here.epoch(2)))


@each_place
def test_an_epoch_that_is_given_up_changes_nothing_of_the_next_one(
    place: str, stores: dict[str, Store], by_workers: dict[str, Batches]
) -> None:
    wanted = list(batches_of(stores["stored"], mix=MIX_OF[place]).epoch(7))
    for taken in (1, 2):
        given_up = by_workers[place].epoch(6)
        for _ in range(taken):
            next(given_up)
        assert are_same(list(by_workers[place].epoch(7)), wanted)
        del given_up
        assert are_same(list(by_workers[place].epoch(7)), wanted)


def random_states() -> tuple[Any, ...]:
    name, keys, *rest = np.random.get_state()
    return torch.get_rng_state().tolist(), random.getstate(), name, keys.tolist(), *rest


@pytest.mark.parametrize("workers", [0, 2])
def test_no_generator_of_this_process_is_touched(
    workers: int, stores: dict[str, Store], by_workers: dict[str, Batches]
) -> None:
    batches = by_workers["streamed"] if workers else batches_of(stores["streamed"], mix=(0.8, 1.0))
    torch.manual_seed(5), np.random.seed(5), random.seed(5)
    before = random_states()
    for _ in batches.epoch(4):
        assert random_states() == before
    assert random_states() == before


def test_what_is_drawn_here_meanwhile_changes_no_batch_of_the_workers(
    stores: dict[str, Store], by_workers: dict[str, Batches]
) -> None:
    wanted = list(batches_of(stores["stored"]).epoch(5))
    got = []
    for batch in by_workers["stored"].epoch(5):
        torch.rand(7)
        got.append(batch)
    assert are_same(got, wanted)


def test_evaluation_is_each_example_in_order_with_its_label(
    stores: dict[str, Store], photos: ImageSet
) -> None:
    store = stores["streamed"]
    batches = Batches(
        store,
        InOrder(store, "val"),
        view=evaluation_view(SMALL),
        preprocessing=SMALL,
        batch_size=2,
        device=CPU,
    )
    labels = [labels.tolist() for _, labels in batches.epoch(1)]
    assert labels == [[13 % 4, 14 % 4], [15 % 4, 16 % 4], [17 % 4]]
    assert len(batches) == 3
    assert batches.num_examples == 5


def test_labels_belong_to_their_images(stores: dict[str, Store]) -> None:
    batches = batches_of(stores["stored"], augment="none")
    centres = {stores["stored"].image(i)[:, :, :].float().mean().item(): i % 4 for i in range(13)}
    assert len(centres) == 13
    draw = Shuffled(stores["stored"], config_of(), 3).draw(2)
    labels = torch.cat([labels for _, labels in batches.epoch(2)])
    assert labels.tolist() == [index % 4 for index in draw.indices]
    pixels = torch.cat([images for images, _ in batches.epoch(2)])
    for image, index in zip(pixels, draw.indices.tolist(), strict=True):
        stored = evaluation_view(SMALL)(stores["stored"].image(index)).double() / 255
        mean, std = (torch.tensor(v).double().view(3, 1, 1) for v in (SMALL.mean, SMALL.std))
        assert torch.allclose(image.double(), (stored - mean) / std, atol=1e-6)


def test_several_labels_of_an_image_come_as_they_are_stored(photos: ImageSet) -> None:
    examples = tuple(
        replace(e, label=tuple(c for c in range(4) if (i + 1) >> c & 1))
        for i, e in enumerate(photos.examples)
    )
    store = open_store(replace(photos, examples=examples, is_multilabel=True), SMALL)
    draw = Shuffled(store, config_of(), 3).draw(1)
    labels = torch.cat([labels for _, labels in batches_of(store).epoch(1)])
    assert labels.dtype == torch.float32
    assert labels.tolist() == [[float((i + 1) >> c & 1) for c in range(4)] for i in draw.indices]


def test_mixing_several_labels_blends_their_rows(photos: ImageSet) -> None:
    examples = tuple(
        replace(e, label=(i % 4, 3) if i % 4 < 3 else (3,)) for i, e in enumerate(photos.examples)
    )
    store = open_store(replace(photos, examples=examples, is_multilabel=True), SMALL)
    plain = list(batches_of(store).epoch(1))
    for (_, rows), (_, mixed) in zip(plain, batches_of(store, mix=(0.8, 0)).epoch(1), strict=True):
        assert torch.allclose(mixed[:, 3], torch.ones(len(rows)))
        moved = (rows != rows.roll(1, 0)).any(dim=1)
        shares = [
            float((m - n)[(r != n).nonzero()[0]] / (r - n)[(r != n).nonzero()[0]])
            for r, n, m in zip(rows[moved], rows.roll(1, 0)[moved], mixed[moved], strict=True)
        ]
        assert max(shares) - min(shares) < 1e-5
        assert 0 < shares[0] < 1


@pytest.mark.parametrize(
    ("batch_size", "wanted"),
    [(4, [4, 4, 5]), (6, [6, 7]), (12, [13]), (5, [5, 5, 3]), (1, [1] * 13)],
)
def test_a_last_single_example_joins_the_batch_before_it(
    batch_size: int, wanted: list[int], stores: dict[str, Store]
) -> None:
    batches = batches_of(stores["stored"], augment="none", batch_size=batch_size)
    assert [len(labels) for _, labels in batches.epoch(1)] == wanted
    assert len(batches) == len(wanted)


# --- Own transforms -------------------------------------------------------------------------------

OWN = """
import random
import numpy as np
import torch

class Blocks:
    def __init__(self, size):
        self.size = size
        self.unpicklable = lambda: None

    def __call__(self, image):
        out = image[:, : self.size, : self.size].clone()
        out[0] = random.randrange(256)
        out[1] = int(np.random.randint(256))
        out[2] = int(torch.randint(256, ()))
        return out

def build(size):
    return Blocks(size)

def unseeded(size):
    own = np.random.default_rng()
    return lambda image: torch.full((3, size, size), int(own.integers(256)), dtype=torch.uint8)

def floating(size):
    return lambda image: image[:, :size, :size].float()

def wrong_size(size):
    return lambda image: image[:, : size - 1, :size]

def failing(size):
    def transform(image):
        raise IndexError("no such pixel")
    return transform

def no_transform(size):
    return 3
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "own_views.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "own_views", raising=False)
    return tmp_path / "own_views.py"


def colours(seed: int) -> list[int]:
    """What `Blocks` draws, from generators that are seeded here."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    return [random.randrange(256), int(np.random.randint(256)), int(torch.randint(256, ()))]


def drawn_colours(batches: Batches, epoch: int) -> list[list[int]]:
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (SMALL.mean, SMALL.std))
    return [
        ((image * std + mean) * 255).round().int()[:, 5, 5].tolist()
        for images, _ in batches.epoch(epoch)
        for image in images
    ]


def workers_of(batches: Batches) -> list[psutil.Process]:
    """The processes that make its batches, as torch's DataLoader knows them."""
    return [psutil.Process(w.pid) for w in batches._loader._iterator._workers]


def test_an_own_transform_draws_by_the_examples_seed_here_and_in_workers_that_end_with_it(
    own: Path, stores: dict[str, Store]
) -> None:
    store = stores["stored"]
    draw = Shuffled(store, config_of(), 3).draw(2)
    seeds = view_seeds(3, 2, 18)
    wanted = [colours(int(seeds[index])) for index in draw.indices]
    here = batches_of(store, augment="own_views:build")
    before = random_states()
    assert drawn_colours(here, 2) == wanted
    assert random_states() == before

    away = batches_of(store, augment="own_views:build", workers=2)
    assert drawn_colours(away, 2) == wanted
    workers = workers_of(away)
    assert len(workers) == 2
    assert all(worker.is_running() for worker in workers)
    del away
    gc.collect()
    assert psutil.wait_procs(workers, timeout=30)[1] == []


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("unseeded", "it returned two different images for one seed"),
        ("floating", r"it must return uint8 \(3, 32, 32\), and returned torch.float32"),
        ("wrong_size", r"it must return uint8 \(3, 32, 32\), and returned torch.uint8 \(3, 31, 32"),
        ("failing", "trying it on an image failed: IndexError: no such pixel"),
        ("no_transform", "it must return a transform, and returned int"),
        ("missing", "own_views has no missing"),
    ],
)
def test_an_own_transform_that_cannot_be_used_is_told_before_the_training(
    name: str, told: str, own: Path
) -> None:
    (mistake,) = check_augment(f"own_views:{name}", 32)
    assert mistake.startswith(f"augment 'own_views:{name}': ")
    with pytest.raises(AssertionError, match=told):
        raise AssertionError(mistake)


def test_an_own_transform_that_can_be_used_is_no_mistake_and_draws_nothing_here(own: Path) -> None:
    before = random_states()
    assert check_augment("own_views:build", 32) == []
    assert random_states() == before
    assert check_augment("strong", 32) == []


def test_a_view_without_a_seed_is_the_one_without_a_draw() -> None:
    image = torch.arange(3 * 40 * 48, dtype=torch.uint8).view(3, 40, 48)
    view = training_view("strong", SMALL)
    assert torch.equal(draw_view(view, image, 9), draw_view(view, image, 9))
    assert torch.equal(draw_view(evaluation_view(SMALL), image, None), image[:, 4:36, 8:40])
    with pytest.raises(ConfigError, match="nowhere"):
        training_view("nowhere:build", SMALL)


# --- Errors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 1])
def test_a_file_that_goes_while_it_is_streamed_is_named(
    workers: int, photos: ImageSet, tmp_path: Path
) -> None:
    for example in photos.examples:
        (tmp_path / example.path).write_bytes((photos.root / example.path).read_bytes())
    store = open_store(replace(photos, root=tmp_path), SMALL, budget=0)
    (tmp_path / "05.jpg").unlink()
    with pytest.raises(DataError) as caught:
        list(batches_of(store, workers=workers).epoch(1))
    assert str(caught.value) == f"{tmp_path}/05.jpg cannot be read: No such file or directory"


def test_each_batch_is_its_own_and_may_be_written_to(stores: dict[str, Store]) -> None:
    batches = batches_of(stores["stored"])
    wanted = [(images.clone(), labels.clone()) for images, labels in batches.epoch(1)]
    for images, labels in batches.epoch(1):
        images.zero_(), labels.zero_()
    assert are_same(list(batches.epoch(1)), wanted)


def as_kept(tensor: Tensor) -> SimpleNamespace:
    return SimpleNamespace(shape=tensor.shape, dtype=tensor.dtype)


@pytest.mark.parametrize("place", ["stored", "streamed"])
def test_batches_of_workers_have_the_shape_and_type_of_those_made_here(
    place: str, by_workers: dict[str, Batches], stores: dict[str, Store]
) -> None:
    here = batches_of(stores[place], mix=MIX_OF[place])
    for a, b in zip(here.epoch(3), by_workers[place].epoch(3), strict=True):
        assert [as_kept(t) for t in a] == [as_kept(t) for t in b]
        assert b[0].is_contiguous()
