"""What every loss of ``METHODS`` promises."""

import math

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule, TensorDictParams
from torch import nn
from torch.distributions import Categorical, Distribution
from torch.testing import assert_close
from torchrl.modules import ProbabilisticActor, TanhNormal
from torchrl.objectives import ValueEstimators
from torchrl.objectives.value import GAE, MultiAgentGAE

from tests.objectives.loss_factories import (
    ACTIONS,
    AGENTS,
    OBSERVATION,
    PADDING,
    STATE,
    add_transition,
    gradients,
    make_batch,
    make_networks,
    make_team_critic,
    total,
)
from tests.objectives.test_reductions import (
    LOSSES,
    METHODS,
    TOLERANCE,
    Method,
    barrier,
    clipped,
    every_method,
    every_space,
    functional_or_not,
    make,
    networks_of,
    quadratic,
    run,
)
from torchrl_marl.objectives import (
    IPPOLoss,
    MAPPOLoss,
    MARSLoss,
    MASPOLoss,
    RatioLoss,
)
from torchrl_marl.objectives.surrogates import quadratic_gain

VARIANTS = {  # the same code with other numbers: only their equations need a test of their own
    "asymmetric-MAPPO": Method(MAPPOLoss, clipped(0.9, 1.3), {"clip_epsilon": (0.1, 0.3)}),
    "asymmetric-MASPO": Method(MASPOLoss, quadratic(0.9, 1.3), {"clip_epsilon": (0.1, 0.3)}),
    "asymmetric-MARS": Method(MARSLoss, barrier(0.5, 1.25), {"target_ratios": (0.5, 1.25)}),
    "wide-IPPO": Method(IPPOLoss, clipped(0.6, 1.4), {"clip_epsilon": 0.4}, observes="observation"),
}

SHARING = {name: method for name, method in METHODS.items() if not method.own_networks}
every_method_of_alike_agents = pytest.mark.parametrize("method", SHARING.values(), ids=SHARING)
WITH_ADVANTAGES = {name: method for name, method in METHODS.items() if method.reads_advantages}
every_variant = pytest.mark.parametrize("method", (WITH_ADVANTAGES | VARIANTS).values(), ids=WITH_ADVANTAGES | VARIANTS)
every_method_with_advantages = pytest.mark.parametrize("method", WITH_ADVANTAGES.values(), ids=WITH_ADVANTAGES)


def values(output, *, entropy=True):
    """Everything that forward returned as a plain dict, by choice without what may be sampled."""
    return {key: value for key, value in output.items() if entropy or "entropy" not in key}


# --- what comes out


@every_method
@every_space
@pytest.mark.parametrize("share_parameters", [True, False], ids=["shared", "own"])
@functional_or_not
def test_losses_and_gradients_are_finite_scalars(method, space, share_parameters, functional):
    if method.own_networks and share_parameters:
        pytest.skip("refused, see test_sequential.py")
    networks = networks_of(method, space, share_parameters=share_parameters)
    loss, actor, critic = make(method, networks=networks, functional=functional)
    output = run(loss, make_batch(actor, space))
    for value in output.values():
        assert value.shape == ()
        assert value.isfinite()
    for gradient in gradients(output, actor, critic):
        assert gradient.isfinite().all()
        assert gradient.any()


@every_method
def test_out_keys_are_exactly_what_forward_returns(method):
    loss, actor, _ = make(method)
    output = loss(make_batch(actor, "categorical"))
    assert sorted(output.keys(True, True)) == sorted(loss.out_keys)
    assert output.batch_size == ()


@every_method
def test_only_losses_carry_gradients(method):
    loss, actor, _ = make(method)
    output = loss(make_batch(actor, "categorical"))
    assert [key for key, value in output.items() if value.requires_grad] == list(LOSSES)


@every_variant
@every_space
@pytest.mark.parametrize("live", [None, 0.6], ids=["all-live", "some-dead"])
def test_losses_are_means_of_the_papers_equations(method, space, live):
    loss, actor, critic = make(method, space, entropy_coeff=0.03, critic_coeff=0.7, normalize_advantage=False)
    data = make_batch(actor, space, live=live)
    output = run(loss, data)
    with torch.no_grad():
        distribution = actor.get_dist(data.clone())
        log_prob = distribution.log_prob(data["agents", "action"])
        value = critic(data.clone())["agents", "state_value"].squeeze(-1)
    mask = data.get(("agents", "mask"), torch.ones_like(log_prob, dtype=torch.bool))
    ratio = (log_prob - data["agents", "action_log_prob"]).double().exp()[mask]
    advantage = data["advantage"].squeeze(-1)[mask]
    gain = [method.gain(r, a) for r, a in zip(ratio.tolist(), advantage.tolist(), strict=True)]
    assert_close(output["loss_objective"].item(), -sum(gain) / len(gain), **TOLERANCE)
    # smooth l1: half the square below 1, the distance less a half above
    error = (value - data["value_target"].squeeze(-1)).abs()  # of the dead, too: returns bootstrap from their values
    distance = torch.where(error < 1, error.square() / 2, error - 0.5)
    assert_close(output["loss_critic"], 0.7 * distance.mean(), **TOLERANCE)
    if space != "continuous":
        p = distribution.probs
        entropy = -torch.where(p > 0, p * p.log(), 0.0).sum(-1)[mask].mean()
        assert_close(output["entropy"], entropy, **TOLERANCE)
    assert_close(output["loss_entropy"], -0.03 * output["entropy"], **TOLERANCE)


@every_method
@pytest.mark.parametrize("live", [None, 0.6], ids=["all-live", "some-dead"])
def test_a_clipped_value_costs_the_larger_of_two_distances_in_every_method(method, live):
    """PPO's clipped value loss (MARS Table 2 tunes it): max((v - R)^2, (v_old + clip(v - v_old, -e, e) - R)^2)."""
    loss, actor, critic = make(method, clip_value=0.1, loss_critic_type="l2", critic_coeff=1.0)
    data = make_batch(actor, "categorical", live=live)
    with torch.no_grad():
        value = critic(data.clone())["agents", "state_value"]
    data["agents", "state_value"] = value + torch.linspace(-0.3, 0.3, value.numel()).view_as(value)
    assert ("agents", "state_value") in loss.in_keys
    error, expected = value - data["value_target"], []
    for v, old, e in zip(value.flatten(), data["agents", "state_value"].flatten(), error.flatten(), strict=True):
        target, clipped = v - e, old + max(-0.1, min(0.1, v - old))
        expected.append(max(e**2, (clipped - target) ** 2))
    found = run(loss, data)["loss_critic"]
    assert_close(found, sum(expected) / len(expected), **TOLERANCE)
    assert found > error.square().mean()  # some moved too far
    with pytest.raises(KeyError, match="state_value"):
        loss(data.exclude(("agents", "state_value")))


@every_space
@pytest.mark.parametrize("live", [None, 0.6], ids=["all-live", "some-dead"])
def test_diagnostics_are_what_their_names_say(space, live):
    loss, actor, critic = make(VARIANTS["asymmetric-MAPPO"], space)
    data = make_batch(actor, space, live=live)
    output = run(loss, data)
    with torch.no_grad():
        log_prob = actor.get_dist(data.clone()).log_prob(data["agents", "action"])
        value = critic(data.clone())["agents", "state_value"].squeeze(-1)
    mask = data.get(("agents", "mask"), torch.ones_like(log_prob, dtype=torch.bool))
    ratio = (log_prob - data["agents", "action_log_prob"]).exp()[mask]
    target = data["value_target"].squeeze(-1)
    assert_close(output["kl_approx"], (ratio - 1 - ratio.log()).mean(), **TOLERANCE)
    assert_close(output["clip_fraction"].item(), sum(not 0.9 <= r <= 1.3 for r in ratio.tolist()) / len(ratio))
    assert_close(output["min_ratio"], ratio.min(), **TOLERANCE)
    assert_close(output["max_ratio"], ratio.max(), **TOLERANCE)
    unexplained = (target - value).var(unbiased=False) / target.var(unbiased=False)
    assert_close(output["explained_variance"], 1 - unexplained, **TOLERANCE)


@pytest.mark.parametrize("shift", [0.5, -0.5])
def test_dead_agents_do_not_bound_the_ratios(shift):
    # Every live ratio is e^shift; a dead agent's ratio of one is neither the smallest nor the largest.
    loss, actor, _ = make(METHODS["MAPPO"])
    data = make_batch(actor, "categorical", live=0.6)
    with torch.no_grad():
        data["agents", "action_log_prob"] = actor.get_dist(data.clone()).log_prob(data["agents", "action"]) - shift
    output = loss(data)
    expected = torch.tensor(shift).exp()
    assert_close((output["min_ratio"], output["max_ratio"]), (expected, expected), **TOLERANCE)


@pytest.mark.parametrize("kind", ["smooth_l1", "l2", "l1"])
def test_critic_loss_is_the_distance_of_its_type(kind):
    loss, actor, critic = make(METHODS["MAPPO"], loss_critic_type=kind)
    data = make_batch(actor, "categorical")
    error = (critic(data.clone())["agents", "state_value"] - data["value_target"]).abs()
    assert error.min() < 1 < error.max()
    smooth = torch.where(error < 1, error**2 / 2, error - 0.5)
    expected = {"smooth_l1": smooth, "l2": error**2, "l1": error}[kind].mean()
    assert_close(loss(data)["loss_critic"], expected, **TOLERANCE)


def test_sampled_entropy_is_exact_where_the_squashing_saturates():
    # At loc 12 tanh is 1 in float32. The entropy of the squashed variable is E[log(1 - tanh^2)] plus the Gaussian's,
    # about 2 ln 2 - 2 * 12 + 1.42 = -21.2; float64 has the digits to sample it without tricks.
    loc, scale = torch.full((2000, 1, 1), 12.0), torch.ones(2000, 1, 1)
    actor = ProbabilisticActor(
        TensorDictModule(nn.Identity(), in_keys=["parameters"], out_keys=["parameters"]),
        in_keys={"loc": "loc", "scale": "scale"},
        out_keys=[("agents", "action")],
        distribution_class=TanhNormal,
        return_log_prob=True,
        log_prob_key=("agents", "action_log_prob"),
    )
    data = TensorDict(
        {
            "parameters": torch.zeros(2000),
            "loc": loc,
            "scale": scale.requires_grad_(),
            "state": torch.zeros(2000, STATE),
            "agents": {"action": torch.zeros(2000, 1, 1), "action_log_prob": torch.zeros(2000, 1)},
            "advantage": torch.zeros(2000, 1),
            "value_target": torch.zeros(2000, 1),
        },
        batch_size=2000,
    )
    output = MAPPOLoss(actor, make_team_critic(), entropy_coeff=1.0)(data)
    assert output["entropy"].item() == pytest.approx(-21.2, abs=0.1)
    (gradient,) = torch.autograd.grad(output["loss_entropy"], data["scale"])
    assert gradient.sum().item() == pytest.approx(-1, abs=0.1)  # of a Gaussian: d(-ln scale) = -1


# --- what goes in


@every_method
@every_space
@pytest.mark.parametrize("estimated", [False, True], ids=["advantage-given", "advantage-estimated"])
@functional_or_not
def test_forward_does_not_modify_its_input(method, space, estimated, functional):
    loss, actor, _ = make(method, space, functional=functional)
    data = make_batch(actor, space, (4, 3), live=0.7)
    data = add_transition(data) if estimated else data
    before = data.clone()
    run(loss, data)
    assert sorted(map(str, data.keys(True, True))) == sorted(map(str, before.keys(True, True)))
    assert (data == before).all()


@every_method
@every_space
def test_in_keys_are_all_that_forward_reads(method, space):
    loss, actor, _ = make(method, space)
    data = make_batch(actor, space, live=0.7)
    data["agents", "unrelated"] = torch.zeros(12, AGENTS)
    few = data.select(*loss.in_keys, strict=False)
    assert ("agents", "unrelated") not in few.keys(True)
    assert_close(values(run(loss, few)), values(run(loss, data)), rtol=0, atol=0)


@every_method
@every_space
def test_every_in_key_but_the_masks_is_needed(method, space):
    loss, actor, _ = make(method, space)
    data = make_batch(actor, space, live=0.7).select(*loss.in_keys, strict=False)
    needed = set(data.keys(True, True)) - {("agents", "mask"), "advantage"}  # an advantage can be computed
    assert needed <= set(loss.in_keys)
    for key in needed:
        kind = ValueError if key[-1] == "action_mask" else KeyError  # TorchRL's masked categorical sees None
        with pytest.raises(kind, match="mask" if kind is ValueError else key if isinstance(key, str) else key[-1]):
            loss(data.exclude(key))


@every_method
@pytest.mark.parametrize("key", [("agents", "action"), ("agents", "action_log_prob"), "value_target"], ids=str)
def test_a_missing_entry_is_named(method, key):
    loss, actor, _ = make(method)
    data = make_batch(actor, "categorical").exclude(key)
    with pytest.raises(KeyError) as error:
        loss(data)
    assert f"{key!r} is missing" in error.value.args[0]
    assert "observation" in error.value.args[0]  # what there is instead


@every_method
@pytest.mark.parametrize("live", [None, 0.6], ids=["all-live", "some-dead"])
@functional_or_not
def test_entries_can_be_selected_as_of_any_torchrl_loss(method, live, functional):
    loss, actor, _ = make(method, functional=functional)
    data = make_batch(actor, "categorical", live=live)
    everything, names = loss(data), list(loss.out_keys)
    selected = ["loss_critic", "entropy"]
    assert loss.select_out_keys(*selected) is loss
    assert sorted(loss.out_keys) == sorted(loss(data).keys()) == sorted(selected)
    assert_close(loss(data), everything.select(*selected), rtol=0, atol=0)
    read = data.select(*loss.in_keys, strict=False).items(True, True)
    tensors = {"_".join(key) if isinstance(key, tuple) else key: value for key, value in read}
    if live is not None:  # dispatch wants every in-key
        assert_close(loss(**tensors), tuple(everything[key] for key in loss.out_keys), rtol=0, atol=0)
    with pytest.raises(ValueError, match=r"out_keys must be some of loss_objective.*\['loss'\]"):
        loss.select_out_keys("loss")
    loss.reset_out_keys()
    assert loss.out_keys == names
    assert_close(loss(data), everything, rtol=0, atol=0)


@every_method
def test_dispatch_takes_and_returns_plain_tensors(method):
    loss, actor, _ = make(method)
    data = make_batch(actor, "categorical", live=0.7).select(*loss.in_keys, strict=False)
    expected = loss(data)
    read = data.select(*loss.in_keys, strict=False).items(True, True)
    tensors = {"_".join(key) if isinstance(key, tuple) else key: value for key, value in read}
    returned = loss(**tensors)
    assert len(returned) == len(loss.out_keys)
    for key, value in zip(loss.out_keys, returned, strict=True):
        assert_close(value, expected[key], rtol=0, atol=0)


@every_method
@every_space
@pytest.mark.parametrize("estimated", [False, True], ids=["advantage-given", "advantage-estimated"])
@functional_or_not
def test_a_group_may_have_any_name(method, space, estimated, functional):
    outputs = []
    for name in ("agents", "predators"):
        networks = networks_of(method, space, name=name)
        loss, actor, _ = make(method, networks=networks, functional=functional)
        assert (name, "action") in loss.in_keys
        data = make_batch(actor, space, (4, 3), name=name, live=0.7)
        data = add_transition(data, name=name) if estimated else data
        outputs.append(values(run(loss, data)))
    assert_close(*outputs, rtol=0, atol=0)


@every_method
def test_the_data_of_another_group_are_not_read(method):
    loss, actor, _ = make(method, networks=networks_of(method, "categorical", name="predators"))
    data = make_batch(actor, "categorical", name="predators")
    expected = values(loss(data))
    data["agents"] = {"mask": torch.zeros(12, 7, dtype=torch.bool), "action_log_prob": torch.zeros(12, 7)}
    assert_close(values(loss(data)), expected, rtol=0, atol=0)


RENAMED = {
    "action": ("agents", "taken"),
    "sample_log_prob": ("agents", "old", "log_prob"),
    "advantage": ("agents", "credit"),
    "value_target": ("agents", "return"),
    "mask": "alive",
}


@every_method
@every_space
def test_every_key_can_be_renamed(method, space):
    loss, actor, _ = make(method, space)
    data = make_batch(actor, space, live=0.7)
    expected = values(run(loss, data))
    renamed = data.clone()
    for name, new in RENAMED.items():
        renamed.rename_key_(getattr(loss.tensor_keys, name), new)
    loss.set_keys(**RENAMED)
    assert set(RENAMED.values()) <= set(loss.in_keys)
    assert_close(values(run(loss, renamed)), expected, rtol=0, atol=0)


@every_method
def test_the_values_key_is_read_off_the_critic(method):
    actor, critic = networks_of(method, "categorical")
    loss, *_ = make(method, networks=(actor, critic))
    data = make_batch(actor, "categorical")
    odd = TensorDictModule(critic.module, in_keys=critic.in_keys, out_keys=[("agents", "worth")])
    renamed, *_ = make(method, networks=(actor, odd))
    assert renamed.tensor_keys.value == ("agents", "worth")
    assert_close(values(renamed(data)), values(loss(data)), rtol=0, atol=0)


def test_the_state_value_is_the_value_of_a_critic_with_more_outputs():
    network = nn.Linear(STATE, 3)
    critic = TensorDictModule(lambda state: network(state).split(1, -1), ["state"], ["a", ("x", "state_value"), "b"])
    actor, _ = make_networks("categorical")
    loss = MAPPOLoss(actor, critic)
    assert loss.tensor_keys.value == ("x", "state_value")


# --- which gradient goes where


@every_method
@every_space
@functional_or_not
def test_each_loss_trains_one_network_only(method, space, functional):
    loss, actor, critic = make(method, space, functional=functional)
    # the critic takes part in the advantage, too, even through an estimator that offers gradients
    loss.make_value_estimator(gamma=0.9, lmbda=0.8, differentiable=True)
    output = run(loss, add_transition(make_batch(actor, space, (4, 3))))
    reach = {
        key: [any(g.any() for g in gradients({key: output[key]}, network)) for network in (actor, critic)]
        for key in LOSSES
    }
    assert reach == {"loss_objective": [True, False], "loss_entropy": [True, False], "loss_critic": [False, True]}


@every_method
@every_space
def test_functional_equals_stateful_in_values_and_gradients(method, space):
    networks = networks_of(method, space)
    data = make_batch(networks[0], space, live=0.7)
    results = []
    for functional in (True, False):
        loss, *_ = make(method, networks=networks, functional=functional)
        assert loss.functional is functional
        output = run(loss, data)
        results.append((values(output), gradients(output, *networks)))
    assert_close(*results, rtol=0, atol=0)


@every_method
def test_a_functional_loss_uses_the_parameters_that_it_holds(method):
    # Zeros in place of both networks' parameters: a uniform policy, values of zero.
    loss, actor, critic = make(method)
    before = [parameter.clone() for parameter in [*actor.parameters(), *critic.parameters()]]
    for name in ("actor_network_params", "critic_network_params"):
        setattr(loss, name, TensorDictParams(getattr(loss, name).data.clone().zero_()))
    data = make_batch(actor, "categorical")
    data["value_target"] = torch.full_like(data["value_target"], 3.0)
    output = loss(data)
    assert_close(output["entropy"], torch.tensor(float(ACTIONS)).log(), **TOLERANCE)
    assert_close(output["loss_critic"].item(), 2.5)  # smooth l1 of 3
    loss.make_value_estimator(gamma=0.9, lmbda=0.0)
    data = add_transition(make_batch(actor, "categorical", (4, 3)))
    given = data.clone().set("advantage", data["next", "agents", "reward"])  # all values are zero, the next ones, too
    given["value_target"] = given["advantage"]
    assert_close(values(loss(data)), values(loss(given)), **TOLERANCE)
    assert_close([*actor.parameters(), *critic.parameters()], before, rtol=0, atol=0)


@every_method
@functional_or_not
def test_a_loss_holds_the_networks_own_parameters(method, functional):
    loss, actor, critic = make(method, functional=functional)
    assert {id(p) for p in loss.parameters()} == {id(p) for p in [*actor.parameters(), *critic.parameters()]}


# --- dead agents and padding


@every_method
@every_space
@functional_or_not
def test_padded_steps_equal_dropped_steps(method, space, functional):
    loss, actor, critic = make(method, space, functional=functional)
    data = make_batch(actor, space)
    kept = torch.arange(12) % 3 > 0
    dropped = data[kept]
    data[PADDING] = kept.unsqueeze(-1)
    sampled = space == "continuous"
    outputs = [values(run(loss, batch), entropy=not sampled) for batch in (data, dropped)]
    assert_close(*outputs, **TOLERANCE)
    assert_close(*(gradients(output, actor, critic) for output in outputs), **TOLERANCE)


@every_method
@every_space
@functional_or_not
def test_steps_without_a_living_agent_train_the_critic_alone(method, space, functional):
    loss, actor, critic = make(method, space, functional=functional)
    data = make_batch(actor, space)
    kept = torch.arange(12) % 3 > 0
    whole, dropped = data.clone(), data[kept]
    data["agents", "mask"] = kept.unsqueeze(-1).expand(12, AGENTS)
    policy = {"loss_objective": 0.0} if space == "continuous" else {"loss_objective": 0.0, "loss_entropy": 0.0}
    output, of_policy, of_critic = run(loss, data), run(loss, dropped), run(loss, whole)
    assert_close({key: output[key] for key in policy}, {key: of_policy[key] for key in policy}, **TOLERANCE)
    assert_close(output["loss_critic"], of_critic["loss_critic"], **TOLERANCE)
    assert_close(gradients(output, critic), gradients(of_critic, critic), **TOLERANCE)
    if space != "continuous":  # else noise of the entropy
        assert_close(gradients(output, actor), gradients(of_policy, actor), **TOLERANCE)


@every_method_of_alike_agents
@every_space
@pytest.mark.parametrize("normalize", [True, False], ids=["normalized", "plain"])
def test_padded_agents_equal_dropped_agents(method, space, normalize):
    # Networks that treat every agent alike: the live rows of all agents, stacked as the rows of a single agent.
    options = {"normalize_advantage": normalize, "normalize_advantage_exclude_dims": ()}
    several = make_networks(space, "observation", agent_id=False)
    single = make_networks(space, "observation", agents=1, agent_id=False)
    data = make_batch(several[0], space, live=0.6, padding=True)
    mask = data[PADDING]
    rows = TensorDict(
        {
            "agents": {key: value[mask].unsqueeze(1) for key, value in data["agents"].items()},
            "advantage": data["advantage"][mask].unsqueeze(1),
            "value_target": data["value_target"][mask].unsqueeze(1),
        },
        batch_size=int(mask.sum()),
    )
    results = []
    for networks, batch in ((several, data), (single, rows)):
        loss, *_ = make(method, networks=networks, **options)
        output = values(run(loss, batch), entropy=space != "continuous")
        results.append((output, gradients(output, *networks)))
    assert_close(*results, **TOLERANCE)


@every_method
@every_space
@pytest.mark.parametrize("normalize", [True, False], ids=["normalized", "plain"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("padding", [False, True], ids=["dead", "padding"])
def test_garbage_of_dead_agents_and_of_padding_changes_nothing(method, space, normalize, reduction, padding):
    loss, actor, critic = make(method, space, normalize_advantage=normalize, reduction=reduction)
    data = make_batch(actor, space, live=0.6, padding=padding)
    dead = ~data[PADDING if padding else ("agents", "mask")]
    expected = run(loss, data)
    for log_prob, advantage, target in ((torch.nan, 1e3, torch.nan), (-torch.inf, torch.nan, torch.inf)):
        garbage = data.clone()
        garbage["agents", "action_log_prob"][dead] = log_prob
        garbage["advantage"][dead] = advantage
        if padding:
            garbage["value_target"][dead] = target
        if space == "masked":  # nothing is legal for the dead
            garbage["agents", "action_mask"][dead] = False
        output = run(loss, garbage)
        assert_close(values(output), values(expected), rtol=0, atol=0)
        assert_close(gradients(output, actor, critic), gradients(expected, actor, critic), **TOLERANCE)


@every_method_with_advantages
@pytest.mark.parametrize("normalize", [True, False], ids=["normalized", "plain"])
def test_a_gain_sees_dead_agents_at_ratio_one_with_no_advantage(method, normalize):
    seen = []

    def gain(log_ratio, advantage, *, low, high):
        seen.append((log_ratio, advantage))
        return advantage

    loss, actor, _ = make(method, gain=gain, normalize_advantage=normalize)
    data = make_batch(actor, "categorical", live=0.6)
    dead = ~data["agents", "mask"]
    data["agents", "action_log_prob"][dead], data["advantage"][dead] = torch.nan, torch.nan
    loss(data)
    for tensor in seen[0]:
        assert (tensor[dead] == 0).all()
        assert (tensor[~dead] != 0).all()


@every_method_with_advantages
@pytest.mark.parametrize(
    ("key", "losses"),
    [
        (("agents", "action_log_prob"), {"loss_objective"}),
        ("advantage", {"loss_objective"}),
        ("value_target", {"loss_critic"}),
    ],
    ids=str,
)
def test_garbage_of_live_agents_is_not_hidden(method, key, losses):
    loss, actor, _ = make(method)
    data = make_batch(actor, "categorical", live=0.6)
    data[key][data["agents", "mask"].nonzero()[0][0]] = torch.nan
    output = loss(data)
    assert {name for name in LOSSES if output[name].isnan()} == losses


@every_method
@every_space
@pytest.mark.parametrize("normalize", [True, False], ids=["normalized", "plain"])
def test_a_batch_of_padding_gives_zero_losses_and_gradients(method, space, normalize):
    loss, actor, critic = make(method, space, normalize_advantage=normalize)
    data = make_batch(actor, space, live=0.0, padding=True)
    data["advantage"][:], data["value_target"][:] = torch.nan, torch.nan
    output = loss(data)
    assert all(output[key] == 0 for key in LOSSES)
    assert not any(gradient.any() for gradient in gradients(output, actor, critic))


@every_method
@every_space
@pytest.mark.parametrize("normalize", [True, False], ids=["normalized", "plain"])
def test_a_batch_of_dead_agents_trains_the_critic_alone(method, space, normalize):
    loss, actor, critic = make(method, space, normalize_advantage=normalize)
    data = make_batch(actor, space, live=0.0)
    data["advantage"][:] = torch.nan
    output = loss(data)
    assert output["loss_objective"] == output["loss_entropy"] == 0
    assert not any(gradient.any() for gradient in gradients(output, actor))
    assert all(gradient.any() and gradient.isfinite().all() for gradient in gradients(output, critic))


@every_method
@pytest.mark.parametrize("shape", [(6, 2), (6, 2, 1), (6, 2, AGENTS), (6, 2, AGENTS, 1)], ids=str)
@pytest.mark.parametrize("key", [("collector", "mask"), "shifted_valid", ("my", "valid")], ids=str)
def test_torchrls_masks_are_honoured(method, shape, key):
    loss, actor, _ = make(method)
    data = make_batch(actor, "categorical", (6, 2))
    valid = torch.rand(shape) < 0.6
    per_agent = valid.reshape(6, 2, -1).expand(6, 2, AGENTS)
    expected = values(loss(data.clone().set("shifted_valid", per_agent)))
    data[key] = valid
    if key == ("my", "valid"):
        assert loss(data)["loss_objective"] != expected["loss_objective"]  # not one that TorchRL writes itself
        loss.loss_mask_key = key
    assert key in loss.in_keys
    assert_close(values(loss(data)), expected, rtol=0, atol=0)


@every_method
def test_torchrls_masks_are_off_when_the_key_is_none(method):
    loss, actor, _ = make(method)
    data = make_batch(actor, "categorical", live=0.6)
    expected = values(loss(data))
    loss.loss_mask_key = None
    data["collector", "mask"] = torch.zeros(12, 1, dtype=torch.bool)
    assert ("collector", "mask") not in loss.in_keys
    assert_close(values(loss(data)), expected, rtol=0, atol=0)


@every_method
def test_several_masks_are_joined(method):
    loss, actor, _ = make(method)
    data = make_batch(actor, "categorical", live=0.8)
    padding = torch.arange(12) < 9
    expected = values(loss(data[padding]))
    data[PADDING] = padding.unsqueeze(-1)
    assert_close(values(loss(data)), expected, **TOLERANCE)


@every_method
@pytest.mark.parametrize("shape", [(11, AGENTS), (12, 2), (12, AGENTS, 2), (AGENTS,)], ids=str)
def test_a_mask_that_does_not_fit_raises(method, shape):
    loss, actor, _ = make(method)
    data = make_batch(actor, "categorical").auto_batch_size_(0)
    data["agents", "mask"] = torch.ones(shape, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"mask .* has shape"):
        loss(data)


# --- symmetries and reductions


@every_method_of_alike_agents
@every_space
@pytest.mark.parametrize("live", [None, 0.6], ids=["all-live", "some-dead"])
def test_permuting_agents_permutes_the_losses(method, space, live):
    networks = make_networks(space, "observation", agent_id=False)
    loss, *_ = make(method, networks=networks, reduction="none")
    mean, *_ = make(method, networks=networks)
    data = make_batch(networks[0], space, live=live)
    order = [2, 0, 1]
    permuted = data.clone()
    permuted["agents"] = permuted["agents"].apply(lambda x: x[:, order])
    for key in ("advantage", "value_target"):
        permuted[key] = permuted[key][:, order]
    keys = LOSSES if space != "continuous" else ("loss_objective", "loss_critic")
    for key in keys:
        assert_close(loss(permuted)[key], loss(data)[key][:, order], **TOLERANCE)
        assert_close(mean(permuted)[key], mean(data)[key], **TOLERANCE)


@every_method
@every_space
@pytest.mark.parametrize("live", [None, 0.6], ids=["all-live", "some-dead"])
def test_reductions_agree(method, space, live):
    networks = networks_of(method, space)
    data = make_batch(networks[0], space, (4, 3), live=live)
    none, total_, mean = (
        run(make(method, networks=networks, reduction=reduction)[0], data) for reduction in ("none", "sum", "mean")
    )
    live = data.get(("agents", "mask"), torch.ones(4, 3, AGENTS, dtype=torch.bool))
    for key in LOSSES:
        assert none[key].shape == (4, 3, AGENTS)
        assert_close(total_[key], none[key].sum(), **TOLERANCE)
        counted = live.numel() if key == "loss_critic" else live.sum()
        assert_close(mean[key], none[key].sum() / counted, **TOLERANCE)
        if key != "loss_critic":
            assert (none[key][~live] == 0).all()
    for key in set(mean.keys()) - set(LOSSES):
        assert none[key].shape == ()
        assert_close(none[key], mean[key], rtol=0, atol=0)


@every_method
@every_space
def test_batch_and_time_equal_a_flat_batch(method, space):
    loss, actor, critic = make(method, space, normalize_advantage=False)
    data = make_batch(actor, space, (4, 3), live=0.7)
    outputs = [run(loss, data), run(loss, data.reshape(-1))]
    assert_close(*map(values, outputs), **TOLERANCE)
    assert_close(*(gradients(output, actor, critic) for output in outputs), **TOLERANCE)


# --- critics


@every_method
@pytest.mark.parametrize("observes", ["joint_observation", "state", "observation"])
@functional_or_not
def test_the_critic_may_observe_anything(method, observes, functional):
    networks = networks_of(method, "categorical", observes)
    loss, actor, critic = make(method, networks=networks, functional=functional)
    reads = "state" if observes == "state" else ("agents", "observation")
    assert reads in loss.in_keys
    assert ("state" in loss.in_keys) == (observes == "state")
    data = make_batch(actor, "categorical")
    before = loss(data)
    data[reads] = data[reads] + 1
    assert loss(data)["loss_critic"] != before["loss_critic"]
    assert all(g.any() for g in gradients(before, critic))


@every_method_with_advantages
@functional_or_not
@pytest.mark.parametrize("normalize", [True, False], ids=["normalized", "plain"])
def test_a_team_critic_gives_every_agent_the_teams_advantage(method, functional, normalize):
    # One value and one advantage a step: the objective is that of agents who all have this advantage.
    actor, per_agent = networks_of(method, "categorical")
    critic = make_team_critic()
    loss, *_ = make(method, networks=(actor, critic), functional=functional, normalize_advantage=normalize)
    loss.set_keys(reward="reward")
    assert loss.tensor_keys.value == "state_value"
    data = make_batch(actor, "categorical", team=True)
    output = loss(data)
    copied = data.clone()
    for key in ("advantage", "value_target"):
        copied[key] = data[key].unsqueeze(1).expand(12, AGENTS, 1)
    agents, *_ = make(method, networks=(actor, per_agent), functional=functional, normalize_advantage=normalize)
    assert_close(output["loss_objective"], agents(copied)["loss_objective"], **TOLERANCE)
    error = (critic(data.clone())["state_value"] - data["value_target"]).abs()
    smooth = torch.where(error < 1, error**2 / 2, error - 0.5)
    assert_close(output["loss_critic"], smooth.mean(), **TOLERANCE)
    assert all(g.any() for g in gradients(output, actor, critic))


@every_method_with_advantages
def test_a_teams_value_counts_where_any_row_is_data(method):
    actor, _ = networks_of(method, "categorical")
    loss, *_ = make(method, networks=(actor, make_team_critic()))
    data = make_batch(actor, "categorical", team=True)
    mask = torch.ones(12, AGENTS, dtype=torch.bool)
    mask[:4, 1:] = False  # one agent's row is
    mask[8:] = False
    dropped = data[:8].set(PADDING, mask[:8])
    data[PADDING] = mask
    data["value_target"][8:], data["advantage"][8:] = torch.nan, torch.nan
    assert_close(values(loss(data)), values(loss(dropped)), **TOLERANCE)


@every_method
@every_space
@pytest.mark.parametrize("team", [False, True], ids=["per-agent", "team"])
@functional_or_not
def test_a_missing_advantage_is_computed_by_the_value_estimator(method, space, team, functional):
    if team and not method.reads_advantages:
        pytest.skip("its critics are the agents' own")
    actor, critic = networks_of(method, space)
    critic = make_team_critic() if team else critic
    loss, *_ = make(method, networks=(actor, critic), functional=functional)
    if team:
        loss.set_keys(reward="reward")
    loss.make_value_estimator(gamma=0.9, lmbda=0.8)
    data = add_transition(make_batch(actor, space, (4, 3)), team=team)
    computed = data.clone()
    with torch.no_grad():
        loss.value_estimator(computed, params=loss.critic_network_params)
    assert computed["advantage"].shape == computed["value_target"].shape == ((4, 3, 1) if team else (4, 3, AGENTS, 1))
    outputs = [run(loss, data), run(loss, computed)]
    assert_close(*map(values, outputs), **TOLERANCE)
    assert_close(*(gradients(output, actor, critic) for output in outputs), **TOLERANCE)


@every_method
@functional_or_not
def test_a_missing_advantage_needs_no_prepared_estimator(method, functional):
    # The default is multi-agent GAE with gamma 0.99 and lambda 0.95
    loss, actor, _ = make(method, functional=functional)
    data = add_transition(make_batch(actor, "categorical", (4, 3)))
    default = values(loss(data))
    loss.make_value_estimator(gamma=0.99, lmbda=0.95)
    assert isinstance(loss.value_estimator, MultiAgentGAE)
    assert_close(values(loss(data)), default, rtol=0, atol=0)


@every_method
def test_any_value_estimator_can_be_chosen(method):
    loss, actor, _ = make(method)
    data = add_transition(make_batch(actor, "categorical", (4, 3)))
    expected = values(loss.make_value_estimator(gamma=0.9, lmbda=0.8)(data))
    by_class = loss.make_value_estimator(MultiAgentGAE, value_network=loss.critic_network, gamma=0.9, lmbda=0.8)(data)
    assert_close(values(by_class), expected, rtol=0, atol=0)
    instance = MultiAgentGAE(value_network=loss.critic_network, gamma=0.9, lmbda=0.8)
    assert_close(values(loss.make_value_estimator(instance)(data)), expected, rtol=0, atol=0)
    assert loss.value_estimator is instance


@every_method
def test_v_trace_which_knows_no_agents_is_refused(method):
    with pytest.raises(NotImplementedError, match="VTrace"):
        make(method)[0].make_value_estimator(ValueEstimators.VTrace)


@every_method
def test_the_one_step_estimator_can_be_chosen(method):
    # target = r + gamma V(next) unless terminated. TorchRL's TD(0) needs dones of the shape of the value.
    loss, actor, critic = make(method)
    loss.set_keys(done=("agents", "done"), terminated=("agents", "terminated"))
    loss.make_value_estimator("td0", gamma=0.9)
    assert not isinstance(loss.value_estimator, GAE)
    data = add_transition(make_batch(actor, "categorical", (4, 3)))
    nxt = data["next"]
    for key in ("done", "terminated"):
        nxt["agents", key] = nxt[key].unsqueeze(-2).expand(4, 3, AGENTS, 1)
    with torch.no_grad():
        future = critic(nxt.clone())["agents", "state_value"] * ~nxt["agents", "terminated"]
        target = nxt["agents", "reward"] + 0.9 * future
        advantage = target - critic(data.clone())["agents", "state_value"]
    given = data.clone().set("advantage", advantage).set("value_target", target)
    assert_close(values(loss(data)), values(loss(given)), **TOLERANCE)


RENAMED_SIGNALS = {
    "reward": ("agents", "payoff"),
    "done": "over",
    "terminated": "dead_end",
    "advantage": "credit",
    "value_target": ("agents", "return"),
}


@every_method
@pytest.mark.parametrize("order", ["keys-first", "estimator-first"])
def test_the_value_estimator_follows_renamed_keys(method, order):
    loss, actor, _ = make(method)
    loss.make_value_estimator(gamma=0.9, lmbda=0.8)
    data = add_transition(make_batch(actor, "categorical", (4, 3)))
    expected = values(loss(data))
    nxt = data["next"]
    for name in ("reward", "done", "terminated"):
        nxt.rename_key_(getattr(loss.tensor_keys, name), RENAMED_SIGNALS[name])
    renamed, *_ = make(method)
    if order == "estimator-first":
        renamed.make_value_estimator(gamma=0.9, lmbda=0.8)
    renamed.set_keys(**RENAMED_SIGNALS)
    if order == "keys-first":
        renamed.make_value_estimator(gamma=0.9, lmbda=0.8)
    assert_close(values(renamed(data)), expected, **TOLERANCE)


# --- state, schedules, compilation


@every_method
@functional_or_not
def test_state_dict_round_trip(method, functional, tmp_path):
    loss, actor, _ = make(method, functional=functional)
    data = make_batch(actor, "categorical")
    loss.ratio_high = 1.4
    loss.entropy_coeff = 0.5
    expected = values(loss(data))
    torch.save(loss.state_dict(), tmp_path / "loss.pt")
    other, other_actor, other_critic = make(method, functional=functional)
    with torch.no_grad():
        for parameter in [*other_actor.parameters(), *other_critic.parameters()]:
            parameter.zero_()
    assert other(data)["loss_objective"] != expected["loss_objective"]
    other.load_state_dict(torch.load(tmp_path / "loss.pt", weights_only=True))
    assert_close(values(other(data)), expected, rtol=0, atol=0)


@every_method
def test_bounds_and_coefficients_can_be_scheduled_by_assignment(method):
    loss, actor, critic = make(method)
    data = make_batch(actor, "categorical")
    before = loss(data)
    buffers = {name: getattr(loss, name) for name in ("ratio_low", "ratio_high", "entropy_coeff", "critic_coeff")}
    loss.ratio_low, loss.ratio_high = 0.95, 1.1
    loss.entropy_coeff, loss.critic_coeff = 0.02, 3.0
    for name, buffer in buffers.items():
        assert getattr(loss, name) is buffer
        assert name in loss.state_dict()
    bounds = (0.95, 1.1)
    options = {"target_ratios": bounds} if method.loss is MARSLoss else {"clip_epsilon": (0.05, 0.1)}
    built, *_ = make(method, networks=(actor, critic), entropy_coeff=0.02, critic_coeff=3.0, **options)
    after = loss(data)
    assert_close(values(after), values(built(data)), **TOLERANCE)
    assert after["loss_objective"] != before["loss_objective"]
    assert_close(after["loss_entropy"], 2 * before["loss_entropy"], **TOLERANCE)
    assert_close(after["loss_critic"], 3 * before["loss_critic"], **TOLERANCE)


@every_method_with_advantages
def test_any_gain_fits_any_method(method):
    calls = []

    def gain(log_ratio, advantage, *, low, high):
        calls.append((log_ratio.shape, advantage.shape, float(low), float(high)))
        return 3 * log_ratio + advantage

    loss, actor, _ = make(method, gain=gain, normalize_advantage=False)
    data = make_batch(actor, "categorical")
    log_ratio = actor.get_dist(data.clone()).log_prob(data["agents", "action"]) - data["agents", "action_log_prob"]
    assert_close(loss(data)["loss_objective"], -(3 * log_ratio.mean() + data["advantage"].mean()), **TOLERANCE)
    assert calls == [((12, AGENTS), (12, AGENTS), loss.ratio_low.item(), loss.ratio_high.item())]


def assert_compiled_equals_eager(loss, actor, critic, data, backend):
    compiled = torch.compile(loss, fullgraph=True, backend=backend)
    outputs = [run(module, data) for module in (compiled, loss)]
    assert_close(*map(values, outputs), **TOLERANCE)
    assert_close(*(gradients(output, actor, critic) for output in outputs), **TOLERANCE)


@every_method
def test_compiled_graph_equals_eager(method):
    torch.compiler.reset()
    loss, actor, critic = make(method, functional=False)
    assert_compiled_equals_eager(loss, actor, critic, make_batch(actor, "categorical", live=0.7), "aot_eager")


@pytest.mark.parametrize("space", ["masked", "continuous"])
@pytest.mark.parametrize("functional", [True, False], ids=["functional", "stateful"])
def test_compiled_graph_equals_eager_in_every_action_space(space, functional):
    torch.compiler.reset()
    loss, actor, critic = make(METHODS["MARS"], space, functional=functional, entropy_coeff=0.0)
    data = make_batch(actor, space)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    outputs = [run(module, data) for module in (compiled, loss)]
    # compiled noise differs from eager noise: leave the value of a sampled entropy out
    assert_close(*(values(output, entropy=space != "continuous") for output in outputs), **TOLERANCE)
    assert_close(*(gradients(output, actor, critic) for output in outputs), **TOLERANCE)


def test_compiled_machine_code_equals_eager():
    torch.compiler.reset()
    networks = make_networks("categorical", share_parameters=False)
    loss, actor, critic = make(METHODS["MARS"], networks=networks, functional=False)
    assert_compiled_equals_eager(loss, actor, critic, make_batch(actor, "categorical", live=0.7), "inductor")


def test_a_compiled_loss_follows_its_schedules():
    torch.compiler.reset()
    loss, actor, _ = make(METHODS["MARS"], functional=False)
    data = make_batch(actor, "categorical")
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    compiled(data)
    loss.ratio_high = 1.1
    assert_close(compiled(data)["loss_objective"], loss(data)["loss_objective"], **TOLERANCE)


@pytest.mark.gpu
@every_method
@every_space
@functional_or_not
def test_losses_on_a_gpu_equal_those_on_the_cpu(method, space, functional):
    loss, actor, critic = make(method, space, functional=functional)
    data = make_batch(actor, space, live=0.7)
    expected = values(run(loss, data), entropy=space != "continuous")
    expected_gradients = gradients(expected, actor, critic)
    loss, data = loss.to("cuda"), data.to("cuda")
    output = values(run(loss, data), entropy=space != "continuous")
    assert all(value.device.type == "cuda" for value in output.values())
    parameters = list(loss.parameters())
    on_gpu = torch.autograd.grad(total(output), parameters)
    assert_close([g.cpu() for g in on_gpu], expected_gradients, rtol=1e-4, atol=1e-5)
    assert_close({key: value.cpu() for key, value in output.items()}, expected, rtol=1e-4, atol=1e-5)


# --- errors


@every_method_with_advantages
@pytest.mark.parametrize(
    "shape", [(12, AGENTS), (12,), (12, AGENTS, 2), (12, 1, 1), (12, AGENTS, AGENTS), (1, AGENTS, 1)], ids=str
)
@pytest.mark.parametrize("normalize", [True, False], ids=["normalized", "plain"])
@pytest.mark.parametrize("live", [None, 0.7], ids=["all-live", "some-dead"])
def test_an_advantage_of_another_shape_raises_instead_of_broadcasting(method, shape, normalize, live):
    loss, actor, _ = make(method, normalize_advantage=normalize)
    data = make_batch(actor, "categorical", live=live).auto_batch_size_(0) if shape[0] == 12 else None
    if data is None:  # a wrong first dimension does not fit into a TensorDict with a batch size
        data = make_batch(actor, "categorical", live=live)
        data.batch_size = []
    data["advantage"] = torch.zeros(shape)
    with pytest.raises(ValueError, match="shape"):
        loss(data)


@every_method
def test_a_value_target_of_another_shape_raises(method):
    loss, actor, _ = make(method)
    data = make_batch(actor, "categorical")
    data["value_target"] = torch.zeros(12, 1)
    with pytest.raises(ValueError, match="'value_target' has shape"):
        loss(data)


@every_method
def test_a_joint_log_probability_raises(method):
    loss, actor, _ = make(method)
    data = make_batch(actor, "categorical")
    data["agents", "action_log_prob"] = torch.zeros(12, 1)
    with pytest.raises(ValueError, match=r"must be \[\*batch, agents\]"):
        loss(data)


@every_method
def test_a_stored_log_probability_with_gradient_raises(method):
    loss, actor, _ = make(method)
    data = make_batch(actor, "categorical")
    data["agents", "action_log_prob"] = data["agents", "action_log_prob"].requires_grad_()
    with pytest.raises(ValueError, match="requires grad"):
        loss(data)


@every_method
@pytest.mark.parametrize(
    ("option", "value", "says"),
    [
        ("reduction", "average", "mean, sum, none"),
        ("loss_critic_type", "huber", "smooth_l1, l2, l1"),
    ],
)
def test_unknown_options_raise_and_list_the_known(method, option, value, says):
    with pytest.raises(ValueError, match=f"{option} must be one of {says}; got '{value}'"):
        make(method, **{option: value})


@every_method
@pytest.mark.parametrize("option", ["entropy_coeff", "critic_coeff"])
@pytest.mark.parametrize("value", [-1e-3, math.nan, math.inf])
def test_a_coefficient_that_turns_a_loss_around_is_refused(method, option, value):
    with pytest.raises(ValueError, match=f"{option} must be a number of at least 0; got {value}"):
        make(method, **{option: value})


BASE_OPTIONS = {
    "gain": quadratic_gain,
    "low": 0.8,
    "high": 1.2,
    "entropy_coeff": 0.0,
    "critic_coeff": 1.0,
    "loss_critic_type": "l2",
    "normalize_advantage": True,
    "normalize_advantage_exclude_dims": (-2,),
    "functional": True,
    "reduction": "mean",
}


def test_the_base_class_is_abstract():
    with pytest.raises(TypeError, match="abstract"):
        RatioLoss(*make_networks("categorical"), **BASE_OPTIONS)


class Own(RatioLoss):
    """A method of a user's own."""


@pytest.mark.parametrize(("low", "high"), [(1.0, 1.2), (0.8, 1.0), (0.0, 1.2), (-0.5, 1.2), (1.2, 0.8), (0.8, 0.9)])
def test_a_users_own_method_needs_bounds_around_one_too(low, high):
    networks = make_networks("categorical")
    assert Own(*networks, **BASE_OPTIONS).ratio_high == torch.tensor(1.2)
    with pytest.raises(ValueError, match="0 < low < 1 < high, got low="):
        Own(*networks, **BASE_OPTIONS | {"low": low, "high": high})


def test_a_distribution_without_any_entropy_raises():
    class Opaque(Distribution):
        """Wraps a categorical; knows neither its entropy nor how to sample with a gradient."""

        has_rsample = False

        def __init__(self, logits):
            self.inner = Categorical(logits=logits)
            super().__init__(self.inner.batch_shape, validate_args=False)

        def log_prob(self, value):
            return self.inner.log_prob(value)

    actor = ProbabilisticActor(
        TensorDictModule(nn.Linear(OBSERVATION, ACTIONS), [("agents", "observation")], [("agents", "logits")]),
        in_keys=[("agents", "logits")],
        out_keys=[("agents", "action")],
        distribution_class=Opaque,
        return_log_prob=True,
        log_prob_key=("agents", "action_log_prob"),
    )
    categorical, critic = make_networks("categorical")
    data = make_batch(categorical, "categorical")
    with pytest.raises(ValueError, match="Opaque has neither a closed-form entropy"):
        MAPPOLoss(actor, critic)(data)
