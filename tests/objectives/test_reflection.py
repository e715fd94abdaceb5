"""Reflective next-step keys: which rows have a pair, and what is written."""

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictSequential
from torch.testing import assert_close
from torchrl.collectors import Collector

from torchrl_marl.collectors import NextStepKeys
from torchrl_marl.envs import make_env
from torchrl_marl.modules import make_actor, make_critic
from torchrl_marl.objectives import MARPOLoss

ENVS, TIME, AGENTS = 2, 3, 2


def make_batch(*, done=(), dead=(), named=True):
    """Every entry tells its environment, step and agent: 100 e + 10 t + i."""
    e, t, i = torch.meshgrid(torch.arange(ENVS), torch.arange(TIME), torch.arange(AGENTS), indexing="ij")
    code = 100 * e + 10 * t + i
    batch = TensorDict(
        {
            "agents": {
                "action": code,
                "action_log_prob": code.float() + 0.5,
                "action_mask": code.unsqueeze(-1) % 7 < torch.arange(1, 5),
                "mask": torch.ones(ENVS, TIME, AGENTS, dtype=torch.bool),
            },
            "advantage": 1000.0 + code.unsqueeze(-1),
            "next": {"agents": {}, "done": torch.zeros(ENVS, TIME, 1, dtype=torch.bool)},
        },
        batch_size=(ENVS, TIME),
        names=[None, "time"] if named else None,
    )
    for env, step in done:
        batch["next", "done"][env, step] = True
    for env, step, agent in dead:
        batch["agents", "mask"][env, step, agent] = False
    return batch


def pairs(batch):
    """(environment, step, agent) of every row that has a pair."""
    return {tuple(row) for row in batch["next", "reflection_mask"].nonzero().tolist()}


def test_the_pair_is_the_same_environment_and_agent_one_step_later():
    batch = NextStepKeys()(make_batch())
    assert pairs(batch) == {(e, t, i) for e in range(2) for t in range(2) for i in range(2)}
    for e, t, i in pairs(batch):
        later = 100 * e + 10 * (t + 1) + i
        following = batch["next", "agents"][e, t]
        assert following["action"][i] == later
        assert following["action_log_prob"][i] == later + 0.5
        assert following["advantage"][i, 0] == 1000 + later
        assert following["action_mask"][i].tolist() == [later % 7 < n for n in (1, 2, 3, 4)]


@pytest.mark.parametrize(
    ("done", "dead", "lost"),
    [
        ([(0, 0)], [], {(0, 0, 0), (0, 0, 1)}),  # an episode ends after step 0 of environment 0
        ([(1, 2)], [], set()),  # it ends with the batch, where there is no pair anyway
        ([], [(0, 1, 1)], {(0, 0, 1), (0, 1, 1)}),  # dead then, dead now
        ([(1, 1)], [(0, 0, 0)], {(1, 1, 0), (1, 1, 1), (0, 0, 0)}),
    ],
    ids=["episode-end", "end-of-batch", "dead-agent", "both"],
)
def test_no_pair_crosses_an_episode_a_death_or_the_batch(done, dead, lost):
    everyone = {(e, t, i) for e in range(2) for t in range(2) for i in range(2)}
    assert pairs(NextStepKeys()(make_batch(done=done, dead=dead))) == everyone - lost


def test_rows_without_a_pair_hold_their_own_legal_action_and_no_advantage():
    batch = NextStepKeys()(make_batch(done=[(0, 0)]))
    alone = ~batch["next", "reflection_mask"]
    for key in ("action", "action_log_prob", "action_mask"):
        assert_close(batch["next", "agents", key][alone], batch["agents", key][alone], rtol=0, atol=0)
    assert not batch["next", "agents", "advantage"][alone].any()


def test_agents_may_end_one_by_one():
    batch = make_batch()
    batch["next", "done"] = torch.zeros(ENVS, TIME, AGENTS, 1, dtype=torch.bool)
    batch["next", "done"][1, 0, 1] = True
    assert (1, 0, 1) not in pairs(NextStepKeys()(batch))
    assert (1, 0, 0) in pairs(batch)


def test_a_teams_advantage_is_given_to_every_agent():
    batch = make_batch()
    batch["advantage"] = batch["advantage"][:, :, 0]
    assert_close(NextStepKeys()(batch)["next", "agents", "advantage"][0, 0].flatten().tolist(), [1010.0, 1010.0])


def test_time_may_be_any_dimension():
    expected = NextStepKeys()(make_batch())
    batch = NextStepKeys(time_dim=0)(make_batch(named=False).transpose(0, 1).contiguous())
    assert (batch.transpose(0, 1) == expected).all()


def test_rows_that_have_lost_their_order_are_refused():
    with pytest.raises(ValueError, match=r"No dimension .* named 'time'"):
        NextStepKeys()(make_batch().reshape(-1))
    assert pairs(NextStepKeys(time_dim=-1)(make_batch(named=False)))


@pytest.mark.parametrize("time_dim", [2, -3])
def test_a_dimension_that_does_not_exist_is_refused(time_dim):
    with pytest.raises(ValueError, match=rf"\(2, 3\) has no dimension time_dim={time_dim}"):
        NextStepKeys(time_dim=time_dim)(make_batch())


def test_no_pair_crosses_a_change_of_trajectory():
    # Batches joined along time, as of several workers: no episode has ended, but another one goes on.
    batch = make_batch()
    batch["collector", "traj_ids"] = torch.tensor([[7, 7, 7], [8, 9, 9]])
    assert {(e, t) for e, t, _ in pairs(NextStepKeys()(batch))} == {(0, 0), (0, 1), (1, 1)}


def test_padding_is_no_step_even_of_the_trajectory_whose_number_it_carries():
    batch = make_batch()
    batch["collector", "traj_ids"] = torch.zeros(ENVS, TIME, dtype=torch.long)  # what padding is filled with
    batch["collector", "mask"] = torch.tensor([[True, True, True], [True, False, False]])
    assert pairs(NextStepKeys()(batch)) == {(0, t, i) for t in range(2) for i in range(2)}
    assert not batch["next", "agents", "advantage"][1].any()


def test_no_pair_reaches_into_padding():
    env = make_env("navigation", num_envs=4, max_steps=4, seed=0)
    actor, critic = make_actor(env, hidden_sizes=(8,)), make_critic(env, hidden_sizes=(8,))
    loss = MARPOLoss(actor, critic, functional=False)
    loss.make_value_estimator(gamma=0.9, lmbda=0.8)
    options = {"frames_per_batch": 28, "total_frames": 28, "auto_register_policy_transforms": False}
    with pytest.warns(UserWarning, match="split_trajs"):  # TorchRL advises another layout
        batches = list(Collector(env, actor, split_trajs=True, **options))
    for batch in batches:
        NextStepKeys(time_dim=-1)(loss.value_estimator(batch))
        valid, has_pair = batch["collector", "mask"], batch["next", "reflection_mask"].all(-1)
        assert not valid.all()
        assert has_pair.sum() == valid.sum() - len(batch)  # of each trajectory all steps but the last
        assert not (has_pair & ~valid).any()
        ratio = loss(batch)["next_ratio"]
        assert ratio.item() == pytest.approx(1, abs=1e-4)


def test_what_is_missing_or_misshapen_is_named():
    with pytest.raises(KeyError, match="action_log_prob"):
        NextStepKeys()(make_batch().exclude(("agents", "action_log_prob")))
    batch = make_batch()
    batch["next", "done"] = torch.zeros(ENVS, TIME, 5, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"'done' has shape \(2, 3, 5\)"):
        NextStepKeys()(batch)


def test_keys_may_have_any_name():
    expected = NextStepKeys()(make_batch(dead=[(0, 0, 0)]))
    batch = make_batch(dead=[(0, 0, 0)])
    batch.rename_key_("agents", "predators")
    batch["next"].rename_key_("agents", "predators")
    for old, new in (("advantage", "credit"), (("next", "done"), ("next", "over"))):
        batch.rename_key_(old, new)
    batch.rename_key_(("predators", "mask"), "alive")
    names = {"action": ("predators", "action"), "log_prob": ("predators", "action_log_prob"), "mask": "alive"}
    NextStepKeys(**names, advantage="credit", done="over", reflection_mask="paired")(batch)
    assert_close(batch["next", "paired"], expected["next", "reflection_mask"])
    for key in ("action", "action_log_prob", "advantage"):
        assert_close(batch["next", "predators", key], expected["next", "agents", key], rtol=0, atol=0)


@pytest.mark.parametrize("time_limit", ["truncate", "terminate"])
def test_a_collectors_rows_are_paired_with_what_its_agents_saw_and_did_next(time_limit):
    # 7 steps a batch, episodes of 3: they end inside the batch, at another place in each batch.
    env = make_env("navigation", num_envs=4, max_steps=3, time_limit=time_limit, seed=0)
    actor, critic = make_actor(env, hidden_sizes=(8,)), make_critic(env, hidden_sizes=(8,))
    loss = MARPOLoss(actor, critic, functional=False)
    loss.make_value_estimator(gamma=0.9, lmbda=0.8)
    postproc = TensorDictSequential(loss.value_estimator, NextStepKeys())
    options = {"frames_per_batch": 28, "total_frames": 84, "auto_register_policy_transforms": False}
    for batch in Collector(env, actor, postproc=postproc, **options):
        has_pair = batch["next", "reflection_mask"]
        expected = ~batch["next", "done"].expand_as(has_pair)
        expected[:, -1] = False
        assert_close(has_pair, expected, rtol=0, atol=0)
        assert not has_pair[:, :-1].all()
        for key in ("observation", "action", "action_log_prob"):
            later = batch["agents", key][:, 1:]
            assert_close(batch["next", "agents", key][:, :-1][has_pair[:, :-1]], later[has_pair[:, :-1]])
        advantage = batch["next", "agents", "advantage"]
        assert advantage[has_pair].all()  # the authors' code reads zeros here
        assert_close(advantage[:, :-1][has_pair[:, :-1]], batch["advantage"][:, 1:][has_pair[:, :-1]])
