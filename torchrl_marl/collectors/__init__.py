"""What happens to collected batches before a loss gets them."""

from torchrl_marl.collectors.chunks import split_into_chunks
from torchrl_marl.collectors.reflection import NextStepKeys

__all__ = ["NextStepKeys", "split_into_chunks"]
