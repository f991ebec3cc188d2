"""Find the fine-tuning recipe for your own images."""

__version__ = "0.1.0"
