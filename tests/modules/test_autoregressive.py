"""Autoregressive actors and critics as TensorDict modules: what MAT and Sable share, and Sable's memory."""

import pytest
import torch
from tensordict import TensorDict
from torch.testing import assert_close
from torchrl.envs import ExplorationType, TransformedEnv, VmasEnv, set_exploration_type
from torchrl.envs.transforms import Compose, StepCounter
from torchrl.modules.utils import get_primers_from_module

from torchrl_marl.modules import GroupSpec, make_mat, make_sable
from torchrl_marl.modules.autoregressive import CategoricalActions

AGENTS, OBSERVATION, ACTIONS, STATE = 3, 5, 4, 2
ACTION_SPACES = {
    "categorical": {"num_actions": ACTIONS},
    "masked": {"num_actions": ACTIONS, "masked": True},
    "continuous": {"action_low": (-1.0, -2.0), "action_high": (1.0, 3.0)},
}
SHAPES = {
    name: GroupSpec("agents", AGENTS, OBSERVATION, state_size=STATE, **space) for name, space in ACTION_SPACES.items()
}
NETWORKS = {
    "mat": lambda shape, **options: make_mat(shape, embed_dim=16, num_heads=2, num_blocks=2, **options),
    "sable": lambda shape, **options: make_sable(
        shape, embed_dim=16, num_heads=2, num_blocks=2, chunk_size=3, **options
    ),
}
SABLE_STATE = {"agents_encoder_memory": (2, 2, 8, 8), "agents_decoder_memory": (2, 2, 2, 8, 8), "agents_step": (1,)}

every_network = pytest.mark.parametrize("network", NETWORKS)
every_space = pytest.mark.parametrize("space", SHAPES)


def build(network, space, dtype=torch.float64, **options):
    """Actor and critic that are far from their initial, almost uniform outputs; in float64 unless asked otherwise."""
    actor, critic = NETWORKS[network](SHAPES[space], **options)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in dict.fromkeys([*actor.parameters(), *critic.parameters()]):
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    return actor.to(dtype), critic.to(dtype)


def observe(space, batch, seed, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    group = {"observation": torch.randn(*batch, AGENTS, OBSERVATION, generator=generator, dtype=dtype)}
    if space == "masked":
        group["action_mask"] = torch.rand(*batch, AGENTS, ACTIONS, generator=generator) < 0.6
        group["action_mask"][..., 1] = True
    state = torch.randn(*batch, STATE, generator=generator, dtype=dtype)  # most networks do not read it
    return TensorDict({"agents": group, "state": state}, batch_size=batch)


def no_memory(batch, dtype=torch.float64):
    values = {
        key: torch.zeros(*batch, *shape, dtype=torch.long if key == "agents_step" else dtype)
        for key, shape in SABLE_STATE.items()
    }
    return TensorDict(values, batch_size=batch)


@torch.no_grad()
def play(actor, space, *, steps=9, sequences=4, dtype=torch.float64):
    """Let an actor act on random observations, ``[sequences, steps]``; episodes end at random."""
    resets = torch.rand(sequences, steps, generator=torch.Generator().manual_seed(5)) < 0.25
    data, carried = [], no_memory((sequences,), dtype)
    torch.manual_seed(13)
    with set_exploration_type(ExplorationType.RANDOM):
        for t in range(steps):
            step = observe(space, (sequences,), t, dtype).update(carried)
            step["agents_step"][resets[:, t]] = 0
            data.append(actor(step))
            carried = step.get("next").clone() if "next" in step.keys() else carried
    data = torch.stack(data, 1).exclude("next")
    ends = resets.roll(-1, 1)
    ends[:, -1] = False
    at_ends = observe(space, (sequences, steps), 77, dtype)
    data["next"] = TensorDict({"done": ends.unsqueeze(-1)}, data.batch_size)
    for key in (("agents", "observation"), "state"):
        end = ends.reshape(sequences, steps, *[1] * (data[key].ndim - 2))
        following = torch.where(end, at_ends[key], data[key].roll(-1, 1))
        following[:, -1] = at_ends[key][:, -1]
        data["next"][key] = following
    return data


def log_prob(actor, data):
    return actor.get_dist(data.copy()).log_prob(data["agents", "action"])


# --- acting and training agree


@every_network
@every_space
def test_a_sampled_actions_log_probability_is_its_teacher_forced_one(network, space):
    actor, _ = build(network, space)
    data = play(actor, space)
    stored = data["agents", "action_log_prob"]
    assert stored.shape == (4, 9, AGENTS)
    assert stored.std() > 0.3  # far from uniform
    assert_close(log_prob(actor, data), stored, rtol=0, atol=1e-9)


@every_network
@every_space
def test_it_is_in_single_precision_with_initial_parameters(network, space):
    actor, _ = NETWORKS[network](SHAPES[space])
    data = play(actor, space, dtype=torch.float32)
    assert_close(log_prob(actor, data), data["agents", "action_log_prob"], rtol=0, atol=1e-5)


@every_network
@pytest.mark.parametrize("continuous", [True, False], ids=["continuous", "discrete"])
def test_it_is_in_an_environment_that_carries_the_memory_over_resets(network, continuous):
    env = TransformedEnv(
        VmasEnv("balance", num_envs=3, continuous_actions=continuous, seed=0), Compose(StepCounter(max_steps=4))
    )
    actor, _ = NETWORKS[network](env)
    env.append_transform(get_primers_from_module(actor))
    torch.manual_seed(1)
    with torch.no_grad(), set_exploration_type(ExplorationType.RANDOM):
        data = env.rollout(9, actor, break_when_any_done=False)
    assert data["next", "done"].sum() == 6
    if network == "sable":
        assert torch.equal(data["agents_step"], data["step_count"])
    assert_close(log_prob(actor, data), data["agents", "action_log_prob"], rtol=0, atol=1e-5)


@every_network
@every_space
def test_actions_are_drawn_with_the_probabilities_that_are_stored(network, space):
    actor, _ = build(network, space)
    step = observe(space, (1,), 0).update(no_memory((1,))).expand(20_000).contiguous()
    torch.manual_seed(3)
    with set_exploration_type(ExplorationType.RANDOM):
        data = actor(step)
    action = data["agents", "action"][:, 0]  # the first agent's distribution is the same in all rows
    if space == "continuous":
        low, high = torch.tensor(SHAPES[space].action_low), torch.tensor(SHAPES[space].action_high)
        latent = ((2 * action - low - high) / (high - low)).clamp(-1 + 1e-12, 1 - 1e-12).atanh()
        loc, scale = data["agents", "loc"][0, 0], data["agents", "scale"][0, 0]
        assert_close(latent.mean(0), loc, rtol=0, atol=4 * scale.max().item() / 20_000**0.5)
        assert_close(latent.std(0), scale, rtol=0.03, atol=0)
        return
    frequency = torch.nn.functional.one_hot(action, ACTIONS).double().mean(0)
    logits = data["agents", "logits"][0, 0]
    if space == "masked":
        legal = data["agents", "action_mask"][0, 0]
        assert not frequency[~legal].any()
        logits = logits.masked_fill(~legal, -torch.inf)
    assert_close(frequency, logits.softmax(-1), rtol=0, atol=4 * 0.5 / 20_000**0.5)


@every_network
def test_illegal_actions_are_never_taken(network):
    actor, _ = build(network, "masked")
    data = play(actor, "masked", sequences=64)
    legal = data["agents", "action_mask"]
    assert not legal.all()
    assert legal.gather(-1, data["agents", "action"].unsqueeze(-1)).all()
    assert (actor.get_dist(data.copy()).probs[~legal] == 0).all()


@every_network
@every_space
def test_deterministic_actions_are_the_most_probable_ones_given_those_before(network, space):
    actor, _ = build(network, space)
    step = observe(space, (7,), 0).update(no_memory((7,)))
    with set_exploration_type(ExplorationType.DETERMINISTIC):
        data = actor(step)
    again = actor(step.clone())  # the default without any exploration type
    assert torch.equal(again["agents", "action"], data["agents", "action"])
    distribution = actor.get_dist(data.select("agents", *SABLE_STATE).unsqueeze(1))
    expected = distribution.deterministic_sample if space == "continuous" else distribution.mode
    assert_close(expected.squeeze(1), data["agents", "action"], rtol=0, atol=1e-6)


# --- who sees what


@every_network
@every_space
def test_a_distribution_depends_on_the_actions_of_agents_before_and_of_steps_before_only(network, space):
    actor, _ = build(network, space)
    data = play(actor, space).exclude("next")
    data["agents_step"] = torch.arange(9).view(1, 9, 1).expand(4, 9, 1)  # one episode
    names = [key for key in actor[0].out_keys]

    def parameters(batch):
        return actor[0](batch.copy()).select(names[0])[names[0]]

    before = parameters(data)
    for agent in range(AGENTS):
        other = data.clone()
        action = other["agents", "action"]
        if space == "continuous":
            action[:, 4, agent] *= -0.5
        else:
            action[:, 4, agent] = (action[:, 4, agent] + 1) % ACTIONS
        changed = (parameters(other) != before).any(-1).any(0)
        assert not changed[:4].any()
        assert not changed[4, : agent + 1].any()
        assert changed[4, agent + 1 :].all()
        # Sable remembers what its decoder has read, and no agent reads the last one's action
        remembered = network == "sable" and agent < AGENTS - 1
        assert changed[5:].all() if remembered else not changed[5:].any()


def test_no_action_is_read_as_the_start_of_a_step():
    space = CategoricalActions(ACTIONS)
    start = space.start(torch.zeros(2, AGENTS, 16))
    actions = space.decoder_input(torch.arange(ACTIONS))
    read = [start[0].item(), *actions.tolist()]
    assert sorted(read) == list(range(space.embedding(16).num_embeddings))  # each has an embedding of its own


@every_network
def test_values_depend_on_all_observations_so_far_and_on_no_action(network):
    _, critic = build(network, "categorical")
    data = play(build(network, "categorical")[0], "categorical")
    data["agents_step"] = torch.arange(9).view(1, 9, 1).expand(4, 9, 1)
    assert ("agents", "action") not in critic.in_keys
    before = critic(data.copy())["agents", "state_value"]
    other = data.clone()
    other["agents", "observation"][:, 4, 1] += 1
    changed = (critic(other)["agents", "state_value"] != before).squeeze(-1).all(0)
    assert not changed[:4].any()
    assert changed[4].all()
    assert changed[5:].all() if network == "sable" else not changed[5:].any()


@every_network
@every_space
def test_the_state_is_seen_by_those_who_may_and_by_nobody_else(network, space):
    for observes, may in (("observation_and_state", True), ("observation", False)):
        actor, critic = build(network, space, observes=observes)
        data = play(actor, space)
        assert [("state" in part.in_keys) for part in (actor, critic)] == [may, may]
        assert_close(log_prob(actor, data), data["agents", "action_log_prob"], rtol=0, atol=1e-9)
        other = data.clone()
        other["state"][:, 4] += 1
        values = [critic(x.copy())["agents", "state_value"].squeeze(-1) for x in (data, other)]
        for before, after in (values, [log_prob(actor, x) for x in (data, other)]):
            assert torch.equal(before[:, :4], after[:, :4])
            assert (before[:, 4] != after[:, 4]).all() if may else torch.equal(before, after)


@every_network
def test_what_is_observed_next_has_a_state_of_its_own(network):
    actor, critic = build(network, "categorical", observes="observation_and_state")
    data = play(actor, "categorical")
    values = critic.bootstrap(data.clone())
    assert_close(values["agents", "state_value"], critic(data.copy())["agents", "state_value"].detach())
    done = data["next", "done"].squeeze(-1)
    goes_on = ~done[:, :-1]
    following = values["next", "agents", "state_value"]
    assert_close(following[:, :-1][goes_on], values["agents", "state_value"][:, 1:][goes_on])
    other = data.clone()
    other["next", "state"] += 1
    moved = critic.bootstrap(other)
    assert torch.equal(moved["agents", "state_value"], values["agents", "state_value"])
    assert (moved["next", "agents", "state_value"] != following).all()


@every_network
@every_space
def test_agents_can_be_decoded_in_another_order(network, space):
    actor, _ = build(network, space)
    data = play(actor, space).exclude("next")
    expected = log_prob(actor, data)
    data["agents", "order"] = torch.arange(AGENTS).expand(4, 9, AGENTS)
    assert_close(log_prob(actor, data), expected)
    order = torch.tensor([2, 0, 1])
    data["agents", "order"] = order.expand(4, 9, AGENTS)
    reordered = log_prob(actor, data)
    assert not torch.isclose(reordered[:, 0], expected[:, 0]).all()
    # the same as agents that sit in that order from the start and keep their ids
    networks = actor[0]
    seated = data.exclude(("agents", "order")).clone()
    for key, value in seated["agents"].items():
        seated["agents", key] = value[:, :, order]
    eye = torch.eye(AGENTS, dtype=torch.float64)[order].expand(4, 9, AGENTS, AGENTS)
    encoder = networks.encoder
    observation = torch.cat([seated["agents", "observation"], eye], -1)
    state = {name: seated[f"agents_{name}"] for name in encoder.state_shapes}
    encoding = encoder(observation, state)
    action = networks.space.decoder_input(seated["agents", "action"])
    previous = torch.cat([torch.zeros_like(action[:, :, :1]), action[:, :, :-1]], 2)
    output = networks.decoder(encoding, previous, {n: seated[f"agents_{n}"] for n in networks.decoder.state_shapes})
    networks.write(seated, output)
    expected = actor.build_dist_from_params(seated).log_prob(seated["agents", "action"])
    assert_close(reordered[:, :, order], expected)


# --- memory


def test_the_memory_has_one_size_whatever_the_length_of_the_episode():
    actor, _ = build("sable", "categorical")
    step = observe("categorical", (2,), 0).update(no_memory((2,)))
    for t in range(200):
        following = actor(step)["next"]
        assert {key: following[key].shape[1:] for key in SABLE_STATE} == SABLE_STATE
        assert torch.equal(following["agents_step"], torch.full((2, 1), t + 1))
        step = observe("categorical", (2,), t).update(following)


@every_space
def test_a_sequence_within_an_episode_starts_from_the_memory_stored_at_its_first_step(space):
    actor, critic = build("sable", space)
    data = play(actor, space)
    values = critic.bootstrap(data.clone())["agents", "state_value"]
    for start in (1, 4, 6):
        goes_on = data["agents_step"][:, start, 0] > 0
        later = data[goes_on, start:]
        assert later["agents_encoder_memory"][:, 0].any()
        assert_close(log_prob(actor, later), later["agents", "action_log_prob"], rtol=0, atol=1e-9)
        assert_close(critic(later.copy())["agents", "state_value"].detach(), values[goes_on, start:])
        assert_close(critic.bootstrap(later.clone())["agents", "state_value"], values[goes_on, start:])


@every_space
def test_an_episode_starts_without_memory_whatever_was_there(space):
    actor, _ = build("sable", space)
    fresh = observe(space, (4,), 0).update(no_memory((4,)))
    stale = fresh.clone()
    for key in ("agents_encoder_memory", "agents_decoder_memory"):
        stale[key] += 5
    for key, value in actor(fresh)["next"].items():
        assert torch.equal(actor(stale)["next", key], value)
    old = stale.clone()
    old["agents_step"] += 1
    assert not torch.isclose(actor(old)["agents", "action_log_prob"], fresh["agents", "action_log_prob"]).all()


def test_an_environment_without_the_primer_is_told_so():
    actor, _ = build("sable", "categorical")
    with pytest.raises(KeyError, match=r"agents_encoder_memory.*with_recurrent_state"):
        actor(observe("categorical", (4,), 0))


@every_network
def test_bootstrapped_values_are_those_of_the_sequence_and_of_what_was_observed_at_each_end(network):
    actor, critic = build(network, "categorical")
    data = play(actor, "categorical")
    values = critic.bootstrap(data.clone())
    assert_close(values["agents", "state_value"], critic(data.copy())["agents", "state_value"].detach())
    done = data["next", "done"].squeeze(-1)
    assert 0 < done.sum() < done.numel()
    goes_on = ~done[:, :-1]
    after, following = values["agents", "state_value"][:, 1:], values["next", "agents", "state_value"]
    assert_close(following[:, :-1][goes_on], after[goes_on])
    # the longer sequence that does not start anew but sees what was observed next
    for sequence, end in (*done.nonzero(), (torch.tensor(0), torch.tensor(8))):
        longer = torch.cat([data[sequence, : end + 1], data[sequence, end : end + 1]]).exclude("next").clone()
        longer["agents", "observation"][-1] = data["next", "agents", "observation"][sequence, end]
        longer["agents_step"][-1] += 1
        value = critic(longer.unsqueeze(0))["agents", "state_value"][0, -1]
        assert_close(following[sequence, end], value.detach())


@pytest.mark.parametrize("batch", [(), (2, 3)])
@every_network
def test_single_steps_may_have_any_batch_shape(network, batch):
    actor, _ = build(network, "categorical")
    rows = observe("categorical", (6,), 0)
    data = rows.reshape(2, 3) if batch else rows[0]
    data = actor(data.update(no_memory(batch)))
    expected = actor(rows.update(no_memory((6,))))
    assert data.batch_size == torch.Size(batch)
    for key in (("agents", "action"), ("agents", "action_log_prob")):
        assert_close(data[key], expected[key].reshape(*batch, AGENTS) if batch else expected[key][0])


# --- building


@every_network
@every_space
def test_actor_and_critic_share_the_encoder_and_nothing_else(network, space):
    actor, critic = NETWORKS[network](SHAPES[space])
    shared = set(actor.parameters()) & set(critic.parameters())
    assert shared == set(critic.encoder.parameters())
    assert critic.encoder is actor[0].encoder


@every_network
def test_a_value_norm_ends_the_critic(network):
    from torchrl.modules import RunningValueNorm

    norm = RunningValueNorm(shape=1)
    norm.update(torch.tensor([[300.0], [500.0]]))
    _, critic = NETWORKS[network](SHAPES["categorical"], value_norm=norm)
    data = play(NETWORKS[network](SHAPES["categorical"])[0], "categorical", dtype=torch.float32)
    value = critic(data)["agents", "state_value"]
    assert ((value > 300) & (value < 500)).all()
    assert norm in critic.modules()


@pytest.mark.parametrize(
    ("builder", "options", "says"),
    [
        (make_mat, {"embed_dim": 16, "num_heads": 3}, "must divide embed_dim, got 3, 1 and 16"),
        (make_mat, {"num_blocks": 0}, "must be at least 1"),
        (make_sable, {"embed_dim": 8, "num_heads": 4}, "multiple of num_heads squared, got 8 and 4"),
        (make_sable, {"embed_dim": 9, "num_heads": 3}, "must be even"),
        (make_sable, {"decay_scaling": 1.5}, r"decay_scaling must be in \(0, 1\], got 1.5"),
        (make_sable, {"chunk_size": 0}, "chunk_size must be at least 1"),
        (make_mat, {"observes": "state"}, "must be one of observation, observation_and_state; got 'state'"),
    ],
)
def test_options_out_of_range_raise(builder, options, says):
    with pytest.raises(ValueError, match=says):
        builder(SHAPES["categorical"], **options)


@every_network
def test_a_state_that_is_not_there_cannot_be_seen(network):
    shape = GroupSpec("agents", AGENTS, OBSERVATION, num_actions=ACTIONS)
    with pytest.raises(ValueError, match='observes="observation_and_state", but the environment has no "state"'):
        NETWORKS[network](shape, observes="observation_and_state")


def test_sable_needs_whole_sequences():
    actor, _ = build("sable", "categorical")
    data = play(actor, "categorical")
    with pytest.raises(ValueError, match=r"Sable trains on sequences \[B, T, agents, features\]"):
        actor.get_dist(data.reshape(-1))


@every_network
def test_another_number_of_agents_is_refused_with_what_serves_any(network):
    actor, critic = build(network, "categorical", dtype=torch.float32)
    agents = {"observation": torch.zeros(2, AGENTS + 1, OBSERVATION)}
    data = TensorDict({"agents": agents, **{key: torch.zeros(2, *SABLE_STATE[key]) for key in SABLE_STATE}}, 2)
    for part in (actor, critic):
        with pytest.raises(
            ValueError, match=r"^The policy was trained with 3 agents.* got 4: .*actor\.agent_id=false\."
        ):
            part(data.clone())
