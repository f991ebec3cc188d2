"""How much a fused optimizer saves of a training step: pairs within one run, medians.

    python benchmarks/optimizer_step.py

Alternates unfused and fused AdamW on a ResNet-18 with one CPU thread, and prints the time of the
optimizer's own step and of the whole training step as ratios unfused / fused.
"""

import statistics
import time

import torch
from torchvision.models import resnet18

ROUNDS = 7
BATCH, SIZE = 32, 32


def timed_step(fused: bool) -> tuple[float, float]:
    """Return seconds of the optimizer's step and of the whole step, after two to warm up."""
    torch.manual_seed(0)
    model = resnet18(num_classes=10)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=fused)
    images, labels = torch.randn(BATCH, 3, SIZE, SIZE), torch.randint(0, 10, (BATCH,))
    for _ in range(3):
        start = time.perf_counter()
        optimizer.zero_grad(set_to_none=True)
        loss: torch.Tensor = torch.nn.functional.cross_entropy(model(images), labels)
        loss.backward()  # type: ignore[no-untyped-call]
        before = time.perf_counter()
        optimizer.step()
        end = time.perf_counter()
    return end - before, end - start


def main() -> None:
    """Measure and print."""
    torch.set_num_threads(1)
    pairs = [(timed_step(fused=False), timed_step(fused=True)) for _ in range(ROUNDS)]
    for index, what in enumerate(("optimizer step", "whole step")):
        ratios = sorted(slow[index] / fast[index] for slow, fast in pairs)
        print(
            f"{what}: unfused / fused = {statistics.median(ratios):.2f} "
            f"(from {ratios[0]:.2f} to {ratios[-1]:.2f}, {ROUNDS} pairs)"
        )


if __name__ == "__main__":
    main()
