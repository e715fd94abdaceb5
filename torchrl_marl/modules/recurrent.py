"""Recurrent actors and critics whose hidden state is an entry of the TensorDict, for one step or a whole sequence.

A row stores the state *before* its step. The environment's primer resets the state to zero at the start of an episode,
the network writes the state after the step under ``"next"``, and TorchRL carries it over. A network runs in one of two
modes:

* one step for every row (acting, value estimation), from the row's stored state;
* a sequence ``[*batch, time]`` (losses), from the stored state of the first row and of every row marked by
  ``"is_init"``; every other step continues from the step before, with gradients.

TorchRL's :class:`~torchrl.modules.set_recurrent_mode` selects the mode: off by default, on within every loss.

Restarting from stored states rather than from zeros also makes the values of next observations exact. Value estimators
run the critic over next observations as rows or as a separate sequence with marked episode starts. The states stored
with the first and the last next observation of an episode include all earlier steps of the episode.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, cast

import torch
from tensordict import NestedKey, TensorDictBase, unravel_key
from tensordict.nn import TensorDictModule, TensorDictModuleBase, TensorDictSequential
from torch import Tensor, nn
from torch.nn import functional
from torchrl.data import Composite, Unbounded
from torchrl.envs import Compose, EnvBase, InitTracker, TensorDictPrimer, TransformedEnv
from torchrl.modules import ProbabilisticActor, ValueNorm, recurrent_mode

from torchrl_marl.modules.agent_networks import AgentNetworks
from torchrl_marl.modules.gru_sequence import gru_sequence
from torchrl_marl.modules.layers import Activation, Networks, activation_class, initialize, make_policy, num_outputs
from torchrl_marl.modules.observation_norm import ObservationNorm
from torchrl_marl.modules.protocols import Priming, named_parts
from torchrl_marl.modules.spec import GroupSpec, group_shape
from torchrl_marl.modules.value_norm import Denormalize

__all__ = [
    "MultiAgentGRU",
    "RecurrentModule",
    "collection_policy",
    "make_recurrent_actor",
    "make_recurrent_critic",
    "recurrent_state_keys",
    "with_recurrent_state",
]

_INIT = "is_init"


class MultiAgentGRU(nn.Module):
    """Gated recurrent unit with one set of weights for all rows, which can restart within a sequence.

        r, z = sigmoid(W_r x + U_r h), sigmoid(W_z x + U_z h),   n = tanh(W_n x + r U_n h),   h' = (1 - z) n + z h

    with a bias in every product. Equations and weight layout are those of :class:`torch.nn.GRU`. The matrices of each
    gate are initialised orthogonally, biases to zero. For separate weights, hold one unit for each agent in
    :class:`~torchrl_marl.modules.AgentNetworks`.

    Sequences run in a loop over time with one matrix product for the inputs of all steps. On a CPU, the loop is as fast
    as ``torch.nn.GRU``, which cannot restart within a sequence. Under
    ``torch.compile`` the loop is one operator, :func:`~torchrl_marl.modules.gru_sequence.gru_sequence`.

    Reference: Cho et al., 2014, https://arxiv.org/abs/1406.1078, in the variant of ``torch.nn.GRU``.

    Args:
        input_size: length of an input.
        hidden_size: length of the hidden state, which is also the output.

    Example:
        >>> gru = MultiAgentGRU(3, 8)
        >>> gru(torch.zeros(5, 2, 3), torch.zeros(5, 2, 8)).shape
        torch.Size([5, 2, 8])
    """

    compiles_under_vmap = False  # the operator's gradient

    def __init__(self, input_size: int, hidden_size: int) -> None:
        super().__init__()
        self.hidden_size = hidden_size
        self.weight_ih = nn.Parameter(torch.empty(3 * hidden_size, input_size))
        self.weight_hh = nn.Parameter(torch.empty(3 * hidden_size, hidden_size))
        self.bias_ih = nn.Parameter(torch.zeros(3 * hidden_size))
        self.bias_hh = nn.Parameter(torch.zeros(3 * hidden_size))
        for weight in (self.weight_ih, self.weight_hh):
            for gate in weight.detach().chunk(3):
                nn.init.orthogonal_(gate)

    def forward(self, inputs: Tensor, state: Tensor, restart: Tensor | None = None) -> Tensor:
        """Take one step or, given ``restart``, a sequence of steps along the first dimension.

        Args:
            inputs: ``[*rows, input_size]``, or ``[time, *rows, input_size]``.
            state: states before each step, same leading shape; in a sequence, only the first state and those at
                restarts are read.
            restart: bool, ``[time, *rows, 1]``: steps that start from their entry of ``state``.

        Returns:
            The state after each step, same shape as ``state``.
        """
        projected = functional.linear(inputs, self.weight_ih, self.bias_ih)
        if restart is None:
            return self._step(projected, state)
        if torch.compiler.is_compiling():
            return gru_sequence(projected, state, restart, self.weight_hh, self.bias_hh)
        now, after = state[0], []
        for projected_now, stored, anew in zip(projected.unbind(), state.unbind(), restart.unbind(), strict=True):
            now = self._step(projected_now, torch.where(anew, stored, now))
            after.append(now)
        return torch.stack(after)

    def _step(self, projected: Tensor, state: Tensor) -> Tensor:
        gates = [2 * self.hidden_size, self.hidden_size]
        reset_update, candidate = projected.split(gates, -1)
        recurrent = functional.linear(state, self.weight_hh, self.bias_hh)
        recurrent_reset_update, recurrent_candidate = recurrent.split(gates, -1)
        reset, update = (reset_update + recurrent_reset_update).sigmoid().chunk(2, -1)
        return torch.lerp(torch.addcmul(candidate, reset, recurrent_candidate).tanh(), state, update)


class RecurrentModule(TensorDictModuleBase):
    """An embedding followed by a GRU: reads an input and the state before the step, writes the state after the step.

    The state is read under ``state_key`` and written under ``("next", state_key)``. In recurrent mode, the module also
    reads ``"is_init"``, ``[*batch, time, 1]``; otherwise each row starts from its own state (see the module docstring).

    The module implements TorchRL's protocol for recurrent modules, ``make_tensordict_primer``, which
    :func:`torchrl.modules.utils.get_env_transforms_from_module` and
    ``Collector(auto_register_policy_transforms=True)`` use.

    Args:
        embedding: network from the input to ``[*batch, *agents, input_size]`` of the GRU.
        gru: the recurrent unit, or one for each agent in :class:`~torchrl_marl.modules.AgentNetworks`.
        in_key: key of the input.
        state_key: key of the state; ``(group, name)`` for one state per agent, ``name`` for one state of the team.
        state_shape: shape of a state, ``(agents, hidden_size)`` or, for the team, ``(hidden_size,)``.

    Attributes:
        state_shape: shape of a state, ``[*agents, hidden_size]``.

    Raises:
        KeyError: on a call, if the state is missing (the environment lacks the primer).
        ValueError: on a call, if the state has another shape, or the data are not sequences in recurrent mode.
    """

    def __init__(
        self,
        embedding: nn.Module,
        gru: nn.Module,
        *,
        in_key: NestedKey,
        state_key: NestedKey,
        state_shape: Sequence[int],
    ) -> None:
        super().__init__()
        self.embedding = embedding
        self.gru = gru
        self.state_key = state_key
        self.in_keys = [in_key, state_key, _INIT]
        self.out_keys = [unravel_key(("next", state_key))]
        self.state_shape = torch.Size(state_shape)

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Write the state after each row's step, ``[*batch, *agents, hidden_size]``."""
        batch = tensordict.batch_size
        state = tensordict.get(self.state_key, None)
        if state is None:
            raise KeyError(
                f"There is no {self.state_key!r}: act in with_recurrent_state(env, policy), or set it to zeros "
                f"{(*batch, *self.state_shape)} at the start of an episode and carry {self.out_keys[0]!r} on."
            )
        inputs = self.embedding(tensordict.get(self.in_keys[0]))
        rows = inputs.shape[:-1]  # all agents; in an agent's policy, any number of them
        if state.shape != (*rows, self.state_shape[-1]) or len(rows) != len(batch) + len(self.state_shape) - 1:
            raise ValueError(
                f"{self.state_key!r} has shape {tuple(state.shape)} and the embedded {self.in_keys[0]!r} "
                f"{tuple(inputs.shape)}, but the batch {tuple(batch)} needs {(*batch, *self.state_shape)}."
            )
        if recurrent_mode():
            time, restart = len(batch) - 1, self._restart(tensordict).expand(*rows, 1)
            after = self.gru(*(entry.movedim(time, 0) for entry in (inputs, state, restart))).movedim(0, time)
        else:
            after = self.gru(inputs, state)
        return tensordict.set(self.out_keys[0], after)

    def make_tensordict_primer(self) -> TensorDictPrimer:
        """Return the transform that adds the state to an environment, zero at the start of episodes."""
        *group, name = (self.state_key,) if isinstance(self.state_key, str) else self.state_key
        spec = Composite({name: Unbounded(self.state_shape)}, shape=self.state_shape[:-1] if group else ())
        return TensorDictPrimer(Composite({group[0]: spec}) if group else spec, expand_specs=True)

    def for_export(self, agent: int | None) -> nn.Module:
        """Expect the state of one agent; see :class:`~torchrl_marl.modules.protocols.Exportable`."""
        self.state_shape = self.state_shape if agent is None else torch.Size([1, self.state_shape[-1]])
        return self

    def _restart(self, tensordict: TensorDictBase) -> Tensor:
        batch, restart = tensordict.batch_size, tensordict.get(_INIT, None)
        if len(batch) < 2:
            raise ValueError(
                f"Recurrent networks train on sequences [*batch, time], but the data has shape {tuple(batch)}: "
                "split batches with torchrl_marl.collectors.split_into_chunks (recipes: chunk_length=...)."
            )
        if restart is None or restart.shape != (*batch, 1):
            found = "is missing" if restart is None else f"has shape {tuple(restart.shape)}"
            raise ValueError(f"{_INIT!r}, which marks episode starts, must be {(*batch, 1)}, but {found}.")
        return restart.reshape(*batch, *(1 for _ in self.state_shape))


def make_recurrent_actor(
    env: EnvBase | GroupSpec,
    *,
    group: str | None = None,
    hidden_sizes: Sequence[int] = (128,),
    recurrent_size: int = 128,
    head_sizes: Sequence[int] = (128,),
    activation: Activation = "tanh",
    share_parameters: bool = True,
    agent_id: bool = True,
    normalize_observations: bool = False,
    device: torch.device | str | None = None,
) -> ProbabilisticActor:
    """Build a decentralised recurrent policy: MLP, GRU, MLP, from each agent's own history to its actions.

    Action distributions and initial weights are those of :func:`~torchrl_marl.modules.make_actor`. Act in
    :func:`with_recurrent_state`; train on sequences (:func:`torchrl_marl.collectors.split_into_chunks`).

    Args:
        env: the environment, or the shape of a group (then no environment is needed).
        group: name of the group; optional if the environment has one group.
        hidden_sizes: widths of the layers before the GRU.
        recurrent_size: length of each agent's hidden state.
        head_sizes: widths of the hidden layers after the GRU.
        activation: activation of the hidden layers.
        share_parameters: one network for all agents, or one for each.
        agent_id: append a one-hot agent id to the observation, so that agents with a shared network can differ. Agents
            with separate networks get no id.
        normalize_observations: whether to normalise observations by running statistics
            (:class:`~torchrl_marl.modules.ObservationNorm`).
        device: device of the parameters.

    Returns:
        Actor that reads ``(group, "observation")`` and ``(group, "recurrent_state")`` and writes ``(group, "action")``,
        ``(group, "action_log_prob")`` and ``("next", group, "recurrent_state")``.

    Raises:
        ValueError: if the group or its spaces are not supported, ``hidden_sizes`` is empty, or the activation is
            unknown.

    Example:
        >>> from tensordict import TensorDict
        >>> actor = make_recurrent_actor(GroupSpec("agents", 3, 8, num_actions=5), recurrent_size=16)
        >>> agents = {"observation": torch.zeros(7, 3, 8), "recurrent_state": torch.zeros(7, 3, 16)}
        >>> data = actor(TensorDict({"agents": agents}, batch_size=7))
        >>> data["agents", "action"].shape, data["next", "agents", "recurrent_state"].shape
        (torch.Size([7, 3]), torch.Size([7, 3, 16]))
    """
    shape = group_shape(env, group)
    embedding = Networks(shape, hidden_sizes, activation, share_parameters, agent_id)
    key, inputs = (shape.name, "observation"), _embed(embedding, shape.observation_size)
    memory = RecurrentModule(
        nn.Sequential(ObservationNorm(key, shape.observation_size), inputs) if normalize_observations else inputs,
        _gru(embedding, recurrent_size),
        in_key=key,
        state_key=(shape.name, "recurrent_state"),
        state_shape=(shape.num_agents, recurrent_size),
    )
    head = Networks(shape, head_sizes, activation, share_parameters).each(recurrent_size, num_outputs(shape))
    initialize(head, activation, output_gain=0.01)
    return make_policy(shape, memory.out_keys[0], head, memory.to(device), device=device)


def make_recurrent_critic(
    env: EnvBase | GroupSpec,
    *,
    group: str | None = None,
    observes: Literal["joint_observation", "state", "observation"] = "joint_observation",
    hidden_sizes: Sequence[int] = (128,),
    recurrent_size: int = 128,
    head_sizes: Sequence[int] = (128,),
    activation: Activation = "tanh",
    share_parameters: bool = True,
    agent_id: bool = True,
    normalize_observations: bool = False,
    value_norm: ValueNorm | None = None,
    device: torch.device | str | None = None,
) -> TensorDictSequential:
    """Build a recurrent critic: MLP, GRU, MLP, from a history to the value of every agent of a group.

    A centralised critic with shared parameters has one state for the team; other critics have one state per agent. The
    state before each step must be in the data: collect with :func:`collection_policy`.

    Args:
        env: the environment, or the shape of a group.
        group: name of the group; optional if the environment has one group.
        observes: as for :func:`~torchrl_marl.modules.make_critic`.
        hidden_sizes: widths of the layers before the GRU.
        recurrent_size: length of a hidden state.
        head_sizes: widths of the hidden layers after the GRU.
        activation: activation of the hidden layers.
        share_parameters: one network for all agents, or one for each.
        agent_id: append a one-hot agent id to an agent's own observation (shared ``"observation"`` critics only).
        normalize_observations: whether to normalise the critic's inputs by running statistics
            (:class:`~torchrl_marl.modules.ObservationNorm`).
        value_norm: running statistics of values, see :class:`~torchrl_marl.modules.Denormalize`.
        device: device of the parameters.

    Returns:
        Critic that reads its observations and its state, ``"<group>_critic_state"`` for the team or
        ``(group, "critic_state")``, and writes ``(group, "state_value")`` and, under ``"next"``, the next state.

    Raises:
        ValueError: if the group or its spaces are not supported, the global state is missing, or an option is unknown.

    Example:
        >>> from tensordict import TensorDict
        >>> critic = make_recurrent_critic(GroupSpec("agents", 3, 8, num_actions=5), recurrent_size=16)
        >>> data = TensorDict({"agents": {"observation": torch.zeros(7, 3, 8)}}, batch_size=7)
        >>> critic(data.set("agents_critic_state", torch.zeros(7, 16)))["agents", "state_value"].shape
        torch.Size([7, 3, 1])
    """
    shape = group_shape(env, group)
    alone = observes == "observation"
    team = share_parameters and not alone
    embedding = Networks(shape, hidden_sizes, activation, share_parameters, agent_id and alone)
    heads = Networks(shape, head_sizes, activation, share_parameters)
    if alone:
        inputs, joined, layers = shape.observation_size, [], [heads.each(recurrent_size, 1)]
    else:
        inputs, joined = heads.joint_input(observes)
        layers = heads.values(recurrent_size)
    key = "state" if observes == "state" else (shape.name, "observation")
    size = shape.state_size if observes == "state" else shape.observation_size
    norm = [ObservationNorm(key, size or 0)] if normalize_observations else []
    memory = RecurrentModule(
        nn.Sequential(*norm, *joined, _embed(embedding, inputs)),
        _gru(embedding, recurrent_size),
        in_key=key,
        state_key=f"{shape.name}_critic_state" if team else (shape.name, "critic_state"),
        state_shape=(recurrent_size,) if team else (shape.num_agents, recurrent_size),
    )
    head = nn.Sequential(*layers)
    initialize(head, activation, output_gain=1.0)
    if value_norm is not None:
        head.append(Denormalize(value_norm))
    value = TensorDictModule(head, in_keys=memory.out_keys, out_keys=[(shape.name, "state_value")])
    return TensorDictSequential([memory, value]).to(device)


def collection_policy(actor: ProbabilisticActor, critic: TensorDictModuleBase) -> TensorDictModuleBase:
    """Return the policy for a collector: the actor and, if the critic is recurrent, the critic's memory.

    The data then holds the critic's states, from which value estimation and losses start. If the critic has no memory,
    the policy is the actor. For :class:`~torchrl_marl.objectives.MAGPOLoss`, pass the learner as ``critic``.

    Args:
        actor: the policy.
        critic: the critic.
    """
    memories = [module for module in critic.modules() if isinstance(module, RecurrentModule)]
    return TensorDictSequential([actor, *memories]) if memories else actor


def with_recurrent_state(env: EnvBase, policy: nn.Module) -> EnvBase:
    """Return an environment that holds the states of a policy's recurrent modules and marks episode starts.

    States are reset to zero in each copy of the environment at the start of its episodes. ``env`` itself is not
    modified, and is returned if no transform is missing.

    Args:
        env: environment with done flags at the root.
        policy: any module, with or without recurrent parts such as :class:`RecurrentModule`,
            :class:`~torchrl_marl.modules.AutoregressiveActor` or TorchRL's recurrent modules.

    Example:
        >>> from torchrl_marl.envs import make_env
        >>> env = make_env("balance", num_envs=2, max_steps=5, seed=0)
        >>> actor = make_recurrent_actor(env, recurrent_size=16)
        >>> with_recurrent_state(env, actor).rollout(3, actor)["next", "agents", "recurrent_state"].shape
        torch.Size([2, 3, 3, 16])
    """
    present = set(env.full_observation_spec.keys(True, True))
    primers = [part.make_tensordict_primer() for _, part in named_parts(policy, Priming)]
    primers = [primer for primer in primers if set(cast("Composite", primer.primers).keys(True, True)) - present]
    return TransformedEnv(env, Compose([InitTracker(), *primers]), auto_unwrap=False) if primers else env


def recurrent_state_keys(network: nn.Module) -> list[NestedKey]:
    """Return the entries that a network's recurrent modules carry from step to step."""
    return [module.state_key for module in network.modules() if isinstance(module, RecurrentModule)]


def _embed(networks: Networks, inputs: int) -> nn.Module:
    """Layers before a recurrent unit, with an activation after the last one."""
    if not isinstance(networks.share_parameters, bool):
        raise ValueError(f"Recurrent networks take True or False; got share_parameters={networks.share_parameters}.")
    if not networks.hidden_sizes:
        raise ValueError(f"hidden_sizes must have at least one layer before the GRU, got {networks.hidden_sizes!r}.")
    *widths, last = networks.hidden_sizes
    network = networks._replace(hidden_sizes=widths).each(inputs, last)
    initialize(network, networks.activation)
    return nn.Sequential(network, activation_class(networks.activation)())


def _gru(networks: Networks, hidden_size: int) -> MultiAgentGRU | AgentNetworks:
    inputs = networks.hidden_sizes[-1]
    if networks.share_parameters:
        return MultiAgentGRU(inputs, hidden_size)
    return AgentNetworks([MultiAgentGRU(inputs, hidden_size) for _ in range(networks.shape.num_agents)])
