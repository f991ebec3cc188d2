"""What becomes of sweeps whose driver is killed by SIGKILL at random moments, again and again.

    python -m benchmarks.kills [--kills 200] [--seed 0]
    python -m benchmarks.kills --real [--kills 4]

Each sweep runs twice: uninterrupted, and killed until it is done; then the two are compared to the
last bit. Without `--real`, a driver with made-up trials: the study, the stopper, the ledger and the
files are the real ones, Ray is not there. With it, `python -m tuneapp sweep` and `resume` on the
embedded digits, one trial at a time.
"""

import argparse
import random
import tempfile
import time
from pathlib import Path

from tests.killing import Figures, RealSweep, kill_a_real_sweep, kill_a_sweep, plan


def made_up(kills: int, seed: int) -> Figures:
    """Kill sweeps without Ray until there were so many kills."""
    found = Figures()
    while found.kills < kills:
        with tempfile.TemporaryDirectory() as folder:
            found.add(kill_a_sweep(Path(folder), plan(seed), random.Random(seed)))
        seed += 1
    return found


def real(kills: int, seed: int) -> Figures:
    """Kill one sweep of the command line so often."""
    with tempfile.TemporaryDirectory() as folder:
        return kill_a_real_sweep(RealSweep(Path(folder), seed=seed), random.Random(seed), kills)


def say(found: Figures, seconds: float) -> None:
    """Print the figures as a table."""
    print(f"{found.kills} kills in sweeps of {found.trials} trials in all, {seconds:.0f} s")
    for name, count in (
        ("lost", found.lost),
        ("doubled", found.doubled),
        ("differing", found.differing),
    ):
        print(f"  {name:<10} {count}")
    if found.repeated:
        share = found.repeated / found.kills
        print(f"  epochs computed again, for each kill: {share:.2f}, in the worst sweep "
              f"{found.most_repeated_per_kill:.2f}")  # fmt: skip
    print(f"  kills that came too late: {found.misses}")
    for phase, count in found.phases.most_common():
        print(f"  {count:5d} {phase}")


def main() -> None:
    """Kill, compare, print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--real", action="store_true")
    asked = parser.parse_args()
    begun = time.perf_counter()
    if asked.real:
        found = real(asked.kills or 4, asked.seed)
    else:
        found = made_up(asked.kills or 200, asked.seed)
    say(found, time.perf_counter() - begun)


if __name__ == "__main__":
    main()
