"""The examples of an epoch, their order, the seeds of their views, and the number of batches.

Every draw is a function of (seed, epoch, index of the example), and the order of an epoch is one of
(seed, epoch). Nothing depends on earlier draws: not on the batch size, the trial, the process, or
where a training was resumed.
"""

from collections import defaultdict
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from tuneapp.config import TrialConfig
from tuneapp.data.store import Store
from tuneapp.errors import ConfigError

Indices = npt.NDArray[np.intp]

# The purposes of draws: two purposes never share a stream.
_ORDER, _VIEW, _MIX, _SUBSTITUTE = 0, 1, 2, 3


class Draw(NamedTuple):
    """An epoch: its examples in order, and the seed of each one's view (None: no random view)."""

    indices: Indices
    seeds: npt.NDArray[np.int64] | None


def _stream(seed: int, *purpose: int) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, *purpose])))


def epoch_order(seed: int, epoch: int, count: int) -> Indices:
    """Return the order of `count` examples in this epoch."""
    return _stream(seed, _ORDER, epoch).permutation(count)


def view_seeds(seed: int, epoch: int, count: int) -> npt.NDArray[np.int64]:
    """Return a seed for the view of each of the first `count` examples of the store.

    A prefix of a longer list: example 7 has the same seed in a set of 10 and of 10,000.
    """
    return _stream(seed, _VIEW, epoch).integers(0, 2**63 - 1, size=count, dtype=np.int64)


def repeated(seeds: npt.NDArray[np.int64], repeats: Indices) -> npt.NDArray[np.int64]:
    """Return the seeds of examples that are drawn several times in an epoch.

    Source of the mixing: SplitMix64 (Steele et al., Fast splittable pseudorandom number generators,
    2014), whose outputs for different inputs differ.

    Args:
        seeds: of each example's first view.
        repeats: how often each came before; at 0 the seed stays as it is.
    """
    again = repeats > 0
    mixed = seeds[again].astype(np.uint64)
    mixed += repeats[again].astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed ^= mixed >> np.uint64(31)
    out = seeds.copy()
    out[again] = (mixed >> np.uint64(1)).astype(np.int64)
    return out


def batch_seed(seed: int, epoch: int, number: int) -> int:
    """Return the seed with which batch `number` of an epoch is mixed."""
    return int(np.random.SeedSequence([seed, _MIX, epoch, number]).generate_state(1)[0])


def num_batches(num_examples: int, batch_size: int) -> int:
    """Return the number of batches of a training epoch.

    A single leftover example joins the batch before it: BatchNorm cannot be trained on one example
    of which one pixel is left.
    """
    full, rest = divmod(num_examples, batch_size)
    joins = rest == 1 and full > 0
    return full + (rest > 0 and not joins)


class InOrder:
    """Every readable example of a split, in the order of the store, as it is."""

    def __init__(self, store: Store, split: str) -> None:
        self._indices = store.indices(split)

    @property
    def num_examples(self) -> int:
        """Examples of one epoch."""
        return len(self._indices)

    def draw(self, epoch: int) -> Draw:
        """Return the examples, the same in each epoch."""
        return Draw(self._indices, None)


class Shuffled:
    """The training examples of each epoch, as a configuration samples them."""

    def __init__(
        self, store: Store, config: TrialConfig, seed: int, substitute: bool = False
    ) -> None:
        """Sample the training split of `store`.

        Args:
            store: labels, weights, and which examples cannot be read.
            config: how to sample.
            seed: of the run.
            substitute: replace each unreadable example by another one of the same class.

        Raises:
            ConfigError: these examples cannot be sampled in this way.
        """
        self._seed = seed
        self._count = len(store.labels)
        self._others: dict[int, Indices] = {}
        self._indices = store.indices("train")
        if substitute:
            self._others = _others(store)
            added = np.fromiter(self._others, dtype=np.intp)
            self._indices = np.sort(np.concatenate([self._indices, added]))
        self._config = config
        self._classes = _rarest_classes(store, self._indices)
        self._weights = store.weights[self._indices]
        self.num_examples = self._num_examples()

    def _num_examples(self) -> int:
        config, available = self._config, len(self._indices)
        if config.sampling == "weighted" and np.ptp(self._weights) == 0:
            raise ConfigError(
                "sampling='weighted' needs weights that differ: a column of them in a table "
                "(--column weight=NAME)"
            )
        if config.sampling == "balanced" and not config.replacement:
            _, counts = np.unique(self._classes, return_counts=True)
            return int(counts.min() * len(counts))
        if config.num_samples is None:
            return available
        drawable = available if config.replacement else int((self._weights > 0).sum())
        if not config.replacement and config.num_samples > drawable:
            raise ConfigError(
                f"num_samples={config.num_samples} without replacement: there are {drawable} "
                "training images to draw from"
            )
        return config.num_samples

    def draw(self, epoch: int) -> Draw:
        """Return the examples of an epoch in their order, with the seeds of their views."""
        indices = self._indices[self._positions(epoch)]
        seeds = repeated(view_seeds(self._seed, epoch, self._count)[indices], _repeats(indices))
        return Draw(self._substituted(indices, epoch), seeds)

    def _positions(self, epoch: int) -> Indices:
        """Return the positions of an epoch's examples in the list of indices, in its order."""
        config, available = self._config, len(self._indices)
        if config.sampling == "shuffle":
            return epoch_order(self._seed, epoch, available)
        random = _stream(self._seed, _ORDER, epoch)
        if config.sampling == "weighted":
            weights = self._weights
        elif config.replacement:
            _, inverse, counts = np.unique(self._classes, return_inverse=True, return_counts=True)
            weights = 1 / counts[inverse]
        else:
            return self._equally_many(random)
        return random.choice(
            available, self.num_examples, replace=config.replacement, p=weights / weights.sum()
        )

    def _equally_many(self, random: np.random.Generator) -> Indices:
        """Draw as many examples of each class as the smallest class has."""
        classes = np.unique(self._classes)
        each = self.num_examples // len(classes)
        drawn = [
            random.choice(np.flatnonzero(self._classes == label), each, replace=False)
            for label in classes
        ]
        return random.permutation(np.concatenate(drawn))

    def _substituted(self, indices: Indices, epoch: int) -> Indices:
        if not self._others:
            return indices
        drawn = _stream(self._seed, _SUBSTITUTE, epoch).integers(0, 2**62, size=self._count)
        out = indices.copy()
        for position, index in enumerate(indices):
            others = self._others.get(int(index))
            if others is not None:
                out[position] = others[drawn[index] % len(others)]
        return out


def _repeats(indices: Indices) -> Indices:
    """Return how often each of these came before."""
    seen: dict[int, int] = defaultdict(int)
    repeats = np.zeros(len(indices), dtype=np.intp)
    for position, index in enumerate(indices.tolist()):
        repeats[position] = seen[index]
        seen[index] += 1
    return repeats


def _rarest_classes(store: Store, indices: Indices) -> npt.NDArray[np.int64]:
    """Return the class of each example: the rarest of several, -1 if it has none."""
    labels = store.labels[indices].numpy()
    if labels.ndim == 1:
        return np.asarray(labels)
    counts = np.where(labels > 0, labels.sum(axis=0), np.inf)
    return np.where(labels.any(axis=1), counts.argmin(axis=1), -1)


def _others(store: Store) -> dict[int, Indices]:
    """Return, for each unreadable training example, the readable ones with the same label.

    With several labels at once, no other example may have the same ones: then it is left out.
    """
    wanted = {index: _label(store, index) for index in store.bad_indices("train").tolist()}
    if not wanted:
        return {}
    by_label: dict[object, list[int]] = {label: [] for label in wanted.values()}
    for index in store.indices("train").tolist():
        label = _label(store, index)
        if label in by_label:
            by_label[label].append(index)
    shared = {label: np.array(indices, dtype=np.intp) for label, indices in by_label.items()}
    return {index: shared[label] for index, label in wanted.items() if len(shared[label])}


def _label(store: Store, index: int) -> object:
    label = store.labels[index].tolist()
    return tuple(label) if isinstance(label, list) else label
