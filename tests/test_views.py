from collections import Counter
from collections.abc import Iterator
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor
from torchvision.transforms import v2

from tests.states import config_of
from tuneapp.config import AUGMENTS
from tuneapp.data.batches import Batch, Batches
from tuneapp.data.pixels import Preprocessing
from tuneapp.data.sampling import InOrder, Shuffled, epoch_order, view_seeds
from tuneapp.data.views import evaluation_view, mixing, training_view

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.5)
SMALL = Preprocessing(40, 32, "bilinear", MEAN, STD)
TRAIN = [0, 1, 3, 4, 5, 7, 8, 9, 10]
VAL = [2, 6, 11]


def noisy(index: int, height: int = 40, width: int = 48) -> Tensor:
    pixels = np.random.default_rng(index).integers(0, 256, (3, height, width), dtype=np.uint8)
    return torch.from_numpy(pixels)


def store_of(*, same_image: bool = False) -> SimpleNamespace:
    """Twelve images in memory, whose labels are their indices."""
    return SimpleNamespace(
        labels=torch.arange(len(TRAIN) + len(VAL)),
        weights=np.ones(len(TRAIN) + len(VAL)),
        indices=lambda split: np.array({"train": TRAIN, "val": VAL}[split]),
        pixels=SimpleNamespace(image=lambda index: noisy(0 if same_image else index)),
    )


def batches_of(
    *,
    batch_size: int = 4,
    seed: int | None = 0,
    split: str = "train",
    augment: str = "standard",
    same_image: bool = False,
    mix: tuple[float, float] = (0.0, 0.0),
    channels_last: bool = False,
) -> Batches:
    """Batches of some of the twelve; `mix` are the alphas of mixup and of cutmix."""
    store = store_of(same_image=same_image)
    view = evaluation_view(SMALL) if seed is None else training_view(augment, SMALL)
    return Batches(
        store,
        InOrder(store, split) if seed is None else Shuffled(store, config_of(), seed),
        view=view,
        preprocessing=SMALL,
        batch_size=batch_size,
        device=torch.device("cpu"),
        join_single=seed is not None,
        mix=mixing(*mix, num_classes=12),
        mix_seed=seed or 0,
        channels_last=channels_last,
    )


def by_index(batches: Iterator[Batch]) -> dict[int, Tensor]:
    return {
        int(label): image
        for images, labels in batches
        for image, label in zip(images, labels, strict=True)
    }


def are_equal(a: dict[int, Tensor], b: dict[int, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[i], b[i]) for i in a)


# --- Keyed draws ----------------------------------------------------------------------------------


def test_the_view_of_an_example_is_the_one_that_its_own_seed_draws() -> None:
    got = by_index(batches_of(seed=7).epoch(3))
    seeds = view_seeds(7, 3, 12)
    view = training_view("standard", SMALL)
    for index in TRAIN:
        torch.manual_seed(int(seeds[index]))
        drawn = view(noisy(index)).double() / 255
        wanted = (drawn - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
        assert torch.allclose(got[index].double(), wanted, atol=1e-6)


@pytest.mark.parametrize("batch_size", [1, 3, 8, 100])
def test_the_batch_size_changes_no_view(batch_size: int) -> None:
    wanted = by_index(batches_of(batch_size=4).epoch(2))
    assert are_equal(by_index(batches_of(batch_size=batch_size).epoch(2)), wanted)


def test_what_was_drawn_before_changes_no_view() -> None:
    wanted = list(batches_of().epoch(3))
    torch.manual_seed(123)
    torch.rand(10)
    batches = batches_of()
    for epoch in (1, 5):
        list(batches.epoch(epoch))
    next(batches.epoch(2))  # an epoch that is given up after its first batch
    got = list(batches.epoch(3))
    for (images, labels), (wanted_images, wanted_labels) in zip(got, wanted, strict=True):
        assert torch.equal(images, wanted_images)
        assert torch.equal(labels, wanted_labels)


def test_draws_between_two_batches_change_no_view() -> None:
    wanted = by_index(batches_of().epoch(1))
    got = {}
    for images, labels in batches_of().epoch(1):
        torch.rand(7)  # as dropout does
        got |= dict(zip(labels.tolist(), images, strict=True))
    assert are_equal(got, wanted)


def test_the_trainings_own_random_state_is_untouched_by_drawing_views() -> None:
    torch.manual_seed(11)
    state = torch.get_rng_state()
    for _ in batches_of().epoch(1):
        assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(torch.get_rng_state(), state)


def test_epochs_seeds_and_examples_have_views_of_their_own() -> None:
    # With the same image everywhere, views can only differ by what they are keyed with.
    views = [
        image
        for seed, epoch in ((0, 1), (0, 2), (1, 1), (1, 0))
        for image in by_index(batches_of(seed=seed, same_image=True).epoch(epoch)).values()
    ]
    assert len({view.numpy().tobytes() for view in views}) == 4 * len(TRAIN)


def test_an_example_keeps_its_seed_when_the_set_grows() -> None:
    assert view_seeds(3, 5, 10).tolist() == view_seeds(3, 5, 10_000)[:10].tolist()


def test_view_seeds_are_keyed_by_seed_and_epoch() -> None:
    keys = [(0, 0), (0, 1), (1, 0), (1, 1), (0, 2), (2, 0)]
    seeds = [seed for key in keys for seed in view_seeds(*key, 50).tolist()]
    assert len(set(seeds)) == len(seeds)
    assert min(seeds) >= 0


@pytest.mark.parametrize("count", [1, 2, 17, 1000])
def test_the_order_of_an_epoch_is_a_permutation(count: int) -> None:
    assert sorted(epoch_order(0, 1, count).tolist()) == list(range(count))


def test_the_order_is_keyed_by_seed_and_epoch() -> None:
    keys = [(0, 1), (0, 2), (1, 1), (1, 2), (2, 1)]
    assert len({tuple(epoch_order(*key, 50).tolist()) for key in keys}) == len(keys)
    assert epoch_order(1, 2, 50).tolist() == epoch_order(1, 2, 50).tolist()


@pytest.mark.parametrize("batch_size", [1, 3, 8, 100])
def test_the_batch_size_does_not_change_the_order(batch_size: int) -> None:
    def order(size: int) -> list[int]:
        return [i for _, labels in batches_of(batch_size=size).epoch(4) for i in labels.tolist()]

    assert order(batch_size) == order(4)
    assert order(batch_size) == [TRAIN[i] for i in epoch_order(0, 4, len(TRAIN))]


# --- Transforms -----------------------------------------------------------------------------------


def test_without_augmentation_a_view_is_the_evaluation_view() -> None:
    trained = by_index(batches_of(augment="none").epoch(1))
    for index in TRAIN:
        centre = noisy(index)[:, 4:36, 8:40].double() / 255  # 32 of 40 x 48 pixels
        wanted = (centre - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
        assert torch.allclose(trained[index].double(), wanted, atol=1e-6)
        assert torch.equal(evaluation_view(SMALL)(noisy(index)), noisy(index)[:, 4:36, 8:40])


def ramp() -> Tensor:
    """An image that says where it is: red grows to the right, green grows downwards."""
    line = torch.arange(200, dtype=torch.uint8)
    across, down = line.expand(200, 200), line.view(200, 1).expand(200, 200)
    return torch.stack([across, down, torch.zeros(200, 200, dtype=torch.uint8)])


def drawn_from_ramp(augment: str) -> list[Tensor]:
    view = training_view(augment, SMALL)
    torch.manual_seed(0)
    return [view(ramp()).double() for _ in range(200)]


def is_mirrored(view: Tensor) -> bool:
    return bool(view[0, :, 0].mean() > view[0, :, -1].mean())


def area_share(view: Tensor) -> float:
    """Share of the ramp's area that was cropped; 32 pixel centres span 31 steps of the crop."""
    width = float((view[0, 16, -1] - view[0, 16, 0]).abs()) * 32 / 31
    height = float(view[1, -1, 16] - view[1, 0, 16]) * 32 / 31
    return width * height / 200**2


@pytest.mark.parametrize(
    ("augment", "least", "most"), [("none", 0, 0), ("light", 0, 0), ("standard", 75, 125)]
)
def test_only_standard_views_are_mirrored_and_half_of_them(
    augment: str, least: int, most: int
) -> None:
    # 75 to 125 of 200 fair coins: all but 4 in 10,000 draws, and the seed is fixed.
    assert least <= sum(map(is_mirrored, drawn_from_ramp(augment))) <= most


@pytest.mark.parametrize(("augment", "smallest"), [("light", 0.8), ("standard", 0.35)])
def test_crops_cover_the_area_that_the_configuration_promises(
    augment: str, smallest: float
) -> None:
    shares = [area_share(view) for view in drawn_from_ramp(augment)]
    # Antialiasing and whole pixels blur the edges by a few percent.
    assert smallest - 0.04 <= min(shares) <= smallest + 0.1
    assert 0.9 <= max(shares) <= 1.02


# --- Batches --------------------------------------------------------------------------------------


@pytest.mark.parametrize("augment", AUGMENTS)
def test_batches_are_normalised_floats_of_the_crop_size(augment: str) -> None:
    for images, labels in batches_of(augment=augment).epoch(1):
        assert images.shape == (len(labels), 3, 32, 32)
        assert (images.dtype, labels.dtype) == (torch.float32, torch.int64)
        # From 0 and 1 as the mean and the deviation of each channel make them.
        for channel in range(3):
            low, high = -MEAN[channel] / STD[channel], (1 - MEAN[channel]) / STD[channel]
            values = images[:, channel]
            assert low - 1e-5 <= values.min() < low + 0.3 * (high - low)
            assert high + 1e-5 >= values.max() > high - 0.3 * (high - low)


@pytest.mark.parametrize("batch_size", [1, 2, 4, 8, 9, 50])
@pytest.mark.parametrize(("split", "seed"), [("train", 0), ("train", None), ("val", None)])
def test_each_example_comes_exactly_once(batch_size: int, split: str, seed: int | None) -> None:
    batches = batches_of(batch_size=batch_size, split=split, seed=seed)
    seen = [i for _, labels in batches.epoch(1) for i in labels.tolist()]
    assert Counter(seen) == Counter(TRAIN if split == "train" else VAL)
    assert batches.num_examples == len(seen)


def test_evaluation_keeps_the_order_of_the_store() -> None:
    batches = batches_of(seed=None, batch_size=2, split="val")
    assert [labels.tolist() for _, labels in batches.epoch(1)] == [[2, 6], [11]]


def sizes_of(count: int, batch_size: int, seed: int | None) -> list[int]:
    store = store_of()
    store.indices = lambda split: np.arange(count)
    store.labels = torch.arange(count)
    store.weights = np.ones(count)
    batches = Batches(
        store,
        InOrder(store, "train") if seed is None else Shuffled(store, config_of(), seed),
        view=evaluation_view(SMALL),
        preprocessing=SMALL,
        batch_size=batch_size,
        device=torch.device("cpu"),
        join_single=seed is not None,
    )
    sizes = [len(labels) for _, labels in batches.epoch(1)]
    assert len(batches) == len(sizes)
    return sizes


@pytest.mark.parametrize(
    ("count", "batch_size", "training", "evaluating"),
    [
        (9, 4, [4, 5], [4, 4, 1]),
        (5, 4, [5], [4, 1]),
        (10, 4, [4, 4, 2], [4, 4, 2]),
        (8, 4, [4, 4], [4, 4]),
        (3, 8, [3], [3]),
        (1, 4, [1], [1]),
    ],
)
def test_one_leftover_example_joins_the_last_batch_in_training_and_never_in_evaluation(
    count: int, batch_size: int, training: list[int], evaluating: list[int]
) -> None:
    assert sizes_of(count, batch_size, seed=0) == training
    assert sizes_of(count, batch_size, seed=None) == evaluating


# --- Mixing ---------------------------------------------------------------------------------------

MIXES = {"mixup": (0.8, 0.0), "cutmix": (0.0, 1.0), "both": (0.8, 1.0)}
every_mix = pytest.mark.parametrize("mix", MIXES.values(), ids=MIXES.keys())


def are_same(a: list[Batch], b: list[Batch]) -> bool:
    pairs = zip(a, b, strict=True)
    return all(torch.equal(x, y) and torch.equal(s, t) for (x, s), (y, t) in pairs)


def share_of_own(labels: Tensor, plain: Tensor) -> float:
    """The share that each image of a batch keeps of itself: one for the whole batch."""
    own = labels[torch.arange(len(plain)), plain]
    assert float(own.max() - own.min()) < 1e-6
    return float(own[0])


def test_without_alphas_nothing_is_mixed() -> None:
    assert mixing(0.0, 0.0, num_classes=12) is None
    assert all(labels.dtype == torch.int64 for _, labels in batches_of().epoch(1))


@every_mix
def test_mixed_labels_are_shares_of_an_example_and_of_its_neighbour(
    mix: tuple[float, float],
) -> None:
    # The views and their order are those of the batches that are not mixed.
    plain = list(batches_of().epoch(2))
    mixed = list(batches_of(mix=mix).epoch(2))
    for (_, labels), (images, shares) in zip(plain, mixed, strict=True):
        assert (shares.dtype, shares.shape) == (torch.float32, (len(labels), 12))
        assert images.shape == (len(labels), 3, 32, 32)
        assert torch.allclose(shares.sum(dim=1), torch.ones(len(labels)), atol=1e-6)
        share = share_of_own(shares, labels)
        wanted = torch.zeros(len(labels), 12)
        for row, (own, neighbour) in enumerate(zip(labels, labels.roll(1), strict=True)):
            wanted[row, own] += share
            wanted[row, neighbour] += 1 - share
        assert torch.allclose(shares, wanted, atol=1e-6)
    assert any(share_of_own(s, p[1]) < 0.99 for p, (_, s) in zip(plain, mixed, strict=True))


def test_a_mixup_batch_is_the_blend_of_each_image_with_its_neighbour() -> None:
    for (images, labels), (blended, shares) in zip(
        batches_of().epoch(2), batches_of(mix=(0.8, 0.0)).epoch(2), strict=True
    ):
        share = share_of_own(shares, labels)
        neighbours = torch.stack([images[i - 1] for i in range(len(images))])
        wanted = share * images.double() + (1 - share) * neighbours.double()
        assert torch.allclose(blended.double(), wanted, atol=1e-5)


def test_a_cutmix_batch_has_a_rectangle_of_the_neighbour_as_large_as_its_label_says() -> None:
    areas = []
    for epoch in range(1, 9):
        for (images, labels), (cut, shares) in zip(
            batches_of().epoch(epoch), batches_of(mix=(0.0, 1.0)).epoch(epoch), strict=True
        ):
            neighbours = images.roll(1, 0)
            is_own = (cut == images).all(dim=1)
            is_neighbours = (cut == neighbours).all(dim=1)
            assert bool((is_own | is_neighbours).all())
            # The same rectangle in all images: its rows by its columns are its pixels.
            pasted = ~is_own[0]
            assert all(torch.equal(~own, pasted) for own in is_own)
            area = int(pasted.any(dim=1).sum()) * int(pasted.any(dim=0).sum())
            assert area == int(pasted.sum())
            assert share_of_own(shares, labels) == pytest.approx(1 - area / 32**2, abs=1e-6)
            areas.append(area)
    assert len(set(areas)) > 8


@pytest.mark.parametrize("position", [0, 1])
def test_alpha_says_how_much_is_mixed(position: int) -> None:
    def kept(alpha: float) -> list[float]:
        """The share that each batch keeps of itself."""
        mix = (alpha, 0.0) if position == 0 else (0.0, alpha)
        epochs = range(1, 21)
        return [
            share_of_own(mixed, labels)
            for epoch in epochs
            for (_, labels), (_, mixed) in zip(
                batches_of(batch_size=3).epoch(epoch),
                batches_of(batch_size=3, mix=mix).epoch(epoch),
                strict=True,
            )
        ]

    # A beta distribution with two large parameters is narrow around a half; with small ones, most
    # of it lies at the ends. (At the border of the image, a rectangle is cut off: more is kept.)
    assert min(kept(1000.0)) > 0.45
    few = kept(0.05)
    assert sum(share > 0.98 for share in few) > 0.3 * len(few)


def test_with_both_each_has_its_own_alpha() -> None:
    mixup, cutmix = mixing(0.2, 0.7, num_classes=12).transforms
    assert (type(mixup), mixup.alpha) == (v2.MixUp, 0.2)
    assert (type(cutmix), cutmix.alpha) == (v2.CutMix, 0.7)


def test_with_both_each_batch_is_mixed_one_way_or_the_other() -> None:
    kinds = Counter()
    for epoch in range(1, 31):
        for (images, _), (mixed, _) in zip(
            batches_of(batch_size=3).epoch(epoch),
            batches_of(batch_size=3, mix=(0.8, 1.0)).epoch(epoch),
            strict=True,
        ):
            is_cut = ((mixed == images) | (mixed == images.roll(1, 0))).all()
            kinds["cutmix" if is_cut else "mixup"] += 1
    # 90 fair coins: fewer than 25 of a kind in 1 of 100,000 draws, and the seed is fixed.
    assert min(kinds["cutmix"], kinds["mixup"]) >= 25


@every_mix
def test_how_a_batch_is_mixed_does_not_depend_on_what_was_drawn_before(
    mix: tuple[float, float],
) -> None:
    torch.manual_seed(1)
    wanted = list(batches_of(mix=mix).epoch(3))
    torch.manual_seed(123)
    torch.rand(10)
    batches = batches_of(mix=mix)
    list(batches.epoch(1))
    next(batches.epoch(2))  # an epoch that is given up after its first batch
    got = []
    for batch in batches.epoch(3):
        torch.rand(7)  # as dropout does
        got.append(batch)
    assert are_same(got, wanted)


@every_mix
def test_the_trainings_own_random_state_is_untouched_by_mixing(mix: tuple[float, float]) -> None:
    torch.manual_seed(11)
    state = torch.get_rng_state()
    for _ in batches_of(mix=mix, augment="none").epoch(1):
        assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(torch.get_rng_state(), state)


@every_mix
def test_mixing_is_keyed_by_seed_epoch_and_number_of_the_batch(mix: tuple[float, float]) -> None:
    draws = []
    for seed, epoch in ((0, 1), (0, 2), (1, 1), (1, 2), (2, 1)):
        plain = batches_of(seed=seed, batch_size=3).epoch(epoch)
        mixed = batches_of(seed=seed, batch_size=3, mix=mix).epoch(epoch)
        for (images, labels), (blended, shares) in zip(plain, mixed, strict=True):
            # A rectangle of a few places may be as large as another one; where it is differs.
            changed = (blended != images).any(dim=1)[0]
            draws.append((share_of_own(shares, labels), changed.numpy().tobytes()))
    assert len(draws) == 15
    assert len(set(draws)) == 15


@every_mix
def test_a_batch_is_mixed_alike_whatever_its_size(mix: tuple[float, float]) -> None:
    def first_share(batch_size: int) -> float:
        (_, labels), *_ = batches_of(batch_size=batch_size).epoch(1)
        (_, shares), *_ = batches_of(batch_size=batch_size, mix=mix).epoch(1)
        return share_of_own(shares, labels)

    assert len({first_share(size) for size in (2, 4, 9)}) == 1


# --- Memory format --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("seed", "mix"), [(None, (0.0, 0.0)), (0, (0.0, 0.0)), *((0, mix) for mix in MIXES.values())]
)
def test_channels_last_changes_the_layout_and_no_number(
    seed: int | None, mix: tuple[float, float]
) -> None:
    plain = list(batches_of(seed=seed, mix=mix).epoch(1))
    other = list(batches_of(seed=seed, mix=mix, channels_last=True).epoch(1))
    assert are_same(other, plain)
    for (a, _), (b, _) in zip(plain, other, strict=True):
        assert a.is_contiguous()
        assert b.is_contiguous(memory_format=torch.channels_last)
        assert not b.is_contiguous()
