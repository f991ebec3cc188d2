"""Losses from their configuration."""

from torch import nn

from tuneapp.config import CrossEntropy


def build_loss(config: CrossEntropy) -> nn.Module:
    """Return the loss: logits float (B, classes) and labels int64 (B,) to a mean in nats."""
    return nn.CrossEntropyLoss(label_smoothing=config.label_smoothing)
