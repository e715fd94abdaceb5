"""What methods add to collected batches."""

from torchrl_marl.collectors.reflection import NextStepKeys

__all__ = ["NextStepKeys"]
