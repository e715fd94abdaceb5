"""A policy that has not changed has ratios of 1, however far its actions saturate: from the collector to the loss."""

import pytest
import torch
from torch.testing import assert_close
from torchrl.collectors import Collector
from torchrl.modules import set_recurrent_mode

from torchrl_marl.collectors import CompiledCollector, SequenceCollector
from torchrl_marl.envs import make_aerocombat
from torchrl_marl.modules import (
    collection_policy,
    make_actor,
    make_critic,
    make_mat,
    make_recurrent_actor,
    make_recurrent_critic,
    make_sable,
    with_recurrent_state,
)
from torchrl_marl.objectives import HATRPOLoss, MAGPOLoss, MAPPOLoss

# Squared distances of seven standard deviations move by 1e-5 when a mean of 8 is rounded otherwise.
TOLERANCE = {"rtol": 0, "atol": 1e-4}


def saturate(actor, means=(-8.0, 6.0, 3.0)):
    """Let the means before squashing be about these, one for each of the first entries of an action."""
    biases = [parameter for name, parameter in actor.named_parameters() if name.endswith("bias")]
    with torch.no_grad():
        for bias in biases:
            if bias.shape == biases[-1].shape:  # of the last layer, which agents may have one each of
                bias[: len(means)] = torch.tensor(means)
    return actor


def collected(env, actor, critic=None, engine=Collector, **options):
    policy = actor if critic is None else collection_policy(actor, critic)
    env = with_recurrent_state(env, policy)
    if engine is Collector:
        options = {"total_frames": -1, "auto_register_policy_transforms": False}
    collector = engine(env, policy, frames_per_batch=64 * 10, **options)
    return next(iter(collector)).clone()


def with_advantages(batch):
    """Any advantages and value targets do for ratios."""
    shape = (*batch["agents", "action_log_prob"].shape, 1)
    batch["advantage"], batch["value_target"] = torch.randn(shape), torch.randn(shape)
    return batch


def assert_unchanged(output, prefix=""):
    assert_close(output[f"{prefix}min_ratio"].item(), 1.0, **TOLERANCE)
    assert_close(output[f"{prefix}max_ratio"].item(), 1.0, **TOLERANCE)


def game():
    torch.manual_seed(0)
    return make_aerocombat("AeroCombat-2v2", num_envs=64, seed=0)


def assert_saturated(batch):
    action = batch["agents", "action"]
    assert (action <= action.amin() + 1e-6).float().mean() > 0.2


@pytest.mark.parametrize("share_parameters", [True, False], ids=["shared", "own"])
@pytest.mark.parametrize("engine", [Collector, CompiledCollector])
def test_of_mlps(share_parameters, engine):
    env = game()
    actor = saturate(make_actor(env, hidden_sizes=[16], share_parameters=share_parameters))
    options = {"compile": False} if engine is CompiledCollector else {}
    batch = with_advantages(collected(env, actor, engine=engine, **options))
    assert_saturated(batch)
    assert_unchanged(MAPPOLoss(actor, make_critic(env, hidden_sizes=[16]))(batch))


@pytest.mark.slow
def test_of_mlps_in_compiled_collectors():
    torch.compiler.reset()
    env = game()
    actor = saturate(make_actor(env, hidden_sizes=[16]))
    batch = with_advantages(collected(env, actor, engine=CompiledCollector))
    assert_saturated(batch)
    loss = MAPPOLoss(actor, make_critic(env, hidden_sizes=[16]))
    assert_unchanged(loss(batch))
    loss.compile()
    assert_unchanged(loss(batch))


def test_of_grus():
    env, sizes = game(), {"hidden_sizes": [8], "recurrent_size": 8, "head_sizes": [8]}
    actor, critic = saturate(make_recurrent_actor(env, **sizes)), make_recurrent_critic(env, **sizes)
    batch = with_advantages(collected(env, actor, critic))
    assert_saturated(batch)
    with set_recurrent_mode(True):
        assert_unchanged(MAPPOLoss(actor, critic)(batch))


@pytest.mark.parametrize("make_guider", [make_mat, make_sable])
def test_of_autoregressive_policies_and_of_learners_that_equal_them(make_guider):
    env = game()
    guider, critic = make_guider(env, embed_dim=8)
    saturate(guider)
    batch = with_advantages(collected(env, guider, engine=SequenceCollector))
    assert_saturated(batch)
    output = MAGPOLoss(guider, critic, guider)(batch)
    assert_unchanged(output)
    assert_unchanged(output, "learner_")


def test_of_agents_at_the_start_of_their_turns_and_in_a_step_that_is_refused():
    env = game()
    actor = saturate(make_actor(env, hidden_sizes=[16], share_parameters=False))
    batch = with_advantages(collected(env, actor))
    assert_saturated(batch)
    loss = HATRPOLoss(actor, make_critic(env, hidden_sizes=[16]), accept_ratio=1e9)  # no step improves as much
    for turn in loss.turns(batch):
        if turn != "critic":
            assert_unchanged(loss(batch))
            assert_unchanged(loss.step(batch))
    assert_close(batch["agents", "update_log_ratio"], torch.zeros(64, 10, 2), **TOLERANCE)
