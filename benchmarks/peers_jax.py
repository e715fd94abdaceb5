"""MAPPO in plain JAX on JaxMARL's simple_spread, for speed.py: collection and update of an iteration are one `jax.jit`.

The structure of JaxMARL's `ippo_ff_mpe.py` and `mappo_rnn_mpe.py` (scans over steps, epochs and minibatches) with our
networks: two layers, or a layer, a GRU and a layer, of the same width, orthogonal, tanh; a critic of the joint
observation with a value for each agent.
"""

from __future__ import annotations

import os
import time
from functools import partial
from importlib.metadata import version
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import jaxmarl
import optax
from contender import Setting, Timing, main

Array = jax.Array


class Transition(NamedTuple):
    """A step of all environments: `[envs, agents, ...]`; `[envs, ...]` for `start` and the critic's state."""

    observation: Array
    action: Array
    log_prob: Array
    value: Array
    reward: Array
    done: Array
    start: Array
    actor_state: Array
    critic_state: Array


def linear(key: Array, inputs: int, outputs: int, gain: float) -> dict[str, Array]:
    return {"w": jax.nn.initializers.orthogonal(gain)(key, (inputs, outputs)), "b": jnp.zeros(outputs)}


def network(key: Array, inputs: int, outputs: int, width: int, gain: float, recurrent: bool) -> list[dict[str, Array]]:
    keys = jax.random.split(key, 5)
    layers = [linear(keys[0], inputs, width, 5 / 3)]
    if recurrent:
        layers.append({"x": linear(keys[1], width, 3 * width, 1.0), "h": linear(keys[2], width, 3 * width, 1.0)})
    return [*layers, linear(keys[3], width, width, 5 / 3), linear(keys[4], width, outputs, gain)]


def affine(layer: dict[str, Array], inputs: Array) -> Array:
    return inputs @ layer["w"] + layer["b"]


def forward(layers: list, inputs: Array, state: Array, start: Array) -> tuple[Array, Array]:
    """Outputs, and the last state, of one step or, with GRUs, of a sequence along the first dimension."""
    first, *memory, second, last = layers
    hidden = jnp.tanh(affine(first, inputs))
    if memory:
        (unit,) = memory

        def step(before: Array, now: tuple[Array, Array]) -> tuple[Array, Array]:
            projected, anew = now
            before = jnp.where(anew.reshape(anew.shape + (1,) * (before.ndim - anew.ndim)), 0.0, before)
            r, z, n = jnp.split(projected, 3, -1)
            hr, hz, hn = jnp.split(affine(unit["h"], before), 3, -1)
            z = jax.nn.sigmoid(z + hz)
            after = (1 - z) * jnp.tanh(n + jax.nn.sigmoid(r + hr) * hn) + z * before
            return after, after

        state, hidden = jax.lax.scan(step, state, (affine(unit["x"], hidden), start))
    return affine(last, jnp.tanh(affine(second, hidden))), state


def run(iterations: int, setting: Setting) -> list[Timing]:  # noqa: C901
    """Train; every timing is of a whole iteration, and counted as update."""
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})  # by flags alone XLA keeps several threads
    os.environ["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
    env = jaxmarl.make("MPE_simple_spread_v3", num_agents=setting.num_agents)
    agents, envs, steps = env.agents, setting.num_envs, setting.max_steps
    size, actions = env.observation_space(agents[0]).shape[0], env.action_space(agents[0]).n
    recurrent, width = setting.recurrent, setting.width
    stack = partial(jnp.stack, axis=1)

    def init(key: Array) -> dict[str, Any]:
        keys = jax.random.split(key, 2)
        return {
            "actor": network(keys[0], size, actions, width, 0.01, recurrent),
            "critic": network(keys[1], len(agents) * size, len(agents), width, 1.0, recurrent),
        }

    def evaluate(parameters: dict, data: Transition) -> tuple[Array, Array]:
        """Logits and values of sequences `[steps, envs, ...]`."""
        logits, _ = forward(parameters["actor"], data.observation, data.actor_state[0], data.start)
        joint = data.observation.reshape(*data.observation.shape[:-2], -1)
        values, _ = forward(parameters["critic"], joint, data.critic_state[0], data.start)
        return logits, values

    def act(parameters: dict, observation: Array, states: tuple, start: Array, key: Array) -> tuple:
        logits, actor_state = forward(parameters["actor"], observation[None], states[0], start[None])
        joint = observation.reshape(1, observation.shape[0], -1)
        values, critic_state = forward(parameters["critic"], joint, states[1], start[None])
        action = jax.random.categorical(key, logits[0])
        log_prob = jnp.take_along_axis(jax.nn.log_softmax(logits[0]), action[..., None], -1)[..., 0]
        return action, log_prob, values[0], (actor_state, critic_state)

    optimizer = optax.chain(optax.clip_by_global_norm(setting.max_grad_norm), optax.adam(setting.lr, eps=1e-5))

    def loss(parameters: dict, batch: tuple[Transition, Array, Array]) -> Array:
        data, advantage, target = batch
        logits, values = evaluate(parameters, data)
        log_probs = jax.nn.log_softmax(logits)
        ratio = jnp.exp(jnp.take_along_axis(log_probs, data.action[..., None], -1)[..., 0] - data.log_prob)
        clipped = jnp.clip(ratio, 1 - setting.clip_epsilon, 1 + setting.clip_epsilon)
        gain = jnp.minimum(ratio * advantage, clipped * advantage).mean()
        entropy = -(jnp.exp(log_probs) * log_probs).sum(-1).mean()
        return optax.huber_loss(values, target).mean() - gain - setting.entropy_coeff * entropy

    def learn(state: tuple, batch: tuple) -> tuple[tuple, Array]:
        parameters, moments = state
        value, gradients = jax.value_and_grad(loss)(parameters, batch)
        updates, moments = optimizer.update(gradients, moments)
        return (optax.apply_updates(parameters, updates), moments), value

    def iteration(carry: tuple) -> tuple[tuple, Array]:
        parameters, moments, game, observation, states, start, key = carry

        def step(carry: tuple, _: None) -> tuple[tuple, Transition]:
            game, observation, states, start, key = carry
            key, acting, stepping = jax.random.split(key, 3)
            action, log_prob, value, after = act(parameters, observation, states, start, acting)
            moves = dict(zip(agents, action.T, strict=True))
            seen, game, reward, done, _ = jax.vmap(env.step)(jax.random.split(stepping, envs), game, moves)
            reward = stack([reward[a] for a in agents])
            data = Transition(observation, action, log_prob, value, reward, done["__all__"], start, *states)
            return (game, stack([seen[a] for a in agents]), after, done["__all__"], key), data

        rolled = (game, observation, states, start, key)
        rolled, data = jax.lax.scan(step, rolled, None, steps)
        game, observation, states, start, key = rolled
        *_, last, _ = act(parameters, observation, states, start, key)

        def backward(carry: tuple[Array, Array], now: Transition) -> tuple[tuple[Array, Array], Array]:
            gained, following = carry
            live = 1.0 - now.done[:, None]
            delta = now.reward + setting.gamma * following * live - now.value
            gained = delta + setting.gamma * setting.lmbda * live * gained
            return (gained, now.value), gained

        _, advantage = jax.lax.scan(backward, (jnp.zeros_like(last), last), data, reverse=True)
        target = advantage + data.value
        advantage = (advantage - advantage.mean()) / (advantage.std() + 1e-8)
        batch = (data, advantage, target)
        if not recurrent:  # rows of single steps
            batch = jax.tree.map(lambda x: x.reshape(1, steps * envs, *x.shape[2:]), batch)
        columns = jax.tree.leaves(batch)[0].shape[1]

        def epoch(state: tuple, key: Array) -> tuple[tuple, Array]:
            order = jax.random.permutation(key, columns).reshape(setting.minibatches, -1)
            parts = jax.tree.map(lambda x: jnp.moveaxis(x[:, order], 1, 0), batch)
            return jax.lax.scan(learn, state, parts)

        key, shuffling = jax.random.split(key)
        keys = jax.random.split(shuffling, setting.epochs)
        (parameters, moments), losses = jax.lax.scan(epoch, (parameters, moments), keys)
        return (parameters, moments, game, observation, states, start, key), losses.mean()

    key = jax.random.key(setting.seed)
    parameters = init(key)
    seen, game = jax.vmap(env.reset)(jax.random.split(key, envs))
    memory = width if recurrent else 1
    states = (jnp.zeros((envs, len(agents), memory)), jnp.zeros((envs, memory)))
    start = jnp.ones(envs, bool)
    observation = stack([seen[a] for a in agents])
    carry = (parameters, optimizer.init(parameters), game, observation, states, start, key)
    compiled = jax.jit(iteration, donate_argnums=0)
    timings = []
    for _ in range(iterations):
        begin, cpu = time.perf_counter(), time.process_time()
        carry, value = compiled(carry)
        jax.block_until_ready((carry, value))
        timings.append(Timing(0.0, time.perf_counter() - begin, time.process_time() - cpu))
    assert jnp.isfinite(value)
    return timings


if __name__ == "__main__":
    main(run, lambda: f"jaxmarl {version('jaxmarl')}, jax {version('jax')}")
