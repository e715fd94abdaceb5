"""Seeds of one configuration, trained together: their networks side by side, their environments in one batch.

    python -m examples.seeds "seed=[0,1,2]" env=coordsum loss=mappo "actor.hidden_sizes=[64,64]"
    python -m examples.seeds resume=RUN  # of any of the seeds; all of them go on, bit for bit

MARS, MASPO, MAPPO and IPPO in this library's own games, with the overrides of recipes/mars_vmas.py. With small networks
and batches most of the time goes into the overhead of operations, not into arithmetic; on a GPU networks of any usual
size are small. Then several seeds cost little more than one. A seed leaves the folder of a run and learns in a group
what it learns alone, to the precision of floating point: initial weights, random streams, noise, the order of
minibatches, statistics and the norm of gradients are its own.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, ListConfig, OmegaConf
from tensordict import NestedKey, TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional
from torch.optim import SGD, Adam, AdamW, Optimizer, RMSprop
from torch.overrides import TorchFunctionMode
from torchrl.collectors import Collector
from torchrl.envs import EnvBase
from torchrl.modules import ProbabilisticActor
from tqdm import tqdm

from recipes.mars_vmas import main as recipe
from torchrl_marl.collectors import split_into_chunks
from torchrl_marl.envs import TensorEnv, preserve_random_state
from torchrl_marl.envs.games.streams import random_streams
from torchrl_marl.evaluation import evaluate
from torchrl_marl.modules import GroupSpec, collection_policy, with_recurrent_state
from torchrl_marl.modules.distributions import CensoredTanhNormal, InversionCategorical, InversionMaskedCategorical
from torchrl_marl.objectives import IPPOLoss, MAPPOLoss, MARSLoss, MASPOLoss, standardize
from torchrl_marl.objectives.ratio import RatioLoss
from torchrl_marl.run.checkpoints import check_resumable, find_checkpoint, read_metadata
from torchrl_marl.run.config import end_if_refused
from torchrl_marl.run.run import Run, progress_bar, reduce_records, stop_signals

_LOSSES = (MAPPOLoss, IPPOLoss, MASPOLoss, MARSLoss)  # their forward changes nothing
_OPTIMIZERS = (Adam, AdamW, RMSprop, SGD)  # they treat every element alike
_DISTRIBUTIONS = (InversionCategorical, InversionMaskedCategorical, CensoredTanhNormal)
_DRAWS = (torch.randint_like, torch.Tensor.normal_)  # what these draw with


def train(overrides: Sequence[str]) -> float:
    """Train the seeds together; return the mean over them of the mean of the last fifth of the evaluations."""
    seeds = []
    for words in words_of_seeds(overrides):
        cfg = recipe.compose(["compile=false", *words])
        torch.set_num_threads(cfg.num_threads)
        make_env = partial(instantiate, cfg.env, device=cfg.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        seeds.append(build_seed(cfg, make_env))
    group = SeedGroup(seeds, make_env=make_env)
    optimizer = instantiate(cfg.optimizer, group.parameters())
    collector = Collector(
        group.env,
        group.policy,
        frames_per_batch=len(group) * cfg.frames_per_batch,
        total_frames=-1,
        auto_register_policy_transforms=False,
    )

    for batch in group.batches(collector, optimizer):
        group.estimate_advantages(batch)
        rows = split_into_chunks(batch.select(*group.in_keys, strict=False), cfg.chunk_length)
        rows = rows.reshape(len(group), -1, *rows.shape[1:])
        for minibatch in group.minibatches(rows, cfg.minibatch_size, epochs=cfg.epochs):
            losses = group.losses_of(minibatch)
            total = losses["loss_objective"] + losses["loss_entropy"] + losses["loss_critic"]
            total.sum().backward()
            grad_norm = group.clip_grad_norm_(cfg.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
            group.record({**losses, "grad_norm": grad_norm})
    return group.finish()


def words_of_seeds(overrides: Sequence[str]) -> list[list[str]]:
    """Return what each seed would be trained with alone: one of ``seed=[...]``, or ``resume=`` for each of a group.

    All seeds of a group go on from the newest checkpoint that they have in common, of at most the frames of the one
    that is named: a kill may come when some have saved and others have not.

    Raises:
        ValueError: if the run to resume was not trained in a group, the runs of the others are not beside it, or one of
            them holds a link out of its folder.
    """
    values = {word.partition("=")[0]: word.partition("=")[2] for word in overrides}
    others = [word for word in overrides if word.partition("=")[0] not in ("seed", "resume")]
    if "resume" not in values:
        seeds = OmegaConf.create(f"seeds: {values.get('seed', '[0, 1, 2, 3, 4]')}").seeds
        numbers = list(seeds) if isinstance(seeds, ListConfig) else [seeds]
        if not numbers or len(set(numbers)) < len(numbers):
            raise ValueError(f"Seeds that train together must be distinct, and at least one; got {numbers}.")
        return [[*others, f"seed={number}"] for number in numbers]
    newest = find_checkpoint(values["resume"]).resolve()
    names = read_metadata(newest).get("trained_with", [])
    folders = [newest.parents[2] / Path(str(name)).name / "checkpoints" for name in names]  # beside it, nowhere else
    alone = "One alone goes on with resume=RUN in the recipe of one seed, equal up to rounding."
    if not folders:
        raise ValueError(f"resume={newest} was not written by a group of seeds. {alone}")
    saved = [{path.name for path in folder.glob("*.torchrl") if path.name <= newest.name} for folder in folders]
    if not (common := set.intersection(*saved)):
        without = ", ".join(str(folder) for folder, own in zip(folders, saved, strict=True) if newest.name not in own)
        raise ValueError(f"Seeds that trained together go on together, but {without} hold no {newest.name}. {alone}")
    resumed = [folder / max(common) for folder in folders]
    for path in resumed:
        check_resumable(path)
    return [[*others, f"resume={path}"] for path in resumed]


def build_seed(cfg: DictConfig, make_env: partial) -> Seed:
    """Build what one seed has of its own, as mars_vmas.py does."""
    torch.manual_seed(cfg.seed)
    env = make_env(seed=cfg.seed)
    shape = GroupSpec.from_env(env)
    actor = instantiate(cfg.actor, shape, device=env.device)
    critic = instantiate(cfg.critic, shape, device=env.device)
    loss = instantiate(cfg.loss, actor, critic)
    loss.make_value_estimator(gamma=cfg.gamma, lmbda=cfg.lmbda)
    optimizer = instantiate(cfg.optimizer, loss.parameters())
    return Seed(cfg, env=env, make_env=make_env, actor=actor, shape=shape, loss=loss, optimizer=optimizer)


class Seed:
    """What one seed has of its own, built as for a run alone, after ``torch.manual_seed(seed)``; see :class:`Run`.

    Its noise and its minibatches go on from the state of the process's random generator when this is made.

    Args:
        cfg: configuration of its run.
        env: the game that it would be trained in alone; a group takes over its random streams.
        make_env: ``make_env(num_envs=..., seed=...)``.
        actor: the policy.
        shape: what the actor was built for.
        loss: holds the networks, whose parameters a group brings up to date after each iteration.
        optimizer: of these parameters; for checkpoints it gets its share of the group's.

    Raises:
        ValueError: if it cannot be trained in a group; the message says what can.
    """

    def __init__(
        self,
        cfg: DictConfig,
        *,
        env: EnvBase,
        make_env: Callable[..., EnvBase],
        actor: ProbabilisticActor,
        shape: GroupSpec,
        loss: RatioLoss,
        optimizer: Optimizer,
    ) -> None:
        self.env, self.loss, self.optimizer = _stackable(cfg, env, loss, optimizer), loss, optimizer
        self.scheduler = instantiate(cfg.scheduler, optimizer)
        parts = {"loss": loss, "optimizer": optimizer, "scheduler": self.scheduler}
        self.run = Run(cfg, env=env, make_env=make_env, actor=actor, shape=shape, **parts)
        device = loss.ratio_low.device
        state = torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()
        self.generator = torch.Generator(device).set_state(state)

    def set_random_state(self) -> None:
        """Set the process's random generator to where this seed's is."""
        if self.generator.device.type == "cuda":
            torch.cuda.set_rng_state(self.generator.get_state(), self.generator.device)
        else:
            torch.set_rng_state(self.generator.get_state())


class SeedGroup:
    """Several seeds of one configuration in one training loop.

    Data have a leading dimension of seeds, and so have the parameters, which one optimiser moves: the gradient of the
    sum of all seeds' losses is each seed's own. Every seed keeps the folder of a run; only the seconds in its logs are
    the group's. From their checkpoints all go on together, bit for bit, or one alone, up to
    rounding.

    Args:
        seeds: alike in all but what the seed decides.
        make_env: ``make_env(num_envs=..., seed=...)``.
    """

    def __init__(self, seeds: Sequence[Seed], *, make_env: Callable[..., TensorEnv]) -> None:
        self.seeds = list(seeds)
        losses, first = [seed.loss for seed in seeds], seeds[0]
        self._members = [dict(loss.named_parameters()) for loss in losses]
        self._stacked = {
            name: nn.Parameter(torch.stack([member[name].detach() for member in self._members]))
            for name in self._members[0]
        }
        stacked_of = {own: self._stacked[name] for name, own in self._members[0].items()}
        self._loss = _Functional(losses[0])
        self._generators = [seed.generator for seed in seeds]
        self.policy = _GroupPolicy(losses[0], stacked_of, self._generators)
        self._game = make_env(num_envs=len(seeds) * first.run.cfg.env.num_envs, seed=0)
        self._game.set_extra_state(torch.cat([seed.env.get_extra_state() for seed in seeds]))
        self.env = with_recurrent_state(self._game, self.policy)
        episodes = first.run.cfg.evaluation.episodes
        self._evaluation_game = make_env(num_envs=len(seeds) * episodes, seed=0)
        self._starts = torch.cat([random_streams(seed.run.seed(1), episodes) for seed in seeds])
        self._records: list[Mapping[str, Tensor]] = []
        self._tensors: dict[str, Tensor] = {f"module.{name}": tensor for name, tensor in self._stacked.items()}
        self._stack_buffers()
        for seed in seeds:
            seed.run.trained_with = [other.run.folder.name for other in seeds]

    def __len__(self) -> int:
        return len(self.seeds)

    @property
    def in_keys(self) -> list[NestedKey]:
        """Entries that :meth:`losses_of` reads."""
        return self.seeds[0].loss.in_keys

    def parameters(self) -> list[nn.Parameter]:
        """Return the parameters of all seeds, ``[S, ...]`` each."""
        return list(self._stacked.values())

    def batches(self, collector: Collector, optimizer: Optimizer) -> Iterator[TensorDictBase]:
        """Yield batches ``[S, num_envs, T]`` until each seed has its ``total_frames``, as :meth:`Run.batches` does.

        Args:
            collector: of ``env`` and ``policy``.
            optimizer: of ``parameters()``.

        Raises:
            FloatingPointError: if a loss or a gradient of any seed is NaN or infinite, which ends all of them; the
                others go on alone from their checkpoints.
        """
        first = self.seeds[0].run
        total = len(self) * first.cfg.total_frames
        bar = progress_bar(f"{first.cfg.method}, {len(self)} seeds", total, initial=len(self) * first.frames)
        with self._ended_together(collector), bar, stop_signals(self._interrupt):
            if first.cfg.resume is None:
                self._evaluate_and_save(optimizer)
            else:
                self._go_on(optimizer)
            data = iter(collector)
            collector.reset()
            while not first.is_over:
                start = time.perf_counter()
                batch = next(data)
                batch = batch.reshape(len(self), -1, batch.shape[-1])
                collected = time.perf_counter()
                yield batch
                for seed in self.seeds:  # the rate is constant; a checkpoint counts iterations
                    seed.optimizer.step()  # without gradients, as the group's has taken the step
                    seed.scheduler.step()
                self._update_members()
                self._finish_iteration(batch, collected - start, time.perf_counter() - collected, bar)
                if first.evaluation_is_due(batch[0].numel()):
                    self._evaluate_and_save(optimizer)
                    collector.reset()

    @contextmanager
    def _ended_together(self, collector: Collector) -> Iterator[None]:
        """Close the logs of all seeds when one fails, and end the collector in any case."""
        try:
            yield
        except Exception:
            for seed in self.seeds:
                seed.run.fail()
            raise
        finally:
            collector.shutdown()

    @torch.no_grad()
    def estimate_advantages(self, batch: TensorDictBase) -> None:
        """Write ``advantage``, standardised for each seed, and ``value_target``; value norms follow the targets."""
        keys = self.seeds[0].loss.tensor_keys
        estimates = []
        for seed, own in zip(self.seeds, batch.unbind(0), strict=True):
            seed.loss.value_estimator(own)
            seed.loss.update_value_norm(own)
            estimates.append(own.select(keys.advantage, keys.value_target, keys.value))
        batch.update(torch.stack(estimates))
        batch[keys.advantage] = standardize(batch[keys.advantage], batch.get(keys.mask, None), exclude_dims=(0,))
        self._stack_buffers()

    def minibatches(self, data: TensorDictBase, size: int, *, epochs: int) -> Iterator[TensorDictBase]:
        """Yield rows of ``[S, R]``, ``size`` steps of each seed: in each epoch all, each seed's in an order of its own.

        See :func:`~torchrl_marl.collectors.minibatches`, whose draws they repeat.
        """
        seeds = torch.arange(len(self), device=data.device).unsqueeze(-1)
        num_rows = -(-size // data.shape[2:].numel())
        for _ in range(epochs):
            rows = data if num_rows >= data.shape[1] else data[seeds, self._random_order(data)]
            yield from rows.split(num_rows, 1)  # pyright: ignore[reportReturnType]

    def losses_of(self, minibatch: TensorDictBase) -> dict[str, Tensor]:
        """Return what each seed's loss makes of its rows of ``[S, B]``; all entries are ``[S]``."""
        action = minibatch.get(self.seeds[0].loss.tensor_keys.action)
        if not action.is_floating_point():
            return dict(torch.vmap(self._loss.call)(self._tensors, minibatch).items())
        # squashed Gaussians estimate their entropy from a sample of each
        noise = [torch.randn(action.shape[1:], generator=own, device=action.device) for own in self._generators]
        return dict(torch.vmap(self._losses_with_noise)(self._tensors, minibatch, torch.stack(noise)).items())

    def _losses_with_noise(self, tensors: Mapping[str, Tensor], rows: TensorDictBase, noise: Tensor) -> TensorDictBase:
        with _Instead({torch.Tensor.normal_: lambda _: noise}):
            return self._loss.call(tensors, rows)

    def clip_grad_norm_(self, max_norm: float) -> Tensor:
        """Scale the gradients of each seed down to a norm of ``max_norm``; return the norms before, ``[S]``."""
        gradients = [parameter.grad for parameter in self.parameters() if parameter.grad is not None]
        norms = torch.stack([gradient.flatten(1).norm(dim=1) for gradient in gradients]).norm(dim=0)
        scale = (max_norm / (norms + 1e-6)).clamp(max=1.0)  # as torch.nn.utils.clip_grad_norm_ has it
        for gradient in gradients:
            gradient.mul_(scale.reshape(-1, *(1 for _ in gradient.shape[1:])))
        return norms

    def record(self, metrics: Mapping[str, Tensor]) -> None:
        """Keep what a minibatch measured, ``[S]`` by name; see :meth:`Run.record`."""
        self._records.append({name: values.detach() for name, values in metrics.items()})

    def finish(self) -> float:
        """Finish every seed's run; return the mean over seeds of what :meth:`Run.finish` returns."""
        *others, last = (seed.run for seed in self.seeds)
        return (sum(run.conclude() for run in others) + last.finish()) / len(self)

    def _finish_iteration(self, batch: TensorDictBase, collecting: float, training: float, bar: tqdm) -> None:
        records = reduce_records(self._records)
        self._records.clear()
        for index, seed in enumerate(self.seeds):
            seed.run.record({name: values[index] for name, values in records.items()})
            seed.run.finish_iteration(batch[index], collecting, training, bar)

    def _evaluate_and_save(self, optimizer: Optimizer) -> None:
        self._share_optimizer(optimizer)
        self._evaluation_game.set_extra_state(self._starts)
        with preserve_random_state():
            horizon = self.seeds[0].run.cfg.env.max_steps
            episodes = evaluate(self._evaluation_game, self.policy, seed=None, max_steps=horizon)
        streams = self._game.get_extra_state().chunk(len(self))
        for seed, own_streams, own in zip(self.seeds, streams, episodes.chunk(len(self)), strict=True):
            seed.env.set_extra_state(own_streams)
            seed.set_random_state()
            seed.run.evaluate_and_save(own)

    @torch.no_grad()
    def _update_members(self) -> None:
        for name, stacked in self._stacked.items():
            for member, own in zip(self._members, stacked, strict=True):
                member[name].copy_(own)

    def _stack_buffers(self) -> None:
        members = [dict(seed.loss.named_buffers()) for seed in self.seeds]
        for name in members[0]:
            self._tensors[f"module.{name}"] = torch.stack([member[name] for member in members])

    def _go_on(self, optimizer: Optimizer) -> None:
        """Take over what the seeds' checkpoints hold beside the parameters."""
        self._game.set_extra_state(torch.cat([seed.env.get_extra_state() for seed in self.seeds]))
        for name, stacked in self._stacked.items():
            states = [
                seed.optimizer.state[member[name]] for seed, member in zip(self.seeds, self._members, strict=True)
            ]
            optimizer.state[stacked] = {
                key: value if key == "step" else torch.stack([state[key] for state in states])
                for key, value in states[0].items()
            }

    def _share_optimizer(self, optimizer: Optimizer) -> None:
        for name, stacked in self._stacked.items():
            state = optimizer.state.get(stacked, {})
            for index, (seed, member) in enumerate(zip(self.seeds, self._members, strict=True)):
                seed.optimizer.state[member[name]] = {
                    key: (value[index] if value.shape == stacked.shape else value).clone()
                    for key, value in state.items()
                }

    def _random_order(self, data: TensorDictBase) -> Tensor:
        rows = data.shape[1]
        return torch.stack([torch.randperm(rows, generator=own, device=data.device) for own in self._generators])

    def _interrupt(self) -> None:
        for seed in self.seeds:
            seed.run.interrupt()


class _GroupPolicy(TensorDictModuleBase):
    """The policies of all seeds: each acts in its share of the rows ``[S * B]``, with noise of its own."""

    def __init__(
        self,
        loss: RatioLoss,
        stacked_of: Mapping[nn.Parameter, nn.Parameter],
        generators: Sequence[torch.Generator],
    ) -> None:
        super().__init__()
        networks = collection_policy(loss.actor_network.det_part, loss.critic_network)
        self._networks, self._head = _Functional(networks), loss.actor_network[-1]
        self._draws = {draw: partial(_draw_apart, draw, generators) for draw in _DRAWS}
        self._num_seeds = len(generators)
        self._stacked = {name: stacked_of[own] for name, own in self._networks.named_parameters()}
        self.in_keys = networks.in_keys
        self.out_keys = list(dict.fromkeys([*networks.out_keys, *self._head.out_keys]))

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        rows = tensordict.select(*self.in_keys, strict=False).reshape(self._num_seeds, -1)
        acted = torch.vmap(self._networks.call)(self._stacked, rows)
        with _Instead(self._draws):
            acted = self._head(acted)
        return tensordict.update(acted.select(*self.out_keys).reshape(-1))


class _Functional(nn.Module):
    """A module called with other tensors in place of its own, by their names ``module.*``."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, data: TensorDictBase) -> TensorDictBase:
        return self.module(data)

    def call(self, tensors: Mapping[str, Tensor], data: TensorDictBase) -> TensorDictBase:
        with _Instead({functional.linear: _linear_of_rows}):
            return functional_call(self, dict(tensors), (data,))


class _Instead(TorchFunctionMode):
    """Within it other functions stand in for some of Torch's."""

    def __init__(self, functions: Mapping[Callable[..., Any], Callable[..., Any]]) -> None:
        super().__init__()
        self._functions = functions

    def __torch_function__(
        self, func: Callable[..., Any], types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return self._functions.get(func, func)(*args, **(kwargs or {}))


def _linear_of_rows(inputs: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """A linear layer on a matrix of rows: with more dimensions vmap would copy a seed's weights for each of them."""
    return functional.linear(inputs.flatten(0, -2), weight, bias).unflatten(0, inputs.shape[:-1])


def _draw_apart(
    draw: Callable[..., Tensor], generators: Sequence[torch.Generator], tensor: Tensor, *rest: Any
) -> Tensor:
    """Draw what ``draw(tensor, *rest)`` does, for each of equal parts of the rows from a generator of its own."""
    parts = tensor.contiguous().chunk(len(generators))
    return torch.cat([draw(part, *rest, generator=own) for part, own in zip(parts, generators, strict=True)])


def _stackable(cfg: DictConfig, env: EnvBase, loss: RatioLoss, optimizer: Optimizer) -> TensorEnv:
    """Return the game, or refuse what cannot be trained in a group."""
    distribution: Any = loss.actor_network[-1].distribution_class
    games = "games with a random stream for each copy (env=coordsum, maze, paxmen, aerocombat)"
    for is_met, allowed, found in (
        (not cfg.compile, "compile=false", "compile=true"),
        (not cfg.collector, "collector=default", cfg.collector.get("_target_")),
        (isinstance(env, TensorEnv), games, f"env={cfg.environment}"),
        (cfg.critic_lr is None, "critic_lr=null", cfg.critic_lr),
        (cfg.scheduler._target_.endswith(".ConstantLR"), "scheduler=constant", cfg.scheduler._target_),
        (not cfg.evaluation.sampled, "evaluation.sampled=false", "true"),
        (type(loss) in _LOSSES, f"the losses {_names(_LOSSES)}", type(loss).__name__),
        (not loss.functional, "functional=False", True),
        (loss.reduction == "mean", "reduction='mean'", repr(loss.reduction)),
        (distribution in _DISTRIBUTIONS, f"policies {_names(_DISTRIBUTIONS)}", distribution.__name__),
        (type(optimizer) in _OPTIMIZERS, f"the optimisers {_names(_OPTIMIZERS)}", type(optimizer).__name__),
    ):
        if not is_met:
            alone = "python recipes/mars_vmas.py -m seed=0,1,2"
            raise ValueError(f"Seeds train together with {allowed}; got {found}. One at a time: {alone}")
    return cast("TensorEnv", env)


def _names(classes: Sequence[type]) -> str:
    return ", ".join(allowed.__name__ for allowed in classes)


if __name__ == "__main__":
    try:
        train(sys.argv[1:])
    except Exception as error:
        end_if_refused(error, __name__)
        raise
