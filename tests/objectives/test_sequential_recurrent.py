"""Sequential methods with a memory: whose state a learner starts from, what reuse compares, and the old reductions."""

import pytest
import torch
from tensordict import TensorDict
from torch.testing import assert_close
from torchrl.modules import set_recurrent_mode

from tests.objectives.loss_factories import AGENTS, SPACES, gradients, group_shape, make_batch, total
from torchrl_marl.collectors import ReuseMappingSampler
from torchrl_marl.modules import agent_policy, make_critic, make_recurrent_actor
from torchrl_marl.objectives import HAPPOLoss, HATRPOLoss, MAPPOLoss, OAPPOLoss, OATRPOLoss, SEACLoss
from torchrl_marl.objectives.divergences import policy_kl

TOLERANCE = {"rtol": 1e-5, "atol": 1e-6}
MIXED = [[0.6, 0.0, 0.4], [0.25, 0.5, 0.25], [0.0, 0.2, 0.8]]
HIDDEN, SEQUENCES, STEPS = 7, 5, 6
STATE = ("agents", "recurrent_state")

every_space = pytest.mark.parametrize("space", SPACES)
every_turn = pytest.mark.parametrize("turn", [*range(AGENTS), "critic", None])
functional_or_not = pytest.mark.parametrize("functional", [True, False], ids=["functional", "stateful"])
off_and_own = pytest.mark.parametrize(("off", "own"), [(OAPPOLoss, HAPPOLoss), (OATRPOLoss, HATRPOLoss)])


def make(cls, space="categorical", **options):
    """A loss on a GRU for each agent, far from its initial weights; the same one in each call."""
    shape = group_shape(space)
    sizes = {"hidden_sizes": (8,), "recurrent_size": HIDDEN, "head_sizes": ()}
    actor = make_recurrent_actor(shape, share_parameters=False, **sizes)
    critic = make_critic(shape, hidden_sizes=(8,))
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in [*actor.parameters(), *critic.parameters()]:
            parameter.copy_(0.5 * torch.randn(parameter.shape, generator=generator))
    if cls in (OAPPOLoss, OATRPOLoss) and not {"reuse_matrix", "own_weight"} & set(options):
        options["reuse_matrix"] = MIXED
    return cls(actor, critic, **options), actor, critic


def batch_of(actor, space="categorical", *, live=None, updated=True):
    """Sequences with episode starts in between, stored states and ratios not far from 1."""
    generator = torch.Generator().manual_seed(29)
    shape = (SEQUENCES, STEPS)
    torch.manual_seed(3)
    acting = make_recurrent_actor(group_shape(space), hidden_sizes=(8,), recurrent_size=HIDDEN)
    start = torch.rand(*shape, 1, generator=generator) < 0.2
    states = torch.randn(*shape, AGENTS, HIDDEN, generator=generator)
    data = TensorDict({"is_init": start, "agents": {"recurrent_state": states}}, batch_size=shape)
    states[start.squeeze(-1)] = 0
    rows = make_batch(_WithStates(acting, states), space, shape, live=live)
    data.update(rows)
    with torch.no_grad(), set_recurrent_mode(True):
        log_prob = actor.get_dist(data.clone()).log_prob(data["agents", "action"])
    data["agents", "action_log_prob"] = log_prob + 0.3 * torch.randn(log_prob.shape, generator=generator)
    if updated:
        log_ratio = 0.3 * torch.randn(log_prob.shape, generator=generator)
        data["agents", "update_log_ratio"] = torch.where(torch.arange(AGENTS) == 1, 0.0, log_ratio)
    return data


class _WithStates:
    """An actor for ``make_batch``, which knows no states."""

    def __init__(self, actor, states):
        self.actor, self.states = actor, states

    def __call__(self, data):
        return self.actor(data.set(STATE, self.states))

    def __getitem__(self, index):
        return self.actor[index]


def results(loss, data, turn, *networks):
    loss.turn = turn
    torch.manual_seed(5)  # the same noise each time, for entropies that are sampled
    output = loss(data)
    return dict(output.items()), gradients(output, *networks) if networks else []


def step_by_step(actor, learner, source, data):
    """The distribution of one agent's network at each step of a source's sequences, rows carried on by hand."""
    policy, memory = agent_policy(actor, learner), []
    state = data[STATE][:, 0, [source]] if learner == source else torch.zeros(SEQUENCES, 1, HIDDEN)
    for now in data.unbind(1):
        state = torch.where(now["is_init"].unsqueeze(-1), 0.0, state)
        memory.append(state)
        agents = {"observation": now["agents", "observation"][:, [source]], "recurrent_state": state}
        seen = TensorDict({"agents": agents}, batch_size=SEQUENCES)
        state = policy.module[0][0](seen)["next", "agents", "recurrent_state"]
    # with the states in place rows are independent
    agents = {"observation": data["agents", "observation"][:, :, [source]], "recurrent_state": torch.stack(memory, 1)}
    if ("agents", "action_mask") in data.keys(True):
        agents["action_mask"] = data["agents", "action_mask"][:, :, [source]]
    return policy.get_dist(TensorDict({"agents": agents}, batch_size=data.batch_size))


def log_prob_of(actor, learner, source, data):
    action = data["agents", "action"][:, :, [source]]
    return step_by_step(actor, learner, source, data).log_prob(action).squeeze(-1)


# --- whose memory


@every_space
@pytest.mark.parametrize("live", [None, 0.7], ids=["all-live", "some-dead"])
def test_a_learner_goes_through_a_sources_sequence_with_a_memory_of_its_own(space, live):
    loss, actor, _ = make(OAPPOLoss, space, normalize_advantage=False, entropy_coeff=0.05)
    data = batch_of(actor, space, live=live)
    mask = data.get(("agents", "mask"), torch.ones(SEQUENCES, STEPS, AGENTS, dtype=torch.bool))
    updates = data["agents", "update_log_ratio"]
    for agent in range(AGENTS):
        objective, lives = 0.0, mask[..., agent]
        for source in range(AGENTS):
            ratio = (log_prob_of(actor, agent, source, data) - data["agents", "action_log_prob"][..., source]).exp()
            advantage, compound = data["advantage"][..., source, 0], (updates.sum(-1) - updates[..., source]).exp()
            gain = compound * torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)
            objective += MIXED[agent][source] * gain[mask[..., source]].mean()
        output, _ = results(loss, data, agent)
        assert_close(output["loss_objective"], -objective, **TOLERANCE)
        if space != "continuous":
            entropy = step_by_step(actor, agent, agent, data).entropy().squeeze(-1)
            assert_close(output["entropy"], entropy[lives].mean(), **TOLERANCE)


def test_the_batch_carries_what_agents_with_a_memory_have_changed():
    loss, actor, _ = make(OAPPOLoss)
    data, done = batch_of(actor, live=0.8, updated=False), []
    for turn in loss.turns(data):
        for agent in range(AGENTS):
            log_ratio = log_prob_of(actor, agent, agent, data) - data["agents", "action_log_prob"][..., agent]
            counts = data["agents", "mask"][..., agent] & (agent in done)
            found = data["agents", "update_log_ratio"][..., agent]
            assert_close(found, torch.where(counts, log_ratio, 0.0), **TOLERANCE)
        if turn != "critic":
            with torch.no_grad():
                for parameter in loss.agent_parameters(turn):
                    parameter += 0.1 * torch.randn_like(parameter)
            done.append(turn)


@pytest.mark.parametrize("matrix", [[[0.0, 1, 0], [0, 0, 1], [1, 0, 0]], torch.eye(3).tolist()], ids=["moved", "own"])
def test_drawn_sources_equal_weighted_ones_where_the_draw_is_certain(matrix):
    options = {"reuse_matrix": matrix, "entropy_coeff": 0.0}
    (weighted, actor, _), (sampled, other, _) = (make(OAPPOLoss, reuse=r, **options) for r in ("weighted", "sampled"))
    data = batch_of(actor, live=0.7)
    updates = data["agents", "update_log_ratio"].clone()
    next(iter(sampled.turns(data)))
    data["agents", "update_log_ratio"] = updates
    for turn in range(AGENTS):
        one, theirs = results(weighted, data, turn, actor)
        two, ours = results(sampled, data, turn, other)
        assert_close(two["loss_objective"], one["loss_objective"], **TOLERANCE)
        assert_close(ours, theirs, **TOLERANCE)


def test_a_source_is_drawn_for_a_whole_sequence():
    loss, actor, _ = make(OAPPOLoss, reuse="sampled")
    data = torch.cat([batch_of(actor, updated=False)] * 40)
    next(iter(loss.turns(data)))
    source = data["agents", "reuse_source"]
    assert source.shape == (40 * SEQUENCES, STEPS, AGENTS)
    assert (source == source[:, :1]).all()
    assert set(source[..., 0].unique().tolist()) == {0, 2}  # as the first row of the matrix has it
    assert set(source[..., 1].unique().tolist()) == {0, 1, 2}


# --- what is compared


@every_space
def test_policies_are_compared_on_sequences_that_all_begin_without_a_memory(space):
    _, actor, _ = make(HAPPOLoss, space)
    data = batch_of(actor, space, live=0.8)
    blank = data.clone().set(STATE, torch.zeros_like(data[STATE]))
    divergence = torch.zeros(AGENTS, AGENTS)
    for i in range(AGENTS):
        for j in range(AGENTS):
            policies = (step_by_step(actor, k, j, blank) for k in (j, i))
            divergence[i, j] = policy_kl(*policies).squeeze(-1)[data["agents", "mask"][..., j]].mean()
    for threshold in divergence.fill_diagonal_(0.0).flatten().tolist():  # just enough, and just too little
        for kl_threshold, holds in ((1.001 * threshold, divergence <= threshold), (0.999 * threshold, None)):
            sampler = ReuseMappingSampler(AGENTS, own_weight=0.6, kl_threshold=kl_threshold)
            sampler.update(actor, data, data["agents", "mask"])
            own = torch.eye(AGENTS, dtype=torch.bool)
            expected = divergence < threshold if holds is None else holds
            assert torch.equal(sampler.matrix > 0, expected | own)


def test_equal_networks_are_equal_whatever_their_states():
    sampler = ReuseMappingSampler(AGENTS, kl_threshold=1e-6, num_rows=2 * STEPS)  # two sequences
    _, actor, _ = make(HAPPOLoss)
    for module in actor.modules():
        for network in getattr(module, "networks", ()):
            network.load_state_dict(module.networks[0].state_dict())
    sampler.update(actor, batch_of(actor))
    assert_close(sampler.matrix, torch.full((AGENTS, AGENTS), 0.15).fill_diagonal_(0.7))


# --- reductions to other methods


@every_turn
@every_space
@functional_or_not
@off_and_own
def test_off_agent_methods_without_reuse_are_the_others_bit_for_bit(off, own, turn, space, functional):
    pair = []
    for cls, more in ((own, {}), (off, {"own_weight": 1.0})):
        loss, actor, critic = make(cls, space, functional=functional, **more)
        pair.append(results(loss, batch_of(actor, space, live=0.7), turn, actor, critic))
    assert_close(*pair, rtol=0, atol=0)


@off_and_own
def test_whole_iterations_without_reuse_are_the_others_bit_for_bit(off, own):
    parameters = []
    for cls, options in ((own, {}), (off, {"own_weight": 1.0})):
        loss, actor, _ = make(cls, **options)
        optimizer = torch.optim.Adam(loss.parameters(), lr=0.01)
        data = batch_of(actor, live=0.8)
        torch.manual_seed(1)
        for _ in range(2):
            for turn in loss.turns(data):
                if turn != "critic" and own is HATRPOLoss:
                    loss.step(data)
                    continue
                before = [parameter.clone() for parameter in loss.parameters()]
                total(loss(data)).backward()
                optimizer.step()
                optimizer.zero_grad()
                moved = [p for p, q in zip(loss.parameters(), before, strict=True) if not torch.equal(p, q)]
                whose = loss.agent_parameters(turn) if turn != "critic" else list(loss.critic_network.parameters())
                assert {id(parameter) for parameter in moved} <= {id(parameter) for parameter in whose}
        parameters.append(list(loss.parameters()))
    assert_close(*parameters, rtol=0, atol=0)


@every_space
def test_outside_of_any_turn_it_is_mappo_with_memories_of_agents_own(space):
    happo, actor, critic = make(HAPPOLoss, space)
    data = batch_of(actor, space, live=0.7)
    ours, theirs = (results(loss, data, None, actor, critic) for loss in (happo, MAPPOLoss(actor, critic)))
    assert_close(ours, theirs, rtol=0, atol=0)


# --- natural-gradient steps, compilation, errors


@pytest.mark.parametrize("cls", [HATRPOLoss, OATRPOLoss])
def test_accepted_steps_keep_within_the_bound_on_their_sequences(cls):
    loss, actor, _ = make(cls, max_kl=0.01)
    data = batch_of(actor, live=0.8)
    for turn in loss.turns(data):
        if turn == "critic":
            continue
        weights = MIXED[turn] if cls is OATRPOLoss else [float(source == turn) for source in range(AGENTS)]
        with torch.no_grad():
            old = [step_by_step(actor, turn, source, data) for source in range(AGENTS)]
            info = loss.step(data)
            new = [step_by_step(actor, turn, source, data) for source in range(AGENTS)]
        kl = 0.0
        for source, weight in enumerate(weights):
            divergence = policy_kl(old[source], new[source]).squeeze(-1)
            kl += weight * divergence[data["agents", "mask"][..., source]].mean()
        assert 0 < info["step_fraction"] <= 1
        assert_close(info["kl"], kl, rtol=1e-3, atol=1e-7)
        assert 0 < kl < 0.01


def test_compiled_turns_equal_eager_ones():
    torch.compiler.reset()
    loss, actor, critic = make(OAPPOLoss, functional=False)
    data = batch_of(actor, live=0.7)[:, :2]
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    expected = results(loss, data, 1, actor, critic)
    output = compiled(data)
    assert_close((dict(output.items()), gradients(output, actor, critic)), expected, **TOLERANCE)


def test_rows_in_place_of_sequences_are_refused():
    loss, actor, _ = make(HAPPOLoss)
    loss.turn = 0
    with pytest.raises(ValueError, match="split batches with"):
        loss(batch_of(actor).reshape(-1))


def test_states_of_another_network_are_refused_where_they_would_be_misread():
    _, actor, _ = make(HAPPOLoss)
    critic = make_critic(group_shape("categorical"), observes="observation", share_parameters=False)
    with pytest.raises(ValueError, match="networks without a memory"):
        SEACLoss(actor, critic)


@pytest.mark.gpu
def test_turns_on_a_gpu_equal_those_on_the_cpu():
    outcomes = []
    for device in ("cpu", "cuda"):
        loss, actor, _ = make(OAPPOLoss)
        data = batch_of(actor, live=0.7).to(device)
        outcomes.append([results(loss.to(device), data, turn)[0]["loss_objective"].cpu() for turn in range(AGENTS)])
    assert_close(*outcomes, rtol=1e-4, atol=1e-5)
