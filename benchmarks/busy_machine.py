"""What waiting threads cost where something else uses the cores: pairs within one run, medians.

    python benchmarks/busy_machine.py

Trains a ResNet-18 with two CPU threads, once with OpenMP's usual busy waiting and once with
`OMP_WAIT_POLICY=PASSIVE`, which the command line sets; first on the machine as it is, then beside
as many busy processes as there are cores. Prints the time of a step as ratios usual / passive.
"""

import os
import statistics
import subprocess
import sys

ROUNDS = 5
STEP = """
import time, torch, torchvision
torch.set_num_threads(2)
model = torchvision.models.resnet18(num_classes=8)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
images, labels = torch.randn(8, 3, 32, 32), torch.randint(0, 8, (8,))
for step in range(6):
    if step == 2:
        start = time.perf_counter()
    optimizer.zero_grad()
    torch.nn.functional.cross_entropy(model(images), labels).backward()
    optimizer.step()
print((time.perf_counter() - start) / 4)
"""


def step_s(policy: str | None) -> float:
    """Return the seconds of a training step in a process with this OMP_WAIT_POLICY."""
    environment = {k: v for k, v in os.environ.items() if k != "OMP_WAIT_POLICY"}
    if policy is not None:
        environment["OMP_WAIT_POLICY"] = policy
    words = [sys.executable, "-c", STEP]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=True)
    return float(done.stdout)


def measure(what: str) -> None:
    """Print the ratios of some pairs."""
    ratios = sorted(step_s(None) / step_s("PASSIVE") for _ in range(ROUNDS))
    print(
        f"{what}: usual / passive = {statistics.median(ratios):.2f} "
        f"(from {ratios[0]:.2f} to {ratios[-1]:.2f}, {ROUNDS} pairs)"
    )


def main() -> None:
    """Measure without and with a load of our own."""
    measure("as it is")
    cores = os.cpu_count() or 1
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(cores)]
    try:
        measure(f"beside {cores} busy processes")
    finally:
        for process in busy:
            process.kill()


if __name__ == "__main__":
    main()
