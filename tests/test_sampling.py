from collections import Counter
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from tests.states import config_of
from tuneapp.config import TrialConfig
from tuneapp.data.sampling import (
    Draw,
    InOrder,
    Shuffled,
    batch_seed,
    num_batches,
    repeated,
    view_seeds,
)
from tuneapp.errors import ConfigError

# Twelve training examples of three classes (7, 3 and 2 of them), then three for validation.
LABELS = [0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 2, 2, 0, 1, 2]
TRAIN = list(range(12))


def store_of(
    labels: Any = LABELS, weights: Any = None, bad: tuple[int, ...] = (), num_val: int = 3
) -> SimpleNamespace:
    labels = torch.as_tensor(labels)
    is_bad = np.zeros(len(labels), dtype=bool)
    is_bad[list(bad)] = True
    first_val = len(labels) - num_val
    of = {"train": np.arange(first_val), "val": np.arange(first_val, len(labels))}
    return SimpleNamespace(
        labels=labels,
        weights=np.ones(len(labels)) if weights is None else np.asarray(weights, dtype=float),
        indices=lambda split: of[split][~is_bad[of[split]]],
        bad_indices=lambda split: of[split][is_bad[of[split]]],
    )


def asked(sampling: str = "shuffle", **values: Any) -> TrialConfig:
    return config_of(sampling=sampling, **values)


def same(a: Draw, b: Draw) -> bool:
    return a.indices.tolist() == b.indices.tolist() and a.seeds.tolist() == b.seeds.tolist()


WEIGHTS = [1, 2, 3, 0, 1, 5, 1, 1, 1, 4, 1, 2, 9, 9, 9]
KINDS: dict[str, TrialConfig] = {
    "shuffle": asked(),
    "balanced": asked("balanced"),
    "balanced, more": asked("balanced", num_samples=50),
    "balanced, each once": asked("balanced", replacement=False),
    "weighted": asked("weighted"),
    "weighted, each once": asked("weighted", replacement=False, num_samples=8),
}
every_kind = pytest.mark.parametrize("config", KINDS.values(), ids=KINDS)


def drawn(config: TrialConfig, seed: int, epoch: int, **values: Any) -> Draw:
    return Shuffled(store_of(weights=WEIGHTS, **values), config, seed).draw(epoch)


# --- Keyed ----------------------------------------------------------------------------------------


@every_kind
def test_an_epoch_is_drawn_from_its_seed_and_number_alone(config: TrialConfig) -> None:
    sampler = Shuffled(store_of(weights=WEIGHTS), config, 7)
    for epoch in (5, 1, 2):
        sampler.draw(epoch)
    np.random.seed(1)
    torch.manual_seed(1)
    assert same(sampler.draw(3), drawn(config, 7, 3))
    assert same(sampler.draw(5), drawn(config, 7, 5))


@every_kind
def test_another_seed_or_epoch_draws_something_else(config: TrialConfig) -> None:
    keys = [(0, 1), (0, 2), (1, 1), (1, 2), (2, 1)]
    draws = [drawn(config, *key) for key in keys]
    assert len({tuple(d.indices.tolist()) for d in draws}) == len(keys)
    seeds = [seed for d in draws for seed in d.seeds.tolist()]
    assert len(set(seeds)) == len(seeds)


@every_kind
def test_drawing_leaves_the_global_generators_alone(config: TrialConfig) -> None:
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()
    drawn(config, 3, 1)
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert np.array_equal(np.random.get_state()[1], numpy_state)


@every_kind
def test_validation_examples_are_never_drawn(config: TrialConfig) -> None:
    for epoch in range(1, 30):
        assert set(drawn(config, 0, epoch).indices.tolist()) <= set(TRAIN)


@every_kind
def test_the_first_time_that_an_example_comes_its_view_has_the_examples_own_seed(
    config: TrialConfig,
) -> None:
    draw = drawn(config, 4, 2)
    own = view_seeds(4, 2, 1000)
    first = {}
    for index, seed in zip(draw.indices.tolist(), draw.seeds.tolist(), strict=True):
        first.setdefault(index, seed)
    assert first == {index: int(own[index]) for index in first}


def test_each_time_that_an_example_comes_in_an_epoch_its_view_has_another_seed() -> None:
    draw = drawn(asked("balanced", num_samples=200), 0, 1)
    assert max(Counter(draw.indices.tolist()).values()) > 5
    assert len(set(draw.seeds.tolist())) == 200


def test_a_batch_is_mixed_by_seed_epoch_and_number() -> None:
    keys = [(s, e, n) for s in range(3) for e in range(1, 4) for n in range(4)]
    assert len({batch_seed(*key) for key in keys}) == len(keys)
    assert batch_seed(1, 2, 3) == batch_seed(1, 2, 3)


# --- In order, shuffled ---------------------------------------------------------------------------


def test_in_order_is_the_readable_examples_without_a_draw() -> None:
    sampler = InOrder(store_of(bad=(13,)), "val")
    for epoch in (1, 2):
        draw = sampler.draw(epoch)
        assert draw.indices.tolist() == [12, 14]
        assert draw.seeds is None
    assert sampler.num_examples == 2


def test_shuffled_is_each_readable_example_once() -> None:
    sampler = Shuffled(store_of(bad=(3, 8)), asked(), 0)
    wanted = sorted(set(TRAIN) - {3, 8})
    for epoch in range(1, 4):
        draw = sampler.draw(epoch)
        assert sorted(draw.indices.tolist()) == wanted
        assert draw.indices.tolist() != wanted
    assert sampler.num_examples == 10


def test_an_unreadable_example_changes_no_seed_of_another() -> None:
    clean, broken = drawn(asked(), 0, 1), drawn(asked(), 0, 1, bad=(3,))
    seeds = dict(zip(clean.indices.tolist(), clean.seeds.tolist(), strict=True))
    del seeds[3]
    assert dict(zip(broken.indices.tolist(), broken.seeds.tolist(), strict=True)) == seeds


# --- Balanced, weighted ---------------------------------------------------------------------------


def frequencies(config: TrialConfig, store: SimpleNamespace, epochs: int) -> Counter[int]:
    sampler = Shuffled(store, config, 11)
    return Counter(i for epoch in range(1, epochs + 1) for i in sampler.draw(epoch).indices)


def chi_square(found: Counter[int], shares: dict[int, float]) -> float:
    """Pearson's statistic; its mean is the number of shares less one."""
    total = sum(found.values())
    return sum((found[i] - total * s) ** 2 / (total * s) for i, s in shares.items())


def test_balanced_draws_every_class_as_often_and_its_examples_alike() -> None:
    found = frequencies(asked("balanced"), store_of(), 500)
    assert sum(found.values()) == 500 * 12
    counts = {0: 7, 1: 3, 2: 2}
    shares = {i: 1 / 3 / counts[LABELS[i]] for i in TRAIN}
    # Of chi-square with 11 degrees of freedom, 99.99 % is below 38; the seed is fixed.
    assert chi_square(found, shares) < 38


def test_balanced_without_replacement_is_as_many_of_each_class_as_of_the_rarest() -> None:
    sampler = Shuffled(store_of(), asked("balanced", replacement=False), 0)
    assert sampler.num_examples == 6
    seen: Counter[int] = Counter()
    orders = set()
    for epoch in range(1, 101):
        indices = sampler.draw(epoch).indices.tolist()
        assert len(set(indices)) == 6
        assert Counter(LABELS[i] for i in indices) == {0: 2, 1: 2, 2: 2}
        orders.add(tuple(LABELS[i] for i in indices))
        seen.update(indices)
    assert set(seen) == set(TRAIN)
    assert seen[10] == seen[11] == 100
    assert len(orders) > 20  # the classes do not come one after the other


def test_balanced_counts_the_readable_examples_only() -> None:
    sampler = Shuffled(store_of(bad=(7,)), asked("balanced", replacement=False), 0)
    assert Counter(LABELS[i] for i in sampler.draw(1).indices) == {0: 2, 1: 2, 2: 2}
    sampler = Shuffled(store_of(bad=(11,)), asked("balanced", replacement=False), 0)
    assert sampler.num_examples == 3


def test_weighted_draws_examples_as_often_as_their_weights_say() -> None:
    found = frequencies(asked("weighted"), store_of(weights=WEIGHTS), 500)
    assert sum(found.values()) == 500 * 12
    total = sum(WEIGHTS[:12])
    shares = {i: WEIGHTS[i] / total for i in TRAIN if WEIGHTS[i]}
    assert found[3] == 0  # its weight is zero
    assert chi_square(found, shares) < 38


def test_weighted_without_replacement_draws_no_example_twice_and_none_of_weight_zero() -> None:
    store = store_of(weights=[0.0, 1000.0] + [1.0] * 10 + [1.0] * 3)
    sampler = Shuffled(store, asked("weighted", replacement=False, num_samples=4), 0)
    draws = [sampler.draw(epoch).indices.tolist() for epoch in range(1, 101)]
    assert {len(set(d)) for d in draws} == {4}
    assert all(0 not in d for d in draws)
    assert sum(1 in d for d in draws) >= 99


@pytest.mark.parametrize(("asked_for", "wanted"), [(None, 12), (5, 5), (40, 40)])
@pytest.mark.parametrize("sampling", ["balanced", "weighted"])
def test_an_epoch_has_as_many_examples_as_asked(
    sampling: str, asked_for: int | None, wanted: int
) -> None:
    config = asked(sampling, num_samples=asked_for)
    sampler = Shuffled(store_of(weights=WEIGHTS), config, 0)
    assert sampler.num_examples == wanted
    draw = sampler.draw(1)
    assert len(draw.indices) == len(draw.seeds) == wanted


def test_weighting_without_weights_that_differ_is_refused() -> None:
    for weights in (None, [2.0] * 12 + [1.0, 5.0, 1.0]):
        with pytest.raises(ConfigError, match=r"sampling='weighted' needs weights that differ"):
            Shuffled(store_of(weights=weights), asked("weighted"), 0)


@pytest.mark.parametrize("number", [12, 11])
def test_more_examples_than_can_be_drawn_once_are_refused(number: int) -> None:
    store = store_of(weights=WEIGHTS)  # one of the twelve has the weight zero
    config = asked("weighted", replacement=False, num_samples=number)
    if number == 11:
        assert sorted(Shuffled(store, config, 0).draw(1).indices) == [0, 1, 2, *range(4, 12)]
        return
    with pytest.raises(ConfigError, match=r"num_samples=12 without replacement: there are 11 "):
        Shuffled(store, config, 0)


# --- Substitutes ----------------------------------------------------------------------------------


def test_in_the_place_of_each_unreadable_example_comes_a_readable_one_of_its_class() -> None:
    store = store_of(bad=(2, 7, 8))
    sampler = Shuffled(store, asked(), 0, substitute=True)
    assert sampler.num_examples == 12
    substitutes: dict[int, set[int]] = {2: set(), 7: set(), 8: set()}
    for epoch in range(1, 60):
        # The same order with nothing broken says whose place is whose.
        places = Shuffled(store_of(), asked(), 0).draw(epoch)
        draw = sampler.draw(epoch)
        assert draw.seeds.tolist() == places.seeds.tolist()
        for got, place in zip(draw.indices.tolist(), places.indices.tolist(), strict=True):
            if place in substitutes:
                substitutes[place].add(got)
            else:
                assert got == place
    assert substitutes == {2: {0, 1, 3, 4, 5, 6}, 7: {9}, 8: {9}}


def test_substitutes_are_keyed_by_seed_and_epoch() -> None:
    store = store_of(bad=(2, 3, 4))
    sampler = Shuffled(store, asked(), 5, substitute=True)
    sampler.draw(1)
    assert same(sampler.draw(9), Shuffled(store, asked(), 5, substitute=True).draw(9))
    counts = {tuple(sorted(sampler.draw(epoch).indices.tolist())) for epoch in range(1, 20)}
    assert len(counts) > 5


def test_a_substitute_does_not_get_the_view_of_the_example_itself() -> None:
    draw = Shuffled(store_of(bad=(7, 8)), asked(), 0, substitute=True).draw(1)
    assert draw.indices.tolist().count(9) == 3
    assert len(set(draw.seeds[draw.indices == 9].tolist())) == 3


def test_without_substitution_unreadable_examples_are_dropped() -> None:
    sampler = Shuffled(store_of(bad=(2, 7, 8)), asked(), 0)
    assert sorted(sampler.draw(1).indices) == [0, 1, 3, 4, 5, 6, 9, 10, 11]


def test_with_balanced_sampling_a_substituted_example_counts_in_its_class() -> None:
    store = store_of(bad=(11,))
    sampler = Shuffled(store, asked("balanced", replacement=False), 0, substitute=True)
    for epoch in range(1, 20):
        indices = sampler.draw(epoch).indices.tolist()
        assert Counter(LABELS[i] for i in indices) == {0: 2, 1: 2, 2: 2}
        assert indices.count(10) == 2
        assert 11 not in indices


def test_a_class_without_a_readable_example_has_no_substitute() -> None:
    sampler = Shuffled(store_of(bad=(10, 11)), asked(), 0, substitute=True)
    assert sorted(sampler.draw(1).indices) == list(range(10))


# --- Several labels -------------------------------------------------------------------------------

# Class 1 is rarer than class 0, class 2 the rarest; one example shows none.
SETS = [[1, 0, 0]] * 6 + [[1, 1, 0]] * 3 + [[1, 0, 1]] * 2 + [[0, 0, 0]] + [[1, 1, 1]]


def test_of_several_labels_the_rarest_one_is_balanced_and_none_is_a_class_of_its_own() -> None:
    store = store_of(torch.tensor(SETS, dtype=torch.float32), num_val=1)
    found = frequencies(asked("balanced"), store, 500)
    groups = [range(6), range(6, 9), range(9, 11), range(11, 12)]
    shares = {i: 1 / 4 / len(group) for group in groups for i in group}
    assert chi_square(found, shares) < 38
    few = Shuffled(store, asked("balanced", replacement=False), 0)
    assert few.num_examples == 4


def test_a_substitute_shows_all_the_labels_of_the_example_and_no_other() -> None:
    labels = torch.tensor(SETS, dtype=torch.float32)
    sampler = Shuffled(store_of(labels, bad=(7, 9, 11), num_val=1), asked(), 0, substitute=True)
    assert sampler.num_examples == 11  # nothing else shows what the last one shows
    places = Shuffled(store_of(labels, bad=(11,), num_val=1), asked(), 0)
    for epoch in range(1, 10):
        got, wanted = sampler.draw(epoch).indices, places.draw(epoch).indices
        assert torch.equal(labels[got], labels[wanted])
        assert not {7, 9, 11} & set(got.tolist())


def test_repeats_get_seeds_that_differ_and_do_not_depend_on_the_others() -> None:
    seeds = np.arange(1000, dtype=np.int64)
    drawn = [repeated(seeds, np.full(1000, times)) for times in range(20)]
    np.testing.assert_array_equal(drawn[0], seeds)
    every = np.concatenate(drawn)
    assert len(np.unique(every)) == len(every)
    assert every.min() >= 0
    mixed = np.arange(1000) % 3
    np.testing.assert_array_equal(
        repeated(seeds, mixed), [drawn[times][i] for i, times in enumerate(mixed)]
    )


# --- Batches --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("num_examples", "batch_size", "wanted"),
    [
        (12, 4, 3),
        (13, 4, 3),  # 4, 4, 5
        (14, 4, 4),  # 4, 4, 4, 2
        (15, 4, 4),
        (5, 4, 1),
        (4, 4, 1),
        (3, 4, 1),
        (1, 4, 1),  # there is none before it
        (3, 1, 3),
        (1, 1, 1),
        (0, 4, 0),
        (5, 2, 2),
    ],
)
def test_a_single_leftover_joins_the_batch_before_it(
    num_examples: int, batch_size: int, wanted: int
) -> None:
    assert num_batches(num_examples, batch_size) == wanted
