"""Losses whose networks run in bfloat16: ratios of an unchanged policy are 1, gradients close to those of float32."""

import pytest
import torch
from torch.testing import assert_close
from torchrl.modules import PopArtValueNorm

from tests.objectives.loss_factories import SPACES, add_transition, gradients, make_batch, make_networks
from tests.objectives.test_reductions import METHODS, make
from torchrl_marl.envs import make_coordsum
from torchrl_marl.modules import make_mat, make_recurrent_actor, make_recurrent_critic
from torchrl_marl.objectives import HATRPOLoss, MAPPOLoss, SEACLoss

LOW = {"precision": "bfloat16"}
AT_ONCE = {name: method for name, method in METHODS.items() if name not in ("HAPPO", "OAPPO", "SEAC")}
every_method = pytest.mark.parametrize("method", AT_ONCE.values(), ids=AT_ONCE)
every_space = pytest.mark.parametrize("space", SPACES)


def prepared(loss, actor, space):
    """A batch of the policy itself, in float32, as a loop prepares it."""
    data = add_transition(make_batch(actor, space, (4, 6)))
    with torch.no_grad():
        data["agents", "action_log_prob"] = actor.get_dist(data.copy()).log_prob(data["agents", "action"])
    loss.make_value_estimator()
    return loss.prepare(data)


def assert_ones(output):
    assert_close(output["min_ratio"].item(), 1.0, rtol=0, atol=1e-5)
    assert_close(output["max_ratio"].item(), 1.0, rtol=0, atol=1e-5)


@every_method
@every_space
def test_ratios_of_an_unchanged_policy_are_one_in_rows_of_any_order(method, space):
    loss, actor, _ = make(method, space, **LOW)
    batch = prepared(loss, actor, space)
    with torch.no_grad():
        collected = actor.get_dist(batch.copy()).log_prob(batch["agents", "action"])
    moved = (batch["agents", "action_log_prob"] - collected).exp()
    assert 1e-4 < (moved - 1).abs().max() < 0.1  # what training would have begun with
    assert_ones(loss(batch.reshape(-1)[torch.randperm(24)]))


@pytest.mark.parametrize("method", [METHODS["HAPPO"], METHODS["OAPPO"]], ids=["HAPPO", "OAPPO"])
@every_space
def test_an_agent_that_has_not_moved_has_a_ratio_of_one_in_its_turn_and_after_it(method, space):
    loss, actor, _ = make(method, space, reuse_matrix="NR", **LOW) if method.options else make(method, space, **LOW)
    batch = prepared(loss, actor, space).reshape(-1)
    for turn in loss.turns(batch):
        if turn != "critic":
            assert_ones(loss(batch))
            assert_close(loss(batch)["max_compound_ratio"].item(), 1.0, rtol=0, atol=1e-5)


@every_space
def test_losses_and_gradients_are_float32_and_near_those_of_float32(space):
    found = []
    for options in ({}, LOW):
        networks = make_networks(space, value_norm=PopArtValueNorm(shape=1))
        loss = MAPPOLoss(*networks, entropy_coeff=0.0, **options)
        torch.manual_seed(0)
        output = loss(prepared(loss, networks[0], space))
        assert {value.dtype for value in output.values()} == {torch.float32}
        found.append(torch.cat([grad.flatten() for grad in gradients(output, *networks)]))
    exact, rounded = found
    assert not torch.equal(exact, rounded)
    assert torch.cosine_similarity(exact, rounded, dim=0) > 0.999


def test_what_cannot_be_scored_again_is_refused():
    env = make_coordsum("CoordSum-3x4", num_envs=2, seed=0)
    for networks in (make_mat(env), (make_recurrent_actor(env), make_recurrent_critic(env))):
        with pytest.raises(ValueError, match="precision must be float32 for policies with a memory"):
            MAPPOLoss(*networks, **LOW)
    for loss, options in ((HATRPOLoss, {}), (SEACLoss, {"observes": "observation"})):
        with pytest.raises(ValueError, match="precision must be one of float32"):
            loss(*make_networks("categorical", share_parameters=False, **options), **LOW)
    with pytest.raises(ValueError, match="precision must be one of float32, bfloat16"):
        MAPPOLoss(*make_networks("categorical"), precision="float16")
