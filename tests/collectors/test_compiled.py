"""The compiled collector: what TorchRL's collector collects, from a pure function, uncompiled and compiled."""

import pytest
import torch
from tensordict.nn import TensorDictModule
from torch.testing import assert_close
from torchrl.collectors import Collector
from torchrl.envs import StepCounter, TransformedEnv

from torchrl_marl.collectors import CompiledCollector
from torchrl_marl.envs import RandomState, make_aerocombat, make_coordsum, make_env, make_maze, make_paxmen
from torchrl_marl.modules import (
    collection_policy,
    make_actor,
    make_recurrent_actor,
    make_recurrent_critic,
    with_recurrent_state,
)

GAMES = {
    "CoordSum-3x4": make_coordsum,
    "black_red": make_maze,
    "PaxMen-4": make_paxmen,
    "AeroCombat-2v2": make_aerocombat,
}


def game_and_policy(name, *, recurrent=False, num_envs=4, **options):
    """The same ones each time."""
    torch.manual_seed(0)
    env = GAMES[name](name, num_envs=num_envs, seed=0, **{"max_steps": 7, **options})
    if not recurrent:
        return env, make_actor(env, hidden_sizes=[8], device=env.device)
    actor = make_recurrent_actor(env, hidden_sizes=[8], recurrent_size=8, head_sizes=[], device=env.device)
    critic = make_recurrent_critic(env, hidden_sizes=[8], recurrent_size=4, head_sizes=[], device=env.device)
    policy = collection_policy(actor, critic)
    return with_recurrent_state(env, policy), policy


def take(collector, batches=2):
    """Some batches and, after a reset, one more."""
    torch.manual_seed(1)
    data = iter(collector)
    taken = [next(data).clone() for _ in range(batches)]
    collector.reset()
    return [*taken, next(data)]


def torchrls(env, policy, frames):
    return Collector(env, policy, frames_per_batch=frames, total_frames=-1, auto_register_policy_transforms=False)


def assert_same(ours, theirs, tolerance):
    """Keys, types, shapes of all groups, and values; flags and numbers that decide about episodes exactly."""
    for our, their in zip(ours, theirs, strict=True):
        their = their.exclude("collector")
        assert our.names == their.names
        assert set(our.keys(True)) == set(their.keys(True))
        for key, value in their.items(True):
            if isinstance(value, torch.Tensor):
                exact = not value.is_floating_point() or tolerance == 0
                limits = {"rtol": 0, "atol": 0} if exact else {"rtol": tolerance, "atol": tolerance}
                assert_close(our[key], value, **limits, msg=lambda text, key=key: f"{key}: {text}")
            else:
                assert our[key].batch_size == value.batch_size, key


@pytest.mark.parametrize("recurrent", [False, True], ids=["mlp", "gru"])
@pytest.mark.parametrize("name", GAMES)
def test_uncompiled_batches_are_those_of_torchrls_collector(name, recurrent):
    ours = take(CompiledCollector(*game_and_policy(name, recurrent=recurrent), frames_per_batch=44, compile=False))
    theirs = take(torchrls(*game_and_policy(name, recurrent=recurrent), 44))
    assert not ours[0]["next", "done"][:, -1].any()  # a batch ends within an episode
    assert ours[0]["next", "done"].any()
    assert_same(ours, theirs, tolerance=0)


def test_who_has_arrived_is_masked_and_everyones_arrival_begins_a_new_episode():
    ways = ["ddlddddrdd--", "--ddrddddldd"]  # the black agent sets out two steps later
    table = torch.tensor([["udlr-".index(move) for move in way] for way in ways])
    choose = lambda step: table[:, step.squeeze(-1)].movedim(0, -1)  # noqa: E731
    policy = TensorDictModule(choose, in_keys=["step_count"], out_keys=[("agents", "action")])
    env = lambda: make_maze("black_red", num_envs=2, max_steps=50)  # noqa: E731
    (ours, *_) = take(CompiledCollector(env(), policy, frames_per_batch=40, compile=False))
    assert ours["next", "terminated"].squeeze(-1).nonzero().tolist() == [[0, 11], [1, 11]]
    assert ours["agents", "mask"][0, 9:13].tolist() == [[True, True], [False, True], [False, True], [True, True]]
    assert_same([ours], take(torchrls(env(), policy, 40))[:1], tolerance=0)


@pytest.mark.parametrize(
    ("name", "recurrent"),
    [
        ("PaxMen-4", True),
        *(pytest.param(name, False, marks=pytest.mark.slow) for name in ("black_red", "AeroCombat-2v2")),
    ],
)
def test_traced_batches_are_those_of_torchrls_collector(name, recurrent):
    torch.compiler.reset()
    options = {"frames_per_batch": 44, "compile": "aot_eager"}
    ours = take(CompiledCollector(*game_and_policy(name, recurrent=recurrent), **options))
    theirs = take(torchrls(*game_and_policy(name, recurrent=recurrent), 44))
    assert_same(ours, theirs, tolerance=1e-6)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_compiled_batches_are_those_of_torchrls_collector(device):
    torch.compiler.reset()
    ours = take(CompiledCollector(*game_and_policy("CoordSum-3x4", device=device), frames_per_batch=44))
    theirs = take(torchrls(*game_and_policy("CoordSum-3x4", device=device), 44))
    assert ours[0]["next", "agents", "reward"].any()
    assert_same(ours, theirs, tolerance=1e-5)


def test_a_compiled_collector_follows_the_policys_parameters_and_no_other_collectors_game():
    torch.compiler.reset()
    options = {"frames_per_batch": 12, "compile": "eager"}  # traced, and run as it was traced
    env, policy = game_and_policy("black_red", step_cost=0.0)
    free = CompiledCollector(env, policy, **options)
    assert (next(iter(free))["next", "agents", "reward"] == 0).all()
    env, policy = game_and_policy("black_red", step_cost=0.5)
    costly = CompiledCollector(env, policy, **options)  # graphs of the same code for the same shapes
    assert (next(iter(costly))["next", "agents", "reward"] == -0.5).all()
    with torch.no_grad():
        list(policy.parameters())[-1][3] += 50.0  # the bias of action 3
    assert (next(iter(costly))["agents", "action"] == 3).all()
    assert (next(iter(free))["agents", "action"] != 3).any()


def test_a_batch_outlives_the_next_one_and_changing_it_does_no_harm():
    def second(change):
        collector = CompiledCollector(*game_and_policy("CoordSum-3x4"), frames_per_batch=20, compile=False)
        torch.manual_seed(1)
        first = next(iter(collector))
        for value in first.values(True, True) if change else ():
            value.zero_()
        kept = first.clone()
        batch = next(iter(collector))
        assert (first == kept).all()
        return batch

    assert (second(change=True) == second(change=False)).all()


def test_a_stored_random_state_brings_back_the_batches_after_a_reset():
    env, policy = game_and_policy("PaxMen-4")
    collector = CompiledCollector(env, policy, frames_per_batch=20, compile=False)
    next(iter(collector))
    saved = RandomState(env).state_dict()
    collector.reset()
    expected = next(iter(collector))
    RandomState(env).load_state_dict(saved)
    collector.reset()
    assert (next(iter(collector)) == expected).all()


def test_a_frame_that_is_left_over_fills_a_step():
    collector = CompiledCollector(*game_and_policy("black_red"), frames_per_batch=21, compile=False)
    assert next(iter(collector)).shape == (4, 6)


def test_environments_that_are_no_pure_functions_are_refused():
    env = make_env("balance", num_envs=2, max_steps=5, seed=0)
    with pytest.raises(ValueError, match=r"takes a TensorEnv \(CoordSumEnv, .*; got VmasEnv under .*collector=default"):
        CompiledCollector(env, make_actor(env), frames_per_batch=10)
    env = TransformedEnv(make_coordsum(num_envs=2), StepCounter())
    with pytest.raises(ValueError, match="got CoordSumEnv under StepCounter"):
        CompiledCollector(env, make_actor(env), frames_per_batch=10)


def test_a_policy_that_does_not_compile_in_one_piece_is_named():
    env, _ = game_and_policy("black_red")

    def layer(observation):
        torch._dynamo.graph_break()
        return observation.new_zeros(observation.shape[:-1], dtype=torch.int64)

    policy = TensorDictModule(layer, in_keys=[("agents", "observation")], out_keys=[("agents", "action")])
    collector = CompiledCollector(env, policy, frames_per_batch=8, compile="eager")
    with pytest.raises(Exception, match="graph_break"):
        next(iter(collector))
    assert next(iter(CompiledCollector(env, policy, frames_per_batch=8, compile=False))).shape == (4, 2)
