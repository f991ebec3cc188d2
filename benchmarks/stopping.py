"""What the stopper's two settings are worth: epochs spent, and whether the best trial survives.

    python -m benchmarks.stopping [--seeds 100] [--trials 32]

Plays sweeps over made-up learning curves (`tuneapp/simulated.py`): the sampler draws what it draws
and the stopper stops what it stops, for each setting with the same seeds. Prints, as ratios:
epochs spent of those that all trials in full would take; how often the best trial, of those that
were drawn, was not stopped; and what was found, of the best that was there to be found.
"""

import argparse
import statistics
from pathlib import Path

from tuneapp import search
from tuneapp.config import RunSettings
from tuneapp.simulated import MADE_UP_SPACE, made_up_curves, play
from tuneapp.space import SearchSpace

EPOCHS = 9


def one(seed: int, trials: int) -> tuple[float, bool, float]:
    """Play a sweep; return the share of epochs spent, whether its best survived, what it found."""
    curve_of = made_up_curves(seed)
    played = play(SPACE, RunSettings(seed=seed), curve_of, trials)
    assert played.best is not None
    could = {t: max(curve_of(r.params).values) for t, r in played.records.items()}
    best = max(could, key=lambda trial_id: could[trial_id])
    found = played.best[1][played.settings.metric] / could[best]
    ran = [record for record in played.records.values() if record.state != "duplicate"]
    return played.epochs / (len(ran) * EPOCHS), played.records[best].state == "finished", found


SPACE = SearchSpace(MADE_UP_SPACE, Path("made_up.py"))


def main() -> None:
    """Play all settings with all seeds."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, default=100)
    parser.add_argument("--trials", type=int, default=32)
    asked = parser.parse_args()
    print(f"{asked.seeds} seeds, {asked.trials} trials of {EPOCHS} epochs, one at a time")
    print("grace  factor  epochs spent  best survives  found of the best")
    for grace in (0.1, 0.25, 0.5):
        for factor in (2, 3, 4):
            search.GRACE_SHARE, search.REDUCTION_FACTOR = grace, factor
            seen = [one(seed, asked.trials) for seed in range(asked.seeds)]
            spent, survives, found = (
                statistics.fmean(column) for column in zip(*seen, strict=True)
            )
            print(f"{grace:5.2f}  {factor:6d}  {spent:12.2f}  {survives:13.2f}  {found:17.4f}")


if __name__ == "__main__":
    main()
