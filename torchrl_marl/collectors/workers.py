"""Collection by several processes, on one or more machines, with TorchRL's engines."""

from __future__ import annotations

import atexit
import contextlib
import copy
import importlib.util
import signal
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, cast

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torch import nn
from torchrl.collectors import Collector, MultiSyncCollector
from torchrl.collectors.distributed import RayCollector
from torchrl.envs import EnvBase

from torchrl_marl.envs import reseed
from torchrl_marl.modules import with_recurrent_state

__all__ = ["WorkerCollector", "multiprocess_collector", "ray_collector"]


class WorkerCollector:
    """A counterpart of :class:`torchrl.collectors.Collector` for workers that share its environments.

    Batches ``[num_envs, T]`` are synchronous: every worker receives the newest weights, collects its rows, and waits.
    ``reset`` starts new episodes and sets each worker's random state to a function of its rank and of one number drawn
    from Torch's generator in this process. The random state of this process before a reset therefore determines those
    of the workers: a run resumed from there, as by :class:`~torchrl_marl.run.run.Run`, continues bit for bit, also with
    another engine and the same number of workers.

    Games with a random stream per copy start the same episodes for any number of workers. Each worker samples the
    actions of its own rows, so another number of workers gives another sample of the same distribution.

    Args:
        engine: TorchRL's collector of :class:`Worker` processes.
        policy: the policy.
        num_workers: number of workers.
        device: device of the batches.
    """

    def __init__(
        self,
        engine: MultiSyncCollector | RayCollector,
        policy: TensorDictModuleBase,
        *,
        num_workers: int,
        device: torch.device | None,
    ) -> None:
        self._engine, self._policy, self._num_workers, self._device = engine, policy, num_workers, device
        atexit.register(self.shutdown)  # runs before multiprocessing would wait forever for idle workers

    def __iter__(self) -> Iterator[TensorDictBase]:
        """Yield batches endlessly.

        Raises:
            RuntimeError: if a worker has failed or died; the other workers are then unusable, too.
        """
        data = iter(self._engine)
        while True:
            self._send_weights()
            with _lost_workers_named(), warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="RayCollector iteration started before weight")
                batch = next(data)
            rows = batch.flatten(0, -2).to(self._device)  # Ray stacks workers, [workers, num_envs of each, T]
            rows.names = [None, "time"]
            yield rows

    def reset(self) -> None:
        """Start new episodes in all environments, from a seed that Torch's generator draws.

        Raises:
            RuntimeError: if a worker has failed or died.
        """
        seed = int(torch.randint(2**31 - 1, ()))
        with _lost_workers_named():
            self._engine.map_fn("restart", [(seed, part, self._num_workers) for part in range(self._num_workers)])

    def _send_weights(self) -> None:
        # TorchRL's weight synchronisation can wait for a dead worker forever, here or at exit, or open a port for each
        weights = TensorDict.from_module(self._policy).data.cpu()
        with _lost_workers_named():
            self._engine.map_fn("receive", [(weights,)] * self._num_workers)

    def shutdown(self) -> None:
        """Stop the workers; repeated calls are harmless."""
        atexit.unregister(self.shutdown)
        threads = torch.get_num_threads()
        self._engine.shutdown()
        torch.set_num_threads(threads)  # which TorchRL changes


class Worker(Collector):
    """The collector in a worker process."""

    def receive(self, weights: TensorDictBase) -> None:
        """Replace the policy's weights."""
        TensorDict.from_module(cast("nn.Module", self.policy)).data.update_(weights)

    def restart(self, seed: int, rank: int, world_size: int) -> None:
        """Start new episodes from the random state of this worker's share."""
        reseed(self.env, seed, rank=rank, world_size=world_size)
        self.reset()


def multiprocess_collector(
    env: EnvBase,
    policy: TensorDictModuleBase,
    *,
    make_env: Callable[..., EnvBase],
    num_workers: int,
    frames_per_batch: int,
    device: torch.device | str = "cpu",
) -> WorkerCollector:
    """Collect with processes on this machine, for environments that each use a core.

    Workers start as new interpreters: the calling script needs ``if __name__ == "__main__":``.

    Args:
        env: environment of a single process, which determines the number of copies and the device of batches.
        policy: the policy; its weights are sent before each batch.
        make_env: ``make_env(num_envs=..., device=...)``, called in each worker with its share of the copies.
        num_workers: number of processes, a divisor of the number of copies.
        frames_per_batch: steps of a batch over all environments, rounded up to whole steps.
        device: device of the workers' environments and policies.

    Raises:
        ValueError: if ``num_workers`` does not divide the number of copies.
    """
    share, frames = _shares(env, num_workers, frames_per_batch)
    threads = torch.get_num_threads()
    engine = MultiSyncCollector(
        [partial(_make_worker_env, make_env, policy, share, device)] * num_workers,
        policy_factory=partial(copy.deepcopy, copy.deepcopy(policy).to(device)),
        frames_per_batch=frames,
        device=device,
        collector_class=Worker,
        cat_results=0,
        use_buffers=True,
        auto_register_policy_transforms=False,  # the environments have them
    )
    torch.set_num_threads(threads)  # which TorchRL changes
    return WorkerCollector(engine, policy, num_workers=num_workers, device=env.device)


def ray_collector(
    env: EnvBase,
    policy: TensorDictModuleBase,
    *,
    make_env: Callable[..., EnvBase],
    num_workers: int,
    frames_per_batch: int,
    device: torch.device | str = "cpu",
    address: str | None = None,
    resources: Mapping[str, Any] | None = None,
) -> WorkerCollector:
    """Collect with actors of a Ray cluster, which may span machines.

    This library must be installed on each of them.

    Args:
        env: as for :func:`multiprocess_collector`.
        policy: as for :func:`multiprocess_collector`.
        make_env: as for :func:`multiprocess_collector`.
        num_workers: number of actors, a divisor of the number of copies.
        frames_per_batch: as for :func:`multiprocess_collector`.
        device: as for :func:`multiprocess_collector`.
        address: address of a running cluster, such as ``"auto"``; ``None`` starts a cluster on this machine for the
            lifetime of the collector, which listens on the loopback address only.
        resources: resources of each worker, as options of ``ray.remote``; by default one CPU.

    Raises:
        ImportError: if Ray is not installed.
        ValueError: if ``num_workers`` does not divide the number of copies.
    """
    if importlib.util.find_spec("ray") is None:
        raise ImportError('collecting with Ray needs the package: pip install "torchrl_marl[scale]"')
    share, frames = _shares(env, num_workers, frames_per_batch)
    resources = {"num_cpus": 1} if resources is None else dict(resources)
    init: dict[str, Any] = {"log_to_driver": False, "logging_level": "error"}
    if address is None:  # of this machine; a busy one may have fewer cores than workers
        init |= {"num_cpus": num_workers * int(resources.get("num_cpus", 1)), "include_dashboard": False}
        # Ray then listens on the loopback address alone, as on macOS. No option says so (127.0.0.1 becomes the
        # network's address), and the environment variable is read by the import, which TorchRL has done.
        importlib.import_module("ray._private.ray_constants").ENABLE_RAY_CLUSTER = False
    engine = RayCollector(
        [partial(_make_worker_env, make_env, policy, share, device)] * num_workers,
        policy,
        frames_per_batch=frames,
        total_frames=sys.maxsize,
        device=torch.device(device),
        collector_class=cast("Any", Worker),
        collector_kwargs={"auto_register_policy_transforms": False},  # the environments have them
        sync=True,
        weight_sync_schemes={},
        ray_init_config=init | ({} if address is None else {"address": address}),
        remote_configs=resources,
    )
    return WorkerCollector(engine, policy, num_workers=num_workers, device=env.device)


def _make_worker_env(
    make_env: Callable[..., EnvBase], policy: TensorDictModuleBase, num_envs: int, device: torch.device | str
) -> EnvBase:
    """Build a worker's environment, in the worker."""
    with contextlib.suppress(ValueError):  # not the main thread
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes, and the main one decides
    torch.set_num_threads(1)
    return with_recurrent_state(make_env(num_envs=num_envs, device=device), policy)


@contextlib.contextmanager
def _lost_workers_named() -> Iterator[None]:
    try:
        yield
    except Exception as error:  # each engine has its own, and TorchRL's may speak of the worker that it could not close
        raise RuntimeError("A worker that collects has failed or was killed") from error


def _shares(env: EnvBase, num_workers: int, frames_per_batch: int) -> tuple[int, int]:
    """Copies of the environment in each worker, and frames of a batch of all of them, in whole steps."""
    num_envs = env.batch_size.numel()
    if num_workers < 1 or num_envs % num_workers:
        raise ValueError(f"num_workers must divide the {num_envs} environments (env.num_envs), got {num_workers}.")
    return num_envs // num_workers, -(-frames_per_batch // num_envs) * num_envs
