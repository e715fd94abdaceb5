"""The random generators that a training run shares with the rest of its process."""

from __future__ import annotations

import contextlib
import random
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torchrl.checkpoint import GlobalRNGState
from torchrl.envs import EnvBase

from torchrl_marl.extras import import_vmas

__all__ = ["RandomState", "preserve_random_state", "reseed"]

_VMAS_ENVIRONMENT = "vmas.simulator.environment.environment"


class RandomState:
    """The random state of a run as a checkpointable object.

    The state holds the generators of Python, NumPy, Torch and the accelerators in use (TorchRL's ``GlobalRNGState``),
    if VMAS is loaded the random stream that all VMAS environments share, and the streams of an environment that owns
    its randomness and has a method ``seed_copies`` (such as :class:`~torchrl_marl.envs.base.TeamEnv`).

    Args:
        env: environment whose streams are part of the state, with or without transforms; ``None`` for no environment.

    Example:
        >>> saved = RandomState().state_dict()
        >>> first = torch.rand(3)
        >>> RandomState().load_state_dict(saved)
        >>> torch.equal(torch.rand(3), first)
        True
    """

    def __init__(self, env: EnvBase | None = None) -> None:
        self._owners = [] if env is None else _stream_owners(env)

    def state_dict(self) -> dict[str, Any]:
        """Capture every generator.

        Returns:
            Tensors, numbers and strings in dicts, lists and tuples, which ``torch.load(..., weights_only=True)`` reads.
        """
        state = GlobalRNGState().state_dict()
        state["streams"] = [owner.get_extra_state() for owner in self._owners]
        if _VMAS_ENVIRONMENT in sys.modules:
            torch_state, (name, keys, *rest), python_state = _vmas_stream()
            numpy_state = (name, torch.from_numpy(keys.astype(np.int64)), *rest)
            state["vmas"] = {"torch_cpu": torch_state, "numpy": numpy_state, "python": python_state}
        return state

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore every generator.

        Args:
            state_dict: result of ``state_dict``. VMAS is imported if the state holds VMAS's stream.

        Raises:
            ImportError: if the state holds VMAS's stream and VMAS is not installed.
            ValueError: if the state belongs to an environment with other streams.
        """
        streams = state_dict.get("streams", [])
        if len(streams) != len(self._owners):
            raise ValueError(f"the state holds streams of {len(streams)} environments, expected {len(self._owners)}")
        for owner, own in zip(self._owners, streams, strict=True):
            owner.set_extra_state(own)
        GlobalRNGState().load_state_dict(state_dict)
        if "vmas" in state_dict:
            import_vmas()
            vmas = state_dict["vmas"]
            name, keys, *rest = vmas["numpy"]
            numpy_state = (name, keys.cpu().numpy().astype(np.uint32), *rest)
            _vmas_stream()[:] = [vmas["torch_cpu"].cpu(), numpy_state, vmas["python"]]
        elif _VMAS_ENVIRONMENT in sys.modules:
            # VMAS was imported after the state was captured. Its stream starts as a copy of the process's state.
            _vmas_stream()[:] = [torch.get_rng_state(), np.random.get_state(), random.getstate()]


@contextlib.contextmanager
def preserve_random_state() -> Iterator[None]:
    """Restore the process-wide random state on exit, so that the code inside does not change later draws.

    Yields:
        None.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> with preserve_random_state():
        ...     evaluation = torch.rand(1)
        >>> torch.equal(torch.rand(1), evaluation)
        True
    """
    state = RandomState().state_dict()
    try:
        yield
    finally:
        RandomState().load_state_dict(state)


def reseed(env: EnvBase, seed: int, *, rank: int = 0, world_size: int = 1) -> None:
    """Seed one of several processes that share the copies of an environment.

    Python's, NumPy's and Torch's generators and the environment's seed differ between processes. Environments with a
    random stream per copy get the streams that the copies would have in a single process, so their episodes do not
    depend on the number of processes.

    Args:
        env: the environment of this process; all processes have the same number of copies.
        seed: seed of the run.
        rank: index of this process, from 0.
        world_size: number of processes.

    Example:
        >>> from torchrl_marl.envs import CoordSumEnv
        >>> whole, half = CoordSumEnv(num_envs=4), CoordSumEnv(num_envs=2)
        >>> reseed(whole, 7)
        >>> reseed(half, 7, rank=1, world_size=2)
        >>> torch.equal(whole.reset()["state"][2:], half.reset()["state"])
        True
    """
    random.seed(seed + rank)
    np.random.seed((seed + rank) % 2**32)
    torch.manual_seed(seed + rank)
    env.set_seed(seed + rank)
    for owner in _stream_owners(env):
        owner.seed_copies(seed, rank=rank, world_size=world_size)


def _stream_owners(env: EnvBase) -> list[Any]:
    # The class is checked: a TransformedEnv forwards attributes to its base environment.
    return [module for module in env.modules() if hasattr(type(module), "seed_copies")]


def _vmas_stream() -> list[Any]:
    """The list [torch, numpy, python] of generator states from which every VMAS environment draws."""
    return sys.modules[_VMAS_ENVIRONMENT].Environment.vmas_random_state
