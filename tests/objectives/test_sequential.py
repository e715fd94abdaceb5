"""Sequential methods: whose turn it is, what a turn touches, and the methods that they reduce to."""

import copy
import itertools
import math

import pytest
import torch
from tensordict import TensorDict
from torch.testing import assert_close
from torchrl.modules import PopArtValueNorm

from tests.objectives.loss_factories import (
    AGENTS,
    PADDING,
    SPACES,
    add_transition,
    gradients,
    make_batch,
    make_networks,
    total,
)
from torchrl_marl.modules import AgentNetworks, agent_policy
from torchrl_marl.objectives import (
    HAPPOLoss,
    HATRPOLoss,
    MAPPOLoss,
    MARSLoss,
    NaturalGradientLoss,
    OAPPOLoss,
    OATRPOLoss,
    SequentialLoss,
)
from torchrl_marl.objectives.divergences import policy_kl
from torchrl_marl.objectives.surrogates import barrier_gain

FIRST_ORDER, SECOND_ORDER = (HAPPOLoss, OAPPOLoss), (HATRPOLoss, OATRPOLoss)
OFF_AGENT = (OAPPOLoss, OATRPOLoss)
TOLERANCE = {"rtol": 1e-5, "atol": 1e-6}  # about ten roundings of float32
MIXED = [[0.6, 0.0, 0.4], [0.25, 0.5, 0.25], [0.0, 0.2, 0.8]]

every_loss = pytest.mark.parametrize("cls", [*FIRST_ORDER, *SECOND_ORDER])
one_of_each = pytest.mark.parametrize("cls", [HAPPOLoss, OATRPOLoss])  # own data and others', clip and natural gradient
every_space = pytest.mark.parametrize("space", SPACES)
functional_or_not = pytest.mark.parametrize("functional", [True, False], ids=["functional", "stateful"])
every_turn = pytest.mark.parametrize("turn", [*range(AGENTS), "critic", None])


def make(cls, space="categorical", *, agents=AGENTS, team=False, **options):
    """A loss on networks of agents' own; off-agent ones mix unless told otherwise."""
    networks = make_networks(space, share_parameters=False, agents=agents)
    if cls in OFF_AGENT and not {"reuse_matrix", "own_weight"} & set(options):
        options["reuse_matrix"] = MIXED
    return cls(*networks, **options), *networks


def without_reuse(cls):
    return {"reuse_matrix": "NR"} if cls in OFF_AGENT else {}


def batch_of(actor, space="categorical", *, updated=True, **options):
    """A batch in the midst of an iteration: some agents have already changed."""
    data = make_batch(actor, space, **options)
    if updated:
        generator = torch.Generator().manual_seed(23)
        log_ratio = 0.3 * torch.randn(data["agents", "action_log_prob"].shape, generator=generator)
        data["agents", "update_log_ratio"] = torch.where(torch.arange(log_ratio.shape[-1]) == 1, 0.0, log_ratio)
    return data


def run(loss, data):
    """Forward with the same noise each time, for entropies that are sampled."""
    torch.manual_seed(5)
    return loss(data)


def results(loss, data, turn, *networks):
    """Outputs of a turn and the gradients of their sum."""
    loss.turn = turn
    output = run(loss, data)
    return dict(output.items()), gradients(output, *networks) if networks else []


def snapshot(loss, optimizer):
    """Every agent's parameters and optimiser state, and the critic's, by name."""
    owners = {agent: loss.agent_parameters(agent) for agent in range(loss.num_agents)}
    actors = {id(p) for parameters in owners.values() for p in parameters}
    owners["critic"] = [p for p in loss.parameters() if id(p) not in actors]
    return {
        owner: [(p.detach().clone(), copy.deepcopy(optimizer.state.get(p, {}))) for p in parameters]
        for owner, parameters in owners.items()
    }


def changed(before, after):
    """Owners of whatever is not the same bit for bit."""

    def same(one, other):
        (p, state), (q, new_state) = one, other
        if not torch.equal(p, q) or set(state) != set(new_state):
            return False
        return all(torch.equal(torch.as_tensor(state[k]), torch.as_tensor(new_state[k])) for k in state)

    return [owner for owner in before if not all(map(same, before[owner], after[owner]))]


# --- turns


@every_loss
def test_every_agent_has_its_turn_in_random_order_then_the_critic(cls):
    loss, actor, _ = make(cls)
    data = batch_of(actor, updated=False)
    orders = set()
    for _ in range(30):
        *agents, last = loss.turns(data)
        assert sorted(agents) == list(range(AGENTS))
        assert last == "critic"
        orders.add(tuple(agents))
    assert len(orders) == 6  # of three agents; one of them is missed once in 40 times, not with this seed
    torch.manual_seed(3)
    first = list(loss.turns(data))
    torch.manual_seed(3)
    assert list(loss.turns(data)) == first
    assert list(loss.turns(data, order=[2, 0, 1])) == [2, 0, 1, "critic"]


def test_the_turn_is_what_the_loop_says_and_over_with_it():
    loss, actor, _ = make(HAPPOLoss)
    data = batch_of(actor)
    for turn in loss.turns(data):
        assert loss.turn == turn
    assert loss.turn is None
    turns = loss.turns(data)
    next(turns)
    turns.close()  # as break does
    assert loss.turn is None


@pytest.mark.parametrize("order", [[0, 1], [0, 1, 1], [0, 1, 3], [0, 1, 2, 2]], ids=str)
def test_an_order_that_does_not_name_each_agent_once_raises(order):
    loss, actor, _ = make(HAPPOLoss)
    with pytest.raises(ValueError, match=r"every agent from 0 to 2 once, got \["):
        next(loss.turns(batch_of(actor), order=order))


@pytest.mark.parametrize("turn", [-1, AGENTS, "actor", 0.5], ids=str)
def test_a_turn_of_nobody_raises(turn):
    loss, *_ = make(HAPPOLoss)
    with pytest.raises(ValueError, match="turn must be an agent from 0 to 2, 'critic' or None"):
        loss.turn = turn


@one_of_each
@every_turn
def test_out_keys_are_exactly_what_the_turn_returns(cls, turn):
    loss, actor, critic = make(cls)
    output, _ = results(loss, batch_of(actor), turn, actor, critic)
    assert sorted(output) == sorted(loss.out_keys)
    losses = {
        None: ["loss_objective", "loss_entropy", "loss_critic"],
        "critic": ["loss_critic"],
    }.get(turn, ["loss_objective", "loss_entropy"])
    assert [key for key, value in output.items() if value.requires_grad] == losses


@one_of_each
def test_dispatch_takes_and_returns_plain_tensors_in_every_turn(cls):
    loss, actor, _ = make(cls)
    data = batch_of(actor, live=0.7).select(*loss.in_keys, strict=False)
    tensors = {"_".join(key) if isinstance(key, tuple) else key: value for key, value in data.items(True, True)}
    for turn in (*range(AGENTS), "critic", None):
        loss.turn = turn
        expected = loss(data)
        returned = loss(**tensors)
        returned = returned if isinstance(returned, tuple) else (returned,)
        for key, value in zip(loss.out_keys, returned, strict=True):
            assert_close(value, expected[key], rtol=0, atol=0)


@one_of_each
@every_space
@every_turn
@functional_or_not
def test_forward_does_not_modify_its_input(cls, space, turn, functional):
    loss, actor, _ = make(cls, space, functional=functional)
    data = batch_of(actor, space, batch=(4, 3), live=0.7)
    before = data.clone()
    loss.turn = turn
    run(loss, data)
    assert set(data.keys(True, True)) == set(before.keys(True, True))
    assert (data == before).all()


@one_of_each
@every_turn
def test_in_keys_are_all_that_a_turn_reads(cls, turn):
    loss, actor, _ = make(cls, "masked")
    data = batch_of(actor, "masked", live=0.7)
    data["agents", "unrelated"] = torch.zeros(12, 7)
    few = data.select(*loss.in_keys, strict=False)
    assert ("agents", "update_log_ratio") in few.keys(True)
    assert_close(results(loss, few, turn, actor), results(loss, data, turn, actor), rtol=0, atol=0)


@one_of_each
@every_turn
def test_a_group_may_have_any_name(cls, turn):
    outputs = []
    for name in ("agents", "predators"):
        actor, critic = make_networks("masked", share_parameters=False, name=name)
        options = {"reuse_matrix": MIXED} if cls in OFF_AGENT else {}
        loss = cls(actor, critic, **options)
        data = make_batch(actor, "masked", name=name, live=0.7)
        data[name, "update_log_ratio"] = torch.linspace(-1, 1, 36).reshape(12, AGENTS)
        assert (name, "update_log_ratio") in loss.in_keys
        outputs.append(results(loss, data, turn, actor, critic))
    assert_close(*outputs, rtol=0, atol=0)


# --- what a turn touches


@pytest.mark.parametrize("cls", FIRST_ORDER)
@every_space
@functional_or_not
def test_a_turn_leaves_everybody_else_bit_for_bit_momentum_included(cls, space, functional):
    loss, actor, _ = make(cls, space, functional=functional)
    optimizer = torch.optim.Adam(loss.parameters(), lr=0.01)
    data = batch_of(actor, space, live=0.8)
    for _ in range(2):  # in the second iteration everybody has momentum
        for turn in loss.turns(data):
            before = snapshot(loss, optimizer)
            for _ in range(2):
                total(loss(data)).backward()
                optimizer.step()
                optimizer.zero_grad()
            assert changed(before, snapshot(loss, optimizer)) == [turn]


@pytest.mark.parametrize("cls", SECOND_ORDER)
@every_space
@functional_or_not
def test_a_step_leaves_everybody_else_bit_for_bit(cls, space, functional):
    loss, actor, _ = make(cls, space, functional=functional)
    optimizer = torch.optim.Adam(loss.parameters(), lr=0.01)
    data = batch_of(actor, space, live=0.8)
    for turn in loss.turns(data):
        if turn != "critic":
            before = snapshot(loss, optimizer)
            assert loss.step(data)["step_fraction"] > 0
            assert changed(before, snapshot(loss, optimizer)) == [turn]
    assert all(parameter.grad is None for parameter in loss.parameters())


@every_loss
@every_space
def test_the_learners_network_alone_runs_once_over_its_sources_rows(cls, space):
    # hence an update costs at most the number of sources as much as HAPPO's
    loss, actor, _ = make(cls, space)
    (networks,) = (module for module in actor.modules() if isinstance(module, AgentNetworks))
    calls = []
    for agent, network in enumerate(networks.networks):
        network.register_forward_hook(
            lambda module, inputs, output, agent=agent: calls.append((agent, inputs[0].shape[:-1].numel()))
        )
    data = batch_of(actor, space)
    for agent in range(AGENTS):
        calls.clear()
        loss.turn = agent
        loss(data)
        sources = sum(weight > 0 for weight in MIXED[agent]) if cls in OFF_AGENT else 1
        assert calls == [(agent, 12 * sources)]
    calls.clear()
    loss.turn = "critic"
    loss(data)
    assert calls == []


def test_a_source_drawn_for_each_row_costs_no_more_than_ones_own():
    loss, actor, _ = make(OAPPOLoss, reuse="sampled")
    (networks,) = (module for module in actor.modules() if isinstance(module, AgentNetworks))
    rows = []
    networks.networks[1].register_forward_hook(lambda module, inputs, output: rows.append(inputs[0].shape[:-1].numel()))
    data = batch_of(actor)
    data["agents", "reuse_source"] = loss.reuse.sample((12,))
    loss.turn = 1
    loss(data)
    assert rows == [12]


def test_agent_parameters_are_the_actors_and_disjoint():
    for functional in (True, False):
        loss, actor, _ = make(HAPPOLoss, functional=functional)
        each = [{id(p) for p in loss.agent_parameters(agent)} for agent in range(AGENTS)]
        assert set().union(*each) == {id(p) for p in actor.parameters()}
        assert sum(map(len, each)) == len(list(actor.parameters()))


# --- the compound ratio


@every_loss
@every_space
def test_the_batch_carries_what_agents_have_changed_so_far(cls, space):
    loss, actor, _ = make(cls, space)
    data = make_batch(actor, space, (4, 3), live=0.8)
    live, done = data["agents", "mask"], []
    for turn in loss.turns(data):
        written = data["agents", "update_log_ratio"]
        with torch.no_grad():
            log_prob = actor.get_dist(data.clone()).log_prob(data["agents", "action"])
        had_a_turn = torch.tensor([agent in done for agent in range(AGENTS)])
        expected = torch.where(live & had_a_turn, log_prob - data["agents", "action_log_prob"], 0.0)
        assert_close(written, expected, **TOLERANCE)
        assert not written.requires_grad
        if turn != "critic":
            with torch.no_grad():
                for parameter in loss.agent_parameters(turn):
                    parameter += 0.1 * torch.randn_like(parameter)
            done.append(turn)


@pytest.mark.parametrize("agent", range(AGENTS))
def test_compound_ratios_are_reported_of_rows_where_the_source_lives(agent):
    loss, actor, _ = make(HAPPOLoss)
    data = batch_of(actor, live=0.6)
    live, updates = data["agents", "mask"][:, agent], data["agents", "update_log_ratio"]
    updates[~live] = 2.0  # large where it is dead
    compound = (updates.sum(-1) - updates[:, agent]).exp()
    output, _ = results(loss, data, agent)
    assert_close(output["mean_compound_ratio"], compound[live].mean())
    assert_close(output["max_compound_ratio"], compound[live].max())


def test_what_a_turn_has_read_is_not_changed_by_later_turns():
    loss, actor, _ = make(HAPPOLoss)
    data, read = batch_of(actor, updated=False), []
    for turn in loss.turns(data):
        rows = data.select(*loss.in_keys, strict=False)  # not copied, as a minibatch that holds all rows
        read.append((rows["agents", "update_log_ratio"], rows["agents", "update_log_ratio"].clone()))
        if turn != "critic":
            with torch.no_grad():
                for parameter in loss.agent_parameters(turn):
                    parameter += 0.1
    assert all(torch.equal(*pair) for pair in read)
    assert [int(then.any(0).sum()) for _, then in read] == [0, 1, 2, 3]


@every_space
@pytest.mark.parametrize("live", [None, 0.7], ids=["all-live", "some-dead"])
def test_the_objective_is_the_sum_over_sources_of_the_papers_equation(space, live):
    loss, actor, _ = make(OAPPOLoss, space, normalize_advantage=False, entropy_coeff=0.05)
    data = batch_of(actor, space, live=live)
    mask = data.get(("agents", "mask"), torch.ones(12, AGENTS, dtype=torch.bool))
    updates = data["agents", "update_log_ratio"]
    for agent in range(AGENTS):
        policy = agent_policy(actor, agent).get_dist(data.clone())
        rho = (policy.log_prob(data["agents", "action"]) - data["agents", "action_log_prob"]).double().exp()
        objective = 0.0
        for source in range(AGENTS):
            terms = []
            for b in torch.where(mask[:, source])[0].tolist():
                factor = sum(updates[b, other].item() for other in range(AGENTS) if other != source)
                r, advantage = rho[b, source].item(), data["advantage"][b, source].item()
                clipped = min(r * advantage, min(max(r, 0.8), 1.2) * advantage)
                terms.append(torch.tensor(factor).exp().item() * clipped)
            objective += MIXED[agent][source] * sum(terms) / len(terms)
        output, _ = results(loss, data, agent)
        assert_close(output["loss_objective"].item(), -objective, **TOLERANCE)
        if space != "continuous":  # own observations only
            entropy = policy.entropy()[:, agent][mask[:, agent]].mean()
            assert_close(output["entropy"], entropy, **TOLERANCE)
        assert_close(output["loss_entropy"], -0.05 * output["entropy"], **TOLERANCE)


@one_of_each
def test_nobody_has_changed_before_the_first_turn(cls):
    loss, actor, _ = make(cls)
    data = batch_of(actor, updated=False)
    zeros = data.clone().set(("agents", "update_log_ratio"), torch.zeros(12, AGENTS))
    for turn in range(AGENTS):
        assert_close(results(loss, data, turn, actor), results(loss, zeros, turn, actor), rtol=0, atol=0)


# --- reductions to other methods


@every_turn
@every_space
@functional_or_not
@pytest.mark.parametrize(
    "options", [{"own_weight": 1.0}, {"reuse_matrix": "NR"}, {"kl_threshold": 0.0}], ids=["own_weight", "NR", "gate"]
)
@pytest.mark.parametrize(("off", "own"), [(OAPPOLoss, HAPPOLoss), (OATRPOLoss, HATRPOLoss)])
def test_off_agent_methods_without_reuse_are_the_others_bit_for_bit(off, own, options, turn, space, functional):
    pair = []
    for cls, more in ((own, {}), (off, {"own_weight": 0.5, **options})):
        loss, actor, critic = make(cls, space, functional=functional, **more)
        data = batch_of(actor, space, live=0.7)
        if "kl_threshold" in options and cls is off:
            loss.reuse.update(actor, data, data["agents", "mask"])
        pair.append(results(loss, data, turn, actor, critic))
    assert_close(*pair, rtol=0, atol=0)


@every_space
def test_whole_iterations_without_reuse_are_happos_bit_for_bit(space):
    parameters = []
    for cls, options in ((HAPPOLoss, {}), (OAPPOLoss, {"own_weight": 1.0})):
        loss, actor, _ = make(cls, space, **options)
        optimizer = torch.optim.Adam(loss.parameters(), lr=0.01)
        data = make_batch(actor, space, live=0.8)
        torch.manual_seed(1)
        for _ in range(2):
            for _turn in loss.turns(data):
                total(loss(data)).backward()
                optimizer.step()
                optimizer.zero_grad()
        parameters.append(list(loss.parameters()))
    assert_close(*parameters, rtol=0, atol=0)


@every_space
def test_whole_steps_without_reuse_are_hatrpos_bit_for_bit(space):
    outcomes = []
    for cls, options in ((HATRPOLoss, {}), (OATRPOLoss, {"own_weight": 1.0})):
        loss, actor, _ = make(cls, space, **options)
        data = make_batch(actor, space, live=0.8)
        torch.manual_seed(1)
        steps = [dict(loss.step(data).items()) for turn in loss.turns(data) if turn != "critic"]
        outcomes.append((steps, list(loss.parameters())))
    assert_close(*outcomes, rtol=0, atol=0)


@every_space
@pytest.mark.parametrize("normalize", [True, False], ids=["normalized", "plain"])
@pytest.mark.parametrize("live", [None, 0.7], ids=["all-live", "some-dead"])
def test_happo_with_one_agent_is_ppo(space, normalize, live):
    loss, actor, critic = make(HAPPOLoss, space, agents=1, normalize_advantage=normalize)
    ppo = MAPPOLoss(actor, critic, normalize_advantage=normalize)
    data = make_batch(actor, space, agents=1, live=live)
    output = run(ppo, data)
    for turn, keys in ((0, ("loss_objective", "loss_entropy")), ("critic", ("loss_critic",))):
        in_turn, in_turn_gradients = results(loss, data, turn, actor, critic)
        assert_close({key: in_turn[key] for key in keys}, {key: output[key] for key in keys}, **TOLERANCE)
        expected = gradients({key: output[key] for key in keys}, actor, critic)
        assert_close(in_turn_gradients, expected, rtol=1e-4, atol=1e-5)  # sums in other orders


@pytest.mark.parametrize("cls", FIRST_ORDER)
@every_space
@functional_or_not
def test_all_at_once_is_mappo(cls, space, functional):
    loss, actor, critic = make(cls, space, functional=functional)
    data = batch_of(actor, space, live=0.7)
    mappo = MAPPOLoss(actor, critic, functional=functional)
    output = run(mappo, data)
    expected = dict(output.items()), gradients(output, actor, critic)
    assert_close(results(loss, data, None, actor, critic), expected, rtol=0, atol=0)


@pytest.mark.parametrize("cls", [HAPPOLoss, HATRPOLoss])
def test_with_the_barrier_one_agent_is_mars(cls):
    loss, actor, critic = make(cls, agents=1, gain=barrier_gain, clip_epsilon=(0.2, 0.25), entropy_coeff=0.01)
    mars = MARSLoss(actor, critic, target_ratios=(0.8, 1.25))
    data = make_batch(actor, "categorical", agents=1)
    output, expected = results(loss, data, 0)[0], mars(data)
    assert_close(output["loss_objective"], expected["loss_objective"], **TOLERANCE)


@every_loss
def test_any_gain_fits_any_method(cls):
    seen = []

    def gain(log_ratio, advantage, *, low, high):
        seen.append((float(low), float(high)))
        return 3 * log_ratio + advantage

    loss, actor, _ = make(cls, gain=gain, clip_epsilon=(0.1, 0.3), normalize_advantage=False)
    data = batch_of(actor)
    turn = 1
    updates = data["agents", "update_log_ratio"]
    compound = (updates.sum(-1, keepdim=True) - updates).exp()
    log_prob = agent_policy(actor, turn).get_dist(data.clone()).log_prob(data["agents", "action"])
    values = 3 * (log_prob - data["agents", "action_log_prob"]) + data["advantage"].squeeze(-1)
    weights = torch.tensor(MIXED[turn] if cls in OFF_AGENT else [0.0, 1.0, 0.0])
    expected = -(weights * (compound * values).mean(0)).sum()
    assert_close(results(loss, data, turn)[0]["loss_objective"], expected, **TOLERANCE)
    assert seen == [pytest.approx((0.9, 1.3))]


@pytest.mark.parametrize("cls", [*FIRST_ORDER, *SECOND_ORDER])
def test_the_barrier_trains_every_method(cls):
    loss, actor, _ = make(cls, gain=barrier_gain)
    optimizer = torch.optim.Adam(loss.parameters(), lr=0.01)
    data = make_batch(actor, "categorical")
    with torch.no_grad():  # data of the current policy, as collected
        data["agents", "action_log_prob"] = actor.get_dist(data.clone()).log_prob(data["agents", "action"])
    for turn in loss.turns(data):
        before = total(loss(data)).item()
        if turn != "critic" and cls in SECOND_ORDER:
            loss.step(data)
        for _ in range(5):
            total(loss(data)).backward()
            optimizer.step()
            optimizer.zero_grad()
        assert total(loss(data)).item() < before - 0.005


# --- reuse


def test_reuse_follows_the_policies_at_the_start_of_the_turns():
    loss, actor, _ = make(OAPPOLoss, own_weight=0.6, kl_threshold=1.0)
    data = make_batch(actor, "categorical", live=0.8)
    assert torch.equal(loss.reuse.matrix, torch.eye(AGENTS))
    own = actor.get_dist(data.clone())
    kl = torch.stack([policy_kl(own, agent_policy(actor, i).get_dist(data.clone())) for i in range(AGENTS)])
    live = data["agents", "mask"]
    close = (torch.where(live, kl, 0.0).sum(1) / live.sum(0) <= 1.0).fill_diagonal_(False)
    assert 0 < close.sum() < 6
    matrices = []
    for turn in loss.turns(data):
        matrices.append(loss.reuse.matrix.clone())
        if turn != "critic":
            with torch.no_grad():
                for parameter in loss.agent_parameters(turn):
                    parameter += 1
    assert all(torch.equal(matrix, matrices[0]) for matrix in matrices)  # not again within an iteration
    assert torch.equal(matrices[0] > 0, close | torch.eye(AGENTS, dtype=torch.bool))


def test_drawn_sources_equal_weighted_ones_where_the_draw_is_certain():
    for matrix in ([[0.0, 1, 0], [0, 0, 1], [1, 0, 0]], torch.eye(3).tolist()):
        weighted, actor, _ = make(OAPPOLoss, "masked", reuse_matrix=matrix, entropy_coeff=0.0)
        sampled, *_ = make(OAPPOLoss, "masked", reuse_matrix=matrix, entropy_coeff=0.0, reuse="sampled")
        data = batch_of(actor, "masked", batch=(4, 3), live=0.7)
        updates = data["agents", "update_log_ratio"].clone()
        next(sampled.turns(data))  # draws
        data["agents", "update_log_ratio"] = updates
        for turn in range(AGENTS):
            weighted.turn = sampled.turn = turn
            one, other = weighted(data), sampled(data)
            objectives = one["loss_objective"], other["loss_objective"]
            assert_close(*objectives, **TOLERANCE)
            parameters = weighted.agent_parameters(turn), sampled.agent_parameters(turn)
            assert_close(*map(torch.autograd.grad, objectives, parameters), **TOLERANCE)
            own = matrix[turn][turn] == 1
            assert other["entropy"] == pytest.approx(one["entropy"].item() if own else 0.0, abs=1e-6)


def test_drawn_sources_have_the_weighted_objective_on_average():
    weighted, actor, _ = make(OAPPOLoss, normalize_advantage=False)
    sampled, *_ = make(OAPPOLoss, normalize_advantage=False, reuse="sampled")
    data = torch.cat([batch_of(actor)] * 1000)
    list(sampled.turns(data.exclude(("agents", "update_log_ratio"))))
    data["agents", "reuse_source"] = sampled.reuse.sample((12000,))
    for turn in range(AGENTS):
        expected = results(weighted, data, turn)[0]["loss_objective"]
        assert_close(results(sampled, data, turn)[0]["loss_objective"], expected, rtol=0, atol=0.05)


@pytest.mark.parametrize("cls", OFF_AGENT)
def test_drawn_sources_have_the_weighted_objective_in_expectation_however_unequally_they_live(cls):
    options = {"normalize_advantage": False, "entropy_coeff": 0.0}
    weighted, actor, _ = make(cls, **options)
    sampled, *_ = make(cls, reuse="sampled", **options)
    data = batch_of(actor, batch=(3,), live=1.0)
    data["agents", "mask"][:, 0] = torch.tensor([True, False, True])
    data["agents", "mask"][:, 2] = torch.tensor([False, True, False])
    for turn in range(AGENTS):
        weighted.turn = sampled.turn = turn
        expectation = 0.0
        for sources in itertools.product(range(AGENTS), repeat=3):  # all draws there are, by their probabilities
            data["agents", "reuse_source"] = torch.tensor(sources).unsqueeze(-1).expand(3, AGENTS)
            probability = math.prod(MIXED[turn][source] for source in sources)
            if probability:
                expectation += probability * sampled(data)["loss_objective"].detach()
        assert_close(expectation, weighted(data)["loss_objective"].detach(), **TOLERANCE)


@pytest.mark.parametrize("cls", [OAPPOLoss, OATRPOLoss])
def test_an_unknown_way_of_reuse_raises(cls):
    with pytest.raises(ValueError, match="reuse must be weighted or sampled; got 'all'"):
        make(cls, reuse="all")


# --- dead agents


@one_of_each
@every_space
@every_turn
@pytest.mark.parametrize("normalize", [True, False], ids=["normalized", "plain"])
@pytest.mark.parametrize("padding", [False, True], ids=["dead", "padding"])
def test_garbage_of_dead_agents_and_of_padding_changes_nothing(cls, space, turn, normalize, padding):
    loss, actor, critic = make(cls, space, normalize_advantage=normalize)
    data = batch_of(actor, space, live=0.6, padding=padding)
    dead = ~data[PADDING if padding else ("agents", "mask")]
    data["agents", "update_log_ratio"][dead] = 0
    expected = results(loss, data, turn, actor, critic)
    for log_prob, advantage, target in ((torch.nan, 1e3, torch.nan), (-torch.inf, torch.nan, torch.inf)):
        garbage = data.clone()
        garbage["agents", "action_log_prob"][dead] = log_prob
        garbage["advantage"][dead] = advantage
        if padding:
            garbage["value_target"][dead] = target
        if space == "masked":  # nothing is legal for the dead
            garbage["agents", "action_mask"][dead] = False
        assert_close(results(loss, garbage, turn, actor, critic), expected, **TOLERANCE)


@every_loss
@every_space
def test_whole_turns_are_blind_to_garbage_of_dead_agents(cls, space):
    outcomes = []
    for garbage in (False, True):
        options = {"own_weight": 0.6, "kl_threshold": 0.6} if cls in OFF_AGENT else {}
        loss, actor, _ = make(cls, space, **options)
        optimizer = torch.optim.SGD(loss.parameters(), lr=0.01)
        data = make_batch(actor, space, live=0.6)
        dead = ~data["agents", "mask"]
        if garbage:
            data["agents", "action_log_prob"][dead] = torch.nan
            data["advantage"][dead] = torch.nan
            if space == "masked":
                data["agents", "action_mask"][dead] = False
        torch.manual_seed(1)
        for turn in loss.turns(data):
            torch.manual_seed(2)
            if turn != "critic" and cls in SECOND_ORDER:
                assert loss.step(data)["step_fraction"] > 0
                continue
            total(loss(data)).backward()
            optimizer.step()
            optimizer.zero_grad()
        outcomes.append((list(loss.parameters()), data["agents", "update_log_ratio"]))
    assert_close(*outcomes, rtol=1e-4, atol=1e-5)  # the step's solver amplifies roundings


@one_of_each
def test_rows_where_a_learner_is_dead_equal_dropped_rows(cls):
    loss, actor, _ = make(cls, **without_reuse(cls))
    data = batch_of(actor)
    kept = torch.arange(12) % 3 > 0
    mask = torch.ones(12, AGENTS, dtype=torch.bool)
    mask[:, 1] = kept  # the others live on
    masked = data.clone().set(("agents", "mask"), mask)
    one, other = (results(loss, rows, 1, actor) for rows in (masked, data[kept]))
    assert_close(one, other, **TOLERANCE)


@every_loss
def test_an_agent_that_never_lives_has_no_turn(cls):
    loss, actor, _ = make(cls, **without_reuse(cls))
    data = batch_of(actor, live=1.0)
    data["agents", "mask"][:, 1] = False
    assert sorted(map(str, loss.turns(data))) == ["0", "2", "critic"]


def test_an_agent_that_never_lives_can_learn_from_those_who_do():
    loss, actor, _ = make(OAPPOLoss)
    data = batch_of(actor, live=1.0)
    data["agents", "mask"][:, 1] = False
    assert set(loss.turns(data)) == {0, 1, 2, "critic"}


@every_loss
def test_the_critics_turn_is_mappos_with_dead_agents_and_normalised_values(cls):
    outcomes = []
    for own in (cls, MAPPOLoss):
        networks = make_networks("categorical", share_parameters=False, value_norm=PopArtValueNorm(shape=1))
        data = make_batch(networks[0], "categorical", live=0.6)
        data["value_target"] = 50 + 9 * data["value_target"]
        loss = own(*networks)
        loss.update_value_norm(data)
        loss.turn = "critic"
        output = dict(loss(data).select("loss_critic", "explained_variance").items())
        outcomes.append((output, gradients(output, networks[1]), list(networks[1].buffers())))
    assert_close(*outcomes, rtol=0, atol=0)


# --- natural-gradient steps


@pytest.mark.parametrize("cls", SECOND_ORDER)
@every_space
@pytest.mark.parametrize("max_kl", [0.003, 0.05])
@pytest.mark.parametrize("live", [None, 0.7], ids=["all-live", "some-dead"])
def test_accepted_steps_keep_within_the_bound_on_their_data(cls, space, max_kl, live):
    loss, actor, _ = make(cls, space, max_kl=max_kl)
    data = make_batch(actor, space, (30,), live=live)
    mask = data.get(("agents", "mask"), torch.ones(30, AGENTS, dtype=torch.bool))
    for turn in loss.turns(data):
        if turn == "critic":
            continue
        policy = agent_policy(actor, turn)
        with torch.no_grad():
            old, before = policy.get_dist(data.clone()), loss(data)["loss_objective"]
            info = loss.step(data)
            kl = policy_kl(old, policy.get_dist(data.clone()))
        kl = torch.where(mask, kl, 0.0).sum(0) / mask.sum(0)
        kl = (torch.tensor(MIXED[turn]) * kl).sum() if cls is OATRPOLoss else kl[turn]
        assert 0 < info["step_fraction"] <= 1
        assert_close(info["kl"], kl, rtol=1e-3, atol=1e-7)
        assert 0 < kl < max_kl
        after = loss(data)
        assert_close(before - after["loss_objective"], info["improvement"], rtol=1e-3, atol=1e-6)
        assert info["improvement"] > 0
        assert set(info.keys()) > set(after.keys())
        assert_close(info["loss_objective"], after["loss_objective"], **TOLERANCE)


@pytest.mark.parametrize("cls", SECOND_ORDER)
def test_a_sampled_entropy_does_not_disturb_the_line_search(cls):
    # So small a step improves as its slope says, within the same noise; between two samples the entropy of 30 rows
    # differs by 0.1.
    loss, actor, _ = make(cls, "continuous", max_kl=1e-6, entropy_coeff=1.0)
    data = make_batch(actor, "continuous", (30,))
    for turn in loss.turns(data):
        if turn != "critic":
            info = loss.step(data)
            assert info["step_fraction"] >= 0.8
            promised = (info["step_fraction"] * info["expected_improvement"]).item()
            assert 0 < promised < 0.01
            assert info["improvement"].item() == pytest.approx(promised, rel=0.05)


@pytest.mark.parametrize("cls", SECOND_ORDER)
def test_the_bound_can_be_scheduled(cls):
    loss, actor, _ = make(cls)
    data = make_batch(actor, "categorical", (30,))
    loss.max_kl = 1e-5
    assert "max_kl" in loss.state_dict()
    for turn in loss.turns(data):
        if turn != "critic":
            assert 0 < loss.step(data)["kl"] < 1e-5


@pytest.mark.parametrize("cls", SECOND_ORDER)
@pytest.mark.parametrize("turn", ["critic", None])
def test_a_step_is_an_agents(cls, turn):
    loss, actor, _ = make(cls)
    loss.turn = turn
    with pytest.raises(ValueError, match=f"the turn is {turn!r}"):
        loss.step(batch_of(actor))


@pytest.mark.parametrize("cls", SECOND_ORDER)
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_a_step_compares_means(cls, reduction):
    loss, actor, _ = make(cls, reduction=reduction)
    loss.turn = 0
    with pytest.raises(ValueError, match=f"needs reduction='mean', not '{reduction}'"):
        loss.step(batch_of(actor))


# --- shapes, state, compilation, errors


@one_of_each
def test_a_teams_advantage_is_every_agents(cls):
    loss, actor, _ = make(cls)
    team = batch_of(actor, team=True)
    each = team.clone().set("advantage", team["advantage"].unsqueeze(1).expand(12, AGENTS, 1))
    for turn in range(AGENTS):
        assert_close(results(loss, team, turn, actor), results(loss, each, turn, actor), rtol=0, atol=0)


@one_of_each
def test_a_teams_advantage_is_standardised_where_the_source_lives(cls):
    loss, actor, _ = make(cls)
    team = batch_of(actor, team=True, live=0.6)
    mask = team["agents", "mask"]
    each = team["advantage"].expand(12, AGENTS).clone()
    for source in range(AGENTS):
        rows = mask[:, source]
        each[:, source] = (each[:, source] - each[rows, source].mean()) / each[rows, source].std()
    plain, plain_actor, _ = make(cls, normalize_advantage=False)
    by_hand = team.clone().set("advantage", each.unsqueeze(-1))
    for turn in range(AGENTS):
        assert_close(results(loss, team, turn, actor), results(plain, by_hand, turn, plain_actor), **TOLERANCE)


@one_of_each
@every_turn
@pytest.mark.parametrize("live", [None, 0.6], ids=["all-live", "some-dead"])
def test_reductions_agree(cls, turn, live):
    outputs = {}
    for reduction in ("none", "sum", "mean"):
        loss, actor, _ = make(cls, reduction=reduction)
        data = batch_of(actor, batch=(4, 3), live=live)
        outputs[reduction] = results(loss, data, turn)[0]
    mask = data.get(("agents", "mask"), torch.ones(4, 3, AGENTS, dtype=torch.bool))
    for key in (key for key in outputs["mean"] if key.startswith("loss_")):
        none = outputs["none"][key]
        assert none.shape[:2] == (4, 3)
        assert_close(outputs["sum"][key], none.sum(), **TOLERANCE)
        if isinstance(turn, int) and key == "loss_objective":
            off = cls in OFF_AGENT
            sources = [j for j in range(AGENTS) if MIXED[turn][j] > 0] if off else [turn]
            mean = (none.sum((0, 1)) / mask.sum((0, 1))[sources]).sum()
        else:
            counted = torch.ones_like(mask) if key == "loss_critic" else mask
            mean = none.sum() / (counted[..., turn] if isinstance(turn, int) else counted).sum()
        assert_close(outputs["mean"][key], mean, **TOLERANCE)


@one_of_each
@every_turn
def test_batch_and_time_equal_a_flat_batch(cls, turn):
    loss, actor, critic = make(cls)
    data = batch_of(actor, batch=(4, 3), live=0.7)
    assert_close(*(results(loss, rows, turn, actor, critic) for rows in (data, data.reshape(-1))), **TOLERANCE)


@one_of_each
@every_turn
@functional_or_not
def test_a_missing_advantage_is_computed_by_the_value_estimator(cls, turn, functional):
    loss, actor, critic = make(cls, functional=functional)
    loss.make_value_estimator(gamma=0.9, lmbda=0.8)
    data = add_transition(batch_of(actor, batch=(4, 3)))
    computed = data.clone()
    with torch.no_grad():
        loss.value_estimator(computed, params=loss.critic_network_params)
    assert_close(*(results(loss, rows, turn, actor, critic) for rows in (data, computed)), **TOLERANCE)


@one_of_each
@functional_or_not
def test_state_dict_round_trip(cls, functional, tmp_path):
    options = {"own_weight": 0.5, "kl_threshold": 10.0} if cls in OFF_AGENT else {}
    loss, actor, _ = make(cls, functional=functional, **options)
    data = batch_of(actor)
    list(loss.turns(data))
    expected = results(loss, data, 2, actor)
    torch.save(loss.state_dict(), tmp_path / "loss.pt")
    other, other_actor, _ = make(cls, functional=functional, **options)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    other.load_state_dict(torch.load(tmp_path / "loss.pt", weights_only=True))
    assert_close(results(other, data, 2, other_actor), expected, rtol=0, atol=0)
    assert len(loss.state_dict()) == len(set(loss.state_dict()))


@one_of_each
@functional_or_not
def test_a_deep_copy_is_independent(cls, functional):
    loss, actor, _ = make(cls, functional=functional)
    data = batch_of(actor)
    twin = copy.deepcopy(loss)
    twin.turn = loss.turn = 1
    expected = run(loss, data)
    assert_close(dict(run(twin, data).items()), dict(expected.items()), rtol=0, atol=0)
    with torch.no_grad():
        for parameter in loss.agent_parameters(1):
            parameter.zero_()
    assert_close(dict(run(twin, data).items()), dict(expected.items()), rtol=0, atol=0)
    assert run(loss, data)["loss_objective"] != expected["loss_objective"]


@one_of_each
def test_compiled_turns_equal_eager_ones(cls):
    torch.compiler.reset()
    loss, actor, critic = make(cls, functional=False)
    data = batch_of(actor, live=0.7)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for turn in (1, "critic"):
        expected = results(loss, data, turn, actor, critic)
        output = compiled(data)
        assert_close((dict(output.items()), gradients(output, actor, critic)), expected, **TOLERANCE)


@one_of_each
def test_what_is_compiled_for_one_agent_serves_all(cls):
    torch.compiler.reset()
    options = {"reuse_matrix": "AR"} if cls in OFF_AGENT else {}
    loss, actor, _ = make(cls, agents=4, functional=False, **options)
    data = make_batch(actor, "categorical", agents=4, live=0.8)
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph

    compiled = torch.compile(loss, fullgraph=True, backend=count)
    for _ in loss.turns(data):
        compiled(data)
    assert len(graphs) == 2  # an agent's and the critic's


@pytest.mark.gpu
@every_loss
@every_space
def test_turns_on_a_gpu_equal_those_on_the_cpu(cls, space):
    outcomes = []
    for device in ("cpu", "cuda"):
        loss, actor, _ = make(cls, space)
        data = make_batch(actor, space, live=0.7).to(device)
        loss = loss.to(device)
        torch.manual_seed(1)
        for turn in loss.turns(data):
            if turn != "critic" and cls in SECOND_ORDER:
                loss.step(data)
        outcomes.append([p.detach().cpu() for p in loss.parameters()])
    assert_close(*outcomes, rtol=1e-3, atol=1e-4)


@every_loss
def test_agents_that_share_parameters_raise(cls):
    with pytest.raises(ValueError, match=r"network of its own.*share_parameters=False"):
        cls(*make_networks("categorical"))


@pytest.mark.parametrize("cls", [HATRPOLoss, OATRPOLoss])
@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("max_kl", 0.0),
        ("max_kl", math.inf),
        ("damping", -1.0),
        ("accept_ratio", -0.1),
        ("backtrack", 1.0),
        ("backtrack", 0.0),
        ("num_iterations", 0),
        ("num_backtracks", 0),
    ],
)
def test_a_step_that_cannot_be_taken_is_refused(cls, option, value):
    with pytest.raises(ValueError, match=f"{option}.* must be .*{value}"):
        make(cls, **{option: value})


@pytest.mark.parametrize("cls", [SequentialLoss, NaturalGradientLoss])
def test_base_classes_are_abstract(cls):
    networks = make_networks("categorical", share_parameters=False)
    with pytest.raises(TypeError, match="abstract"):
        cls(*networks, gain=barrier_gain)
    assert isinstance(type("Own", (cls,), {})(*networks, gain=barrier_gain), cls)


@one_of_each
@pytest.mark.parametrize("key", [("agents", "action"), ("agents", "action_log_prob")], ids=str)
def test_a_missing_entry_is_named(cls, key):
    loss, actor, _ = make(cls)
    loss.turn = 1
    with pytest.raises(KeyError) as error:
        loss(batch_of(actor).exclude(key))
    assert f"{key!r} is missing" in error.value.args[0]


def test_a_missing_draw_is_named():
    loss, actor, _ = make(OAPPOLoss, reuse="sampled")
    assert ("agents", "reuse_source") in loss.in_keys
    loss.turn = 1
    with pytest.raises(KeyError, match="reuse_source"):
        loss(batch_of(actor))


@one_of_each
@pytest.mark.parametrize("shape", [(12, AGENTS), (12,), (12, AGENTS, 2), (12, 1, 1)], ids=str)
def test_an_advantage_of_another_shape_raises_instead_of_broadcasting(cls, shape):
    loss, actor, _ = make(cls)
    data = batch_of(actor)
    assert isinstance(data, TensorDict)
    data["advantage"] = torch.zeros(shape)
    for turn in range(AGENTS):
        loss.turn = turn
        with pytest.raises(ValueError, match="shape"):
            loss(data)
