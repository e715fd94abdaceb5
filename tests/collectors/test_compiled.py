"""The compiled collector: what TorchRL's collector collects, from a pure function, uncompiled and compiled."""

import warnings

import pytest
import torch
from tensordict.nn import TensorDictModule, TensorDictSequential
from torch.testing import assert_close
from torchrl.collectors import Collector
from torchrl.envs import RewardScaling, StepCounter, TransformedEnv
from torchrl.modules import EGreedyModule

from torchrl_marl.collectors import CompiledCollector, SequenceCollector, compiled, epsilon_greedy
from torchrl_marl.envs import (
    RandomState,
    make_aerocombat,
    make_coordsum,
    make_env,
    make_maze,
    make_paxmen,
    preserve_random_state,
)
from torchrl_marl.evaluation import evaluate
from torchrl_marl.modules import (
    collection_policy,
    make_actor,
    make_mat,
    make_recurrent_actor,
    make_recurrent_critic,
    make_sable,
    with_recurrent_state,
)

pytest.importorskip("vmas")
from vmas.scenarios.mpe.simple import Scenario as Simple

from tests.envs.vmas_scenarios import Deciding, Noisy

GAMES = {
    "CoordSum-3x4": make_coordsum,
    "black_red": make_maze,
    "PaxMen-4": make_paxmen,
    "AeroCombat-2v2": make_aerocombat,
}


def vmas_and_policy(scenario, **options):
    return game_and_policy(scenario if isinstance(scenario, str) else scenario(), **options)


def game_and_policy(name, *, recurrent=False, num_envs=4, **options):
    """The same ones each time."""
    torch.manual_seed(0)
    make = GAMES.get(name, make_env)
    env = make(name, num_envs=num_envs, seed=0, **{"max_steps": 7, **options})
    if not recurrent:
        actors = [make_actor(env, group=group, hidden_sizes=[8], device=env.device) for group in env.group_map]
        return env, TensorDictSequential(*actors) if len(actors) > 1 else actors[0]
    actor = make_recurrent_actor(env, hidden_sizes=[8], recurrent_size=8, head_sizes=[], device=env.device)
    critic = make_recurrent_critic(env, hidden_sizes=[8], recurrent_size=4, head_sizes=[], device=env.device)
    policy = collection_policy(actor, critic)
    return with_recurrent_state(env, policy), policy


def game_and_guider(name, make_guider, **options):
    """Agents that act one after the other, and a learner whose memory is kept up to date beside them."""
    env, _ = game_and_policy(name, **options)
    guider, _ = make_guider(env, embed_dim=8)
    learner = make_recurrent_actor(env, hidden_sizes=[8], recurrent_size=4, head_sizes=[])
    policy = collection_policy(guider, learner)
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


def assert_evaluates(collector, policy, env, tolerance, max_steps):
    """As ``evaluate`` plays the policy, twice."""
    assert collector.acts_as(policy)
    with preserve_random_state():
        expected = evaluate(env, policy, seed=5, max_steps=max_steps).metrics()
        played = [collector.evaluate(env, seed=5, max_steps=max_steps).metrics() for _ in range(2)]
    for metrics in played:
        assert_close(metrics, expected, rtol=tolerance, atol=tolerance)
    assert len(set(expected["return"])) > 1


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


def test_traced_epsilon_greedy_actions_are_torchrls_while_epsilon_falls():
    torch.compiler.reset()
    taken = []
    for compile in ("eager", None):
        env, actor = game_and_policy("CoordSum-3x4")
        key = ("agents", "action")
        spec, falling = env.full_action_spec[key], {"eps_init": 1.0, "eps_end": 0.0, "annealing_num_steps": 2}
        exploration = EGreedyModule(spec, action_key=key, **falling)
        policy = epsilon_greedy(actor, exploration)
        collector = CompiledCollector(env, policy, frames_per_batch=44, compile=compile) if compile else None
        data = iter(collector or torchrls(env, policy, 44))
        torch.manual_seed(1)
        batches = []
        for _ in range(3):
            batches.append(next(data).clone())
            exploration.step()
        taken.append(batches)
    assert_same(*taken, tolerance=1e-6)
    greedy = [batch["agents", "action"] == batch["agents", "logits"].argmax(-1) for batch in taken[0]]
    assert not greedy[1].all()
    assert greedy[2].all()


@pytest.mark.parametrize(
    ("name", "make_guider", "compile", "tolerance"),
    [
        ("PaxMen-4", make_sable, False, 0),
        ("PaxMen-4", make_mat, False, 0),
        ("balance", make_sable, False, 1e-5),
        ("CoordSum-3x4", make_sable, "aot_eager", 1e-5),
        pytest.param("CoordSum-3x4", make_mat, "aot_eager", 1e-5, marks=pytest.mark.slow),
    ],
)
def test_batches_of_agents_that_act_in_turn_are_those_of_a_sequence_collector(name, make_guider, compile, tolerance):
    torch.compiler.reset()
    options = {"frames_per_batch": 44}
    ours = take(CompiledCollector(*game_and_guider(name, make_guider), compile=compile, **options))
    theirs = take(SequenceCollector(*game_and_guider(name, make_guider), **options))
    assert ours[0]["next", "done"].any()
    assert_same(ours, theirs, tolerance)
    for key in ["agents_encoder_memory", "agents_decoder_memory"] if make_guider is make_sable else []:
        assert ours[1][key].any()  # the second batch goes on from the first one's memory
        assert ours[2][key].untyped_storage().nbytes() == ours[2][key][:, 0].numel() * 4


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_compiled_batches_are_those_of_torchrls_collector(device):
    torch.compiler.reset()
    collector = CompiledCollector(*game_and_policy("CoordSum-3x4", device=device), frames_per_batch=44)
    ours = take(collector)
    theirs = take(torchrls(*game_and_policy("CoordSum-3x4", device=device), 44))
    assert ours[0]["next", "agents", "reward"].any()
    assert_same(ours, theirs, tolerance=1e-5)
    other, _ = game_and_policy("CoordSum-3x4", num_envs=6, device=device)
    assert_evaluates(collector, collector.policy, other, 1e-5, max_steps=7)


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


class Ending(Simple):
    """The episodes of some copies end before others'."""

    def done(self):
        return self.world.agents[0].state.vel[:, 0] > 0.1  # no episode begins with that


TWO_GROUPS = {"num_good_agents": 1, "num_adversaries": 1, "num_landmarks": 0}


@pytest.mark.parametrize(
    ("scenario", "recurrent", "options"),
    [
        ("balance", False, {"num_envs": 12, "max_steps": 50}),
        (Ending, True, {"max_steps": 50}),
        (Ending, False, {"time_limit": "terminate"}),
        (Deciding, True, {}),
        pytest.param(
            *("simple_tag", False, {"continuous_actions": False, "scenario_kwargs": TWO_GROUPS}),
            marks=pytest.mark.slow,
        ),
    ],
)
def test_uncompiled_batches_of_vmas_are_those_of_torchrls_collector(scenario, recurrent, options):
    def both():
        return vmas_and_policy(scenario, recurrent=recurrent, **options)

    frames = both()[0].batch_size[0] * 30
    with warnings.catch_warnings(action="error"):
        collector = CompiledCollector(*both(), frames_per_batch=frames, compile=False)
        ours = take(collector)
    theirs = take(torchrls(*both(), frames))
    assert_same(ours, theirs, tolerance=1e-5)
    ended = theirs[1]["next", "done"].flatten(1).sum(0)
    assert ended.any()
    assert (0 < ended).logical_and(ended < len(theirs[1])).any() == (scenario in ("balance", Ending))
    assert (collector._game._graphs._step_graph._misses > 0) == (scenario is Deciding)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_compiled_batches_of_vmas_are_those_of_torchrls_collector(device):
    torch.compiler.reset()
    both = lambda: vmas_and_policy(Ending, max_steps=25, device=device)  # noqa: E731
    collector = CompiledCollector(*both(), frames_per_batch=200)
    ours, theirs = take(collector), take(torchrls(*both(), 200))
    assert theirs[1]["next", "terminated"].any()
    assert theirs[1]["next", "truncated"].any()
    assert_same(ours, theirs, tolerance=1e-4)
    other, _ = vmas_and_policy(Ending, max_steps=25, num_envs=6, device=device)
    assert_evaluates(collector, collector.policy, other, 1e-4, max_steps=25)
    assert not collector._game._graphs.refused


@pytest.mark.parametrize("compiled_wrongly", [False, True])
def test_vmas_goes_on_itself_where_a_step_cannot_be_compiled_or_comes_out_wrong(compiled_wrongly, monkeypatch):
    scenario, reason = (Simple, r"\('agents', 'reward'\)") if compiled_wrongly else (Noisy, "draws random numbers")

    def miscompiled(method, _):
        def wrong(*arguments):
            results = list(method(*arguments))
            results[[value.shape for value in results].index((4, 1, 1))] += 1e-2
            return results

        return wrong

    if compiled_wrongly:
        monkeypatch.setattr(compiled, "_compiled", miscompiled)
    with pytest.warns(UserWarning, match=f"step of .* falls back to VMAS: .*{reason}"):
        ours = take(CompiledCollector(*vmas_and_policy(scenario), frames_per_batch=40, compile=False))
    assert_same(ours, take(torchrls(*vmas_and_policy(scenario), 40)), tolerance=1e-6)


def test_a_stored_random_state_brings_back_vmass_batches_in_another_process():
    """As far as one process can show it: with an environment, and graphs, of its own."""
    env, policy = vmas_and_policy(Ending)
    collector = CompiledCollector(env, policy, frames_per_batch=40, compile=False)
    next(iter(collector))
    saved = RandomState(env).state_dict()
    collector.reset()
    expected = next(iter(collector))
    env, policy = vmas_and_policy(Ending)
    other = CompiledCollector(env, policy, frames_per_batch=40, compile=False)
    RandomState(env).load_state_dict(saved)
    other.reset()
    assert (next(iter(other)) == expected).all()


@pytest.mark.parametrize(
    ("name", "max_steps"),
    [("CoordSum-3x4", 7), (Ending, 25)],  # where episodes are of different lengths
)
def test_a_collector_evaluates_as_evaluate_does_and_its_next_batch_is_as_without(name, max_steps):
    options, taken = {"recurrent": True, "max_steps": max_steps}, []
    for evaluating in (True, False):
        env, policy = vmas_and_policy(name, **options)
        collector = CompiledCollector(env, policy, frames_per_batch=16, compile=False)
        torch.manual_seed(1)
        data = iter(collector)
        first = next(data).clone()
        if evaluating:  # in two parts, of four copies and of two
            with preserve_random_state():
                other, _ = vmas_and_policy(name, num_envs=6, **options)
            assert_evaluates(collector, policy, other, 1e-5, max_steps)
        taken.append([first, next(data)])
    assert_same(*taken, tolerance=0)


def test_a_collector_knows_whose_actions_it_plays():
    env, actor = game_and_policy("CoordSum-3x4")
    collector = CompiledCollector(env, actor, frames_per_batch=8, compile=False)
    assert not collector.acts_as(game_and_policy("CoordSum-3x4")[1])
    env, policy = game_and_guider("CoordSum-3x4", make_mat)  # agents in turn: parameters depend on what is drawn
    assert not CompiledCollector(env, policy, frames_per_batch=8, compile=False).acts_as(policy)


def test_environments_that_are_no_pure_functions_are_refused():
    env = TransformedEnv(
        make_env("balance", num_envs=2, max_steps=5, seed=0), RewardScaling(0.0, 2.0), auto_unwrap=False
    )
    refused = r"takes a TensorEnv .*; got VmasEnv under RewardScaling\. TorchRL's Collector takes any"
    with pytest.raises(ValueError, match=refused):
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
