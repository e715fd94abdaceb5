"""CoordSum and a policy in plain JAX, as collection.py's contender: one `jax.jit` around one `jax.lax.scan`.

The rules are those of `torchrl_marl.envs.CoordSumEnv` (whose opponent keeps a running maximum), the policy is
`make_actor`'s MLP, and what comes out are the entries that a TorchRL batch has, laid out by step. Integers have 32
bits, as is usual in JAX, and JAX's own generator draws.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp


class State(NamedTuple):
    target: jax.Array
    guess: jax.Array
    ballots: jax.Array
    leader: jax.Array
    step: jax.Array
    episode_reward: jax.Array


class CoordSum(NamedTuple):
    """The game of one batch; see `CoordSumRules` for its variables."""

    num_envs: int
    num_agents: int = 3
    num_actions: int = 10
    max_steps: int = 100

    def reset(self, key: jax.Array) -> State:
        nothing = jnp.zeros(self.num_envs, jnp.int32)
        return State(
            target=self.draw_target(key),
            guess=nothing,
            ballots=jnp.full((self.num_envs, self.max_steps), -1, jnp.int16),
            leader=jnp.full((self.num_envs, self.num_actions), self.num_actions - 1, jnp.int16),
            step=nothing,
            episode_reward=nothing.astype(jnp.float32),
        )

    def draw_target(self, key: jax.Array) -> jax.Array:
        return jax.random.randint(key, (self.num_envs,), 0, self.num_actions)

    def step(self, state: State, action: jax.Array, next_target: jax.Array) -> tuple[State, jax.Array]:
        first, each = action[:, 0], jnp.arange(self.num_envs)
        reward = (action.sum(-1) == state.target) * (2.0 - (first == state.guess))
        ballot = (state.target * self.num_actions + first).astype(jnp.int16)
        votes = 1 + (state.ballots == ballot[:, None]).sum(-1, dtype=jnp.int32)
        score = (votes * self.num_actions + self.num_actions - 1 - first).astype(jnp.int16)
        leader = state.leader.at[each, state.target].max(score)
        place = jnp.minimum(state.step, self.max_steps - 1)
        best = leader[each, next_target].astype(jnp.int32)
        after = State(
            target=next_target,
            guess=self.num_actions - 1 - best % self.num_actions,
            ballots=state.ballots.at[each, place].set(ballot),
            leader=leader,
            step=state.step + 1,
            episode_reward=state.episode_reward + reward,
        )
        return after, reward

    def describe(self, state: State) -> dict[str, jax.Array]:
        target, step = state.target.astype(jnp.float32)[:, None], state.step[:, None] / self.max_steps
        seen = jnp.concatenate([target, step], -1)
        return {
            "observation": self.for_agents(seen),
            "state": jnp.concatenate([seen, jax.nn.one_hot(state.guess, self.num_actions)], -1),
            "episode_reward": self.for_agents(state.episode_reward[:, None]),
            "step_count": state.step[:, None],
        }

    def for_agents(self, value: jax.Array) -> jax.Array:
        return jnp.broadcast_to(value[:, None], (self.num_envs, self.num_agents, value.shape[-1]))


Layers = Sequence[tuple[jax.Array, jax.Array]]


def make_layers(key: jax.Array, sizes: Sequence[int]) -> Layers:
    keys = jax.random.split(key, len(sizes) - 1)
    hidden, output = jax.nn.initializers.orthogonal(5 / 3), jax.nn.initializers.orthogonal(0.01)
    return [
        ((output if width == sizes[-1] else hidden)(key, (inputs, width)), jnp.zeros(width))
        for key, inputs, width in zip(keys, sizes, sizes[1:], strict=False)
    ]


def logits_of(layers: Layers, observation: jax.Array) -> jax.Array:
    """Logits of every agent from its observation and a one-hot of who it is."""
    num_agents = observation.shape[-2]
    ids = jnp.broadcast_to(jnp.eye(num_agents), (*observation.shape[:-1], num_agents))
    hidden = jnp.concatenate([observation, ids], -1)
    for weight, bias in layers[:-1]:
        hidden = jnp.tanh(hidden @ weight + bias)
    weight, bias = layers[-1]
    return jax.nn.log_softmax(hidden @ weight + bias)


def make_collect(game: CoordSum, num_steps: int):
    """Return a jitted function from parameters, a state and a key to the next state and a batch."""

    def step(layers: Layers, state: State, key: jax.Array) -> tuple[State, dict]:
        act_key, target_key, reset_key = jax.random.split(key, 3)
        now = game.describe(state)
        logits = logits_of(layers, now["observation"])
        action = jax.random.categorical(act_key, logits)
        log_prob = jnp.take_along_axis(logits, action[..., None], -1)[..., 0]
        after, reward = game.step(state, action, game.draw_target(target_key))
        done = (after.step >= game.max_steps)[:, None]
        no = jnp.zeros_like(done)
        then = {**game.describe(after), "reward": game.for_agents(reward[:, None])}
        then |= {"done": done, "terminated": done, "truncated": no}
        now |= {"logits": logits, "action": action, "log_prob": log_prob}
        now |= {"done": no, "terminated": no, "truncated": no}
        begun = game.reset(reset_key)
        state = jax.tree.map(lambda new, old: jnp.where(done if new.ndim == 2 else done[:, 0], new, old), begun, after)
        return state, {**now, "next": then}

    def collect(layers: Layers, state: State, key: jax.Array) -> tuple[State, dict]:
        return jax.lax.scan(lambda state, key: step(layers, state, key), state, jax.random.split(key, num_steps))

    return jax.jit(collect)
