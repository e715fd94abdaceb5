"""Whole sequences: what TorchRL's collector collects, with large states at the start only."""

import pytest
import torch
from tensordict import TensorDict
from torch.testing import assert_close
from torchrl.collectors import Collector

from torchrl_marl.collectors import SequenceCollector, sequence_minibatches
from torchrl_marl.envs import make_env
from torchrl_marl.modules import make_sable, with_recurrent_state


def environment_and_actor(max_steps=4):
    """An environment whose episodes end within a batch, and a policy with a memory; the same ones each time."""
    torch.manual_seed(0)
    env = make_env("balance", num_envs=3, max_steps=max_steps, seed=0)
    actor, _ = make_sable(env, embed_dim=8)
    return with_recurrent_state(env, actor), actor


def take(collector, batches):
    data = iter(collector)
    return [next(data).clone() for _ in range(batches)]


def test_batches_are_those_of_torchrls_collector():
    env, actor = environment_and_actor()
    torch.manual_seed(1)
    ours = take(SequenceCollector(env, actor, frames_per_batch=18), 2)
    env, actor = environment_and_actor()
    torch.manual_seed(1)
    options = {"frames_per_batch": 18, "total_frames": -1, "auto_register_policy_transforms": False}
    theirs = take(Collector(env, actor, **options), 2)
    assert any(batch["next", "done"].any() for batch in ours)
    for our, their in zip(ours, theirs, strict=True):
        assert our.batch_size == their.batch_size == (3, 6)
        memory = our.select(*actor.memory_keys)
        assert_close(memory[:, 0], their.select(*actor.memory_keys)[:, 0])
        our = our.exclude(*actor.memory_keys)
        their = their.exclude(*actor.memory_keys, *[("next", key) for key in actor.memory_keys], "collector")
        assert sorted(map(str, our.keys(True, True))) == sorted(map(str, their.keys(True, True)))
        assert (our == their).all()
    assert theirs[1]["agents_encoder_memory"][:, 0].any()  # the second batch goes on from the first one's memory


def test_a_memory_takes_the_room_of_one_step():
    env, actor = environment_and_actor()
    (batch,) = (next(iter(SequenceCollector(env, actor, frames_per_batch=18))),)
    for key in actor.memory_keys:
        assert batch[key].shape[:2] == (3, 6)
        assert batch[key].untyped_storage().nbytes() == batch[key][:, 0].numel() * 4
        assert ("next", key) not in batch.keys(True)
    for minibatch in sequence_minibatches(batch, 2, states=actor.memory_keys):
        for key in actor.memory_keys:
            assert minibatch[key].untyped_storage().nbytes() == minibatch[key][:, 0].numel() * 4


def test_log_probabilities_in_the_data_are_those_of_the_sequence_over_batches_and_resets():
    env, actor = environment_and_actor(max_steps=7)
    for batch in take(SequenceCollector(env, actor, frames_per_batch=12), 4):
        for minibatch in sequence_minibatches(batch, 2, states=actor.memory_keys):
            log_prob = actor.get_dist(minibatch.copy()).log_prob(minibatch["agents", "action"])
            assert_close(log_prob, minibatch["agents", "action_log_prob"], rtol=0, atol=1e-5)


def test_a_reset_starts_new_episodes():
    env, actor = environment_and_actor(max_steps=100)
    collector = SequenceCollector(env, actor, frames_per_batch=9)
    data = iter(collector)
    assert next(data)["step_count"].flatten(1)[0].tolist() == [0, 1, 2]
    assert next(data)["step_count"].flatten(1)[0].tolist() == [3, 4, 5]
    collector.reset()
    batch = next(data)
    assert batch["step_count"].flatten(1)[0].tolist() == [0, 1, 2]
    assert not batch["agents_encoder_memory"].any()


def test_minibatches_hold_every_sequence_once_and_whole():
    batch = TensorDict({"id": torch.arange(7).view(7, 1, 1).expand(7, 5, 1)}, batch_size=(7, 5))
    for _ in range(2):
        minibatches = list(sequence_minibatches(batch, 3))
        assert [len(minibatch) for minibatch in minibatches] == [3, 3, 1]
        rows = torch.cat([minibatch["id"] for minibatch in minibatches]).squeeze(-1)
        assert (rows == rows[:, :1]).all()
        assert sorted(rows[:, 0].tolist()) == list(range(7))
    first, second = (next(iter(sequence_minibatches(batch, 7)))["id"][:, 0, 0].tolist() for _ in range(2))
    assert first != second


def test_of_states_that_differ_from_step_to_step_the_first_counts():
    batch = TensorDict({"memory": torch.arange(35).view(7, 5), "id": torch.arange(35).view(7, 5)}, batch_size=(7, 5))
    for minibatch in sequence_minibatches(batch, 3, states=["memory"]):
        assert torch.equal(minibatch["memory"], minibatch["id"][:, :1].expand(-1, 5))


def test_steps_of_a_batch_are_rounded_up():
    env, actor = environment_and_actor()
    collector = SequenceCollector(env, actor, frames_per_batch=7)
    assert next(iter(collector)).batch_size == (3, 3)


def test_a_minibatch_without_a_sequence_is_refused():
    batch = TensorDict({"id": torch.zeros(7, 5, 1)}, batch_size=(7, 5))
    with pytest.raises(ValueError, match="at least one sequence of 5 steps"):
        next(iter(sequence_minibatches(batch, 0)))
