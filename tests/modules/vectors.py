"""Numbers of an independent implementation of MAT and Sable, checked against the code of MAGPO's authors."""

import json
from pathlib import Path

import torch
from torch import nn

VECTORS = json.loads((Path(__file__).parent / "autoregressive_vectors.json").read_text())


def double(values):
    return torch.tensor(values, dtype=torch.float64)


def load(module, **values):
    """Copy entries of the vectors, whose matrices multiply from the right, into a module's parameters."""
    for name, value in values.items():
        value = double(value)
        transposed = value.ndim == 2 and not isinstance(module, nn.Embedding)
        getattr(module, name).data = value.T.contiguous() if transposed else value
