"""Value normalisation as MAPPO's authors do it, and the standardisation of advantages."""

import numpy as np
import pytest
import torch
import torchrl.objectives.multiagent as torchrl_multiagent
from torch.testing import assert_close
from torchrl.modules import PercentileValueNorm, PopArtValueNorm, RunningValueNorm

from tests.objectives.loss_factories import (
    AGENTS,
    OBSERVATION,
    PADDING,
    add_transition,
    gradients,
    make_batch,
    make_networks,
)
from torchrl_marl.modules import Denormalize
from torchrl_marl.objectives import IPPOLoss, MAPPOLoss, MARSLoss, MASPOLoss, standardize

TOLERANCE = {"rtol": 1e-5, "atol": 1e-6}  # about ten roundings of float32
LOSSES = {"MAPPO": MAPPOLoss, "IPPO": IPPOLoss, "MASPO": MASPOLoss, "MARS": MARSLoss}

every_loss = pytest.mark.parametrize("loss_class", LOSSES.values(), ids=LOSSES)
functional_or_not = pytest.mark.parametrize("functional", [True, False], ids=["functional", "stateful"])


def norm_of(mean, deviation):
    """Running statistics with this mean and standard deviation."""
    norm = RunningValueNorm(shape=1)
    norm.update(torch.tensor([[mean - deviation], [mean + deviation]], dtype=torch.float32))
    return norm


def prediction_and_value(critic, data):
    """What the critic's network predicts, and what the critic says that the value is."""
    inputs = data.get(critic.in_keys[0])
    return critic.module[:-1](inputs), critic.module(inputs)


# --- Denormalize


@pytest.mark.parametrize("observes", ["joint_observation", "state", "observation"])
@pytest.mark.parametrize("share_parameters", [True, False], ids=["shared", "own"])
def test_a_critic_with_value_norm_speaks_in_units_of_the_return(observes, share_parameters):
    networks = make_networks("categorical", observes, value_norm=norm_of(500, 50), share_parameters=share_parameters)
    data = make_batch(networks[0], "categorical")
    prediction, value = prediction_and_value(networks[1], data)
    assert value.shape == (12, AGENTS, 1)
    assert_close(value, 500 + 50 * prediction)
    assert_close(networks[1](data)["agents", "state_value"], value)


def test_denormalize_follows_its_statistics():
    norm = PopArtValueNorm(shape=1, beta=0.5)
    layer = Denormalize(norm)
    assert layer.value_norm is norm
    norm.update(torch.tensor([[1.0], [5.0]]))
    assert_close(layer(torch.tensor([[-1.0], [0.0], [1.0]])).flatten(), torch.tensor([1.0, 3.0, 5.0]))
    norm.update(torch.tensor([[-1.0], [-1.0]]))  # weights 1/3 and 2/3: mean 1/3, mean square 13/3 + 2/3 = 5
    assert_close(layer(torch.tensor([0.0, 1.0])[:, None]).flatten(), torch.tensor([1 / 3, 1 / 3 + (5 - 1 / 9) ** 0.5]))


@functional_or_not
def test_value_estimators_see_values_in_units_of_the_return(functional):
    # gamma 0: advantage = reward - V, so that V can be read off
    networks = make_networks("categorical", value_norm=norm_of(500, 50))
    loss = MAPPOLoss(*networks, functional=functional).make_value_estimator(gamma=0.0, lmbda=0.0)
    data = add_transition(make_batch(networks[0], "categorical", (4, 3)))
    with torch.no_grad():
        prediction, _ = prediction_and_value(networks[1], data)
        loss.value_estimator(data, params=loss.critic_network_params)
    value = data["next", "agents", "reward"] - data["advantage"]
    assert_close(value, 500 + 50 * prediction)
    assert_close(data["value_target"], data["next", "agents", "reward"], rtol=0, atol=1e-4)


@functional_or_not
def test_a_constant_reward_is_worth_its_discounted_sum_in_units_of_the_return(functional):
    # With V = 1 / (1 - gamma) = 10 everywhere, reward 1 and no end, every target is 10 and every advantage 0.
    networks = make_networks("categorical", value_norm=norm_of(10, 7))
    with torch.no_grad():
        for parameter in networks[1].parameters():
            parameter.zero_()  # predicts 0: the mean, 10
    loss = MAPPOLoss(*networks, functional=functional).make_value_estimator(gamma=0.9, lmbda=0.95)
    data = add_transition(make_batch(networks[0], "categorical", (4, 3)))
    data["next", "agents", "reward"] = torch.ones(4, 3, AGENTS, 1)
    data["next", "done"] = data["next", "terminated"] = torch.zeros(4, 3, 1, dtype=torch.bool)
    with torch.no_grad():
        loss.value_estimator(data, params=loss.critic_network_params)
    assert_close(data["value_target"], torch.full((4, 3, AGENTS, 1), 10.0), rtol=1e-5, atol=0)
    assert_close(data["advantage"], torch.zeros(4, 3, AGENTS, 1), rtol=0, atol=1e-4)


# --- the critic's loss


@every_loss
@functional_or_not
@pytest.mark.parametrize("kind", ["smooth_l1", "l2", "l1"])
@pytest.mark.parametrize("live", [None, 0.6], ids=["all-live", "some-dead"])
def test_critic_loss_is_measured_in_normalized_units(loss_class, functional, kind, live):
    # distance(prediction, (target - mean) / deviation), with the network's own prediction
    networks = make_networks("categorical", value_norm=norm_of(500, 50))
    loss = loss_class(*networks, functional=functional, loss_critic_type=kind)
    data = make_batch(networks[0], "categorical", live=live)
    data["value_target"] = 500 + 50 * data["value_target"]
    prediction, _ = prediction_and_value(networks[1], data)
    error = (prediction - (data["value_target"] - 500) / 50).abs().squeeze(-1)
    assert error.min() < 1 < error.max()
    distance = {"smooth_l1": torch.where(error < 1, error**2 / 2, error - 0.5), "l2": error**2, "l1": error}[kind]
    output = loss(data)
    # V - target cancels hundreds down to one: the roundings of 500 / 50, ten of them
    tolerance = {"rtol": 1e-4, "atol": 1e-5}
    assert_close(output["loss_critic"], distance.mean(), **tolerance)
    ours = gradients({"loss_": output["loss_critic"]}, networks[1])
    assert_close(ours, gradients({"loss_": distance.mean()}, networks[1]), **tolerance)


def test_the_critics_loss_and_gradient_do_not_depend_on_the_unit_of_the_reward():
    results = []
    for unit in (1.0, 1000.0):
        networks = make_networks("categorical", value_norm=norm_of(2 * unit, 3 * unit))
        data = make_batch(networks[0], "categorical")
        data["value_target"] = unit * data["value_target"]
        output = MAPPOLoss(*networks)(data)
        results.append([output["loss_critic"], *gradients({"loss_": output["loss_critic"]}, networks[1])])
    assert_close(*results, **TOLERANCE)


def test_torchrls_value_norm_with_a_denormalizing_critic_gives_the_same_gradient():
    # TorchRL's loss normalises prediction and target: the mean cancels. It moves the statistics in forward.
    norm, twin = PopArtValueNorm(shape=1), PopArtValueNorm(shape=1)
    networks = make_networks("categorical", value_norm=norm)
    theirs = make_networks("categorical", value_norm=twin)
    data = make_batch(networks[0], "categorical")
    data["value_target"] = 500 + 50 * data["value_target"]
    ours = MAPPOLoss(*networks)
    ours.update_value_norm(data)
    output = ours(data)
    upstream = torchrl_multiagent.MAPPOLoss(*theirs, value_norm=twin)
    upstream.set_keys(value=("agents", "state_value"))
    twin.update(data["value_target"])
    for buffer, statistic in zip(twin.buffers(), norm.buffers(), strict=True):
        assert_close(buffer, statistic)
    # their second update, of the same batch, leaves mean and deviation where they are
    upstream_output = upstream(data)
    tolerance = {"rtol": 1e-3, "atol": 1e-4}  # both cancel 500 down to one, in different orders
    assert_close(output["loss_critic"], upstream_output["loss_critic"], **tolerance)
    assert_close(
        gradients({"loss_": output["loss_critic"]}, networks[1]),
        gradients({"loss_": upstream_output["loss_critic"]}, theirs[1]),
        **tolerance,
    )


@pytest.mark.parametrize("norm", [PopArtValueNorm, RunningValueNorm, PercentileValueNorm])
@functional_or_not
def test_any_value_norm_of_torchrl_fits(norm, functional):
    networks = make_networks("categorical", value_norm=norm(shape=1))
    loss = MAPPOLoss(*networks, functional=functional)
    data = make_batch(networks[0], "categorical", live=0.7)
    loss.update_value_norm(data)
    output = loss(data)
    assert output["loss_critic"].isfinite()
    assert all(gradient.isfinite().all() for gradient in gradients(output, *networks))


# --- update_value_norm


@every_loss
@functional_or_not
def test_update_value_norm_folds_in_all_targets_but_those_of_padding(loss_class, functional):
    norm = RunningValueNorm(shape=1)
    networks = make_networks("categorical", value_norm=norm)
    loss = loss_class(*networks, functional=functional)
    data = make_batch(networks[0], "categorical", live=0.6, padding=True)
    data["agents", "mask"] = torch.rand(12, AGENTS) < 0.5
    data["value_target"] = 500 + 50 * data["value_target"]
    targets = data["value_target"][data[PADDING]]
    data["value_target"][~data[PADDING]] = torch.nan
    loss.update_value_norm(data)
    assert_close(norm.mean, targets.mean(0))
    assert_close(norm.scale(), targets.std(0, unbiased=False))
    assert norm.count == len(targets)


@functional_or_not
@pytest.mark.parametrize("norm", [PopArtValueNorm, RunningValueNorm, PercentileValueNorm])
def test_update_value_norm_of_padding_moves_nothing(norm, functional):
    norm = norm(shape=1)
    norm.update(torch.tensor([[1.0], [5.0]]))
    before = [buffer.clone() for buffer in norm.buffers()]
    networks = make_networks("categorical", value_norm=norm)
    loss = MAPPOLoss(*networks, functional=functional)
    loss.update_value_norm(make_batch(networks[0], "categorical", live=0.0, padding=True))
    assert_close(list(norm.buffers()), before, rtol=0, atol=0)


@functional_or_not
def test_statistics_are_shared_by_norm_critic_and_loss(functional):
    norm = PopArtValueNorm(shape=1)
    networks = make_networks("categorical", value_norm=norm)
    loss = MAPPOLoss(*networks, functional=functional)
    data = make_batch(networks[0], "categorical")
    prediction, before = prediction_and_value(networks[1], data)
    data["value_target"] = 500 + 50 * data["value_target"]
    loss.update_value_norm(data)
    mean, deviation = data["value_target"].mean(), data["value_target"].std(unbiased=False)
    assert_close(norm.scale().item(), deviation.item(), rtol=1e-3, atol=0)
    _, after = prediction_and_value(networks[1], data)
    assert_close(after, mean + deviation * prediction, rtol=1e-3, atol=0)
    assert not torch.equal(before, after)
    second_loss = MAPPOLoss(*networks, functional=not functional)
    assert_close(second_loss(data)["loss_critic"], loss(data)["loss_critic"])
    restored_networks = make_networks("categorical", value_norm=PopArtValueNorm(shape=1))
    restored = MAPPOLoss(*restored_networks, functional=functional)
    restored.load_state_dict(loss.state_dict())
    assert_close(restored(data)["loss_critic"], loss(data)["loss_critic"], rtol=0, atol=0)


def test_forward_leaves_the_statistics_alone():
    norm = norm_of(3, 2)
    networks = make_networks("categorical", value_norm=norm)
    loss = MAPPOLoss(*networks)
    before = [buffer.clone() for buffer in norm.buffers()]
    loss(make_batch(networks[0], "categorical"))
    loss(add_transition(make_batch(networks[0], "categorical", (4, 3))))
    assert_close(list(norm.buffers()), before, rtol=0, atol=0)


@functional_or_not
def test_update_value_norm_without_a_norm_does_nothing(functional):
    networks = make_networks("categorical")
    loss = MAPPOLoss(*networks, functional=functional)
    data = make_batch(networks[0], "categorical")
    before = loss(data)["loss_critic"]
    loss.update_value_norm(data)
    assert loss(data)["loss_critic"] == before


def test_update_value_norm_reads_a_renamed_target():
    norm = RunningValueNorm(shape=1)
    networks = make_networks("categorical", value_norm=norm)
    loss = MAPPOLoss(*networks)
    loss.set_keys(value_target="goal")
    data = make_batch(networks[0], "categorical").rename_key_("value_target", "goal")
    loss.update_value_norm(data)
    assert_close(norm.mean, data["goal"].mean().reshape(1))


# --- what it is good for


def rmse_after_training(kind, steps=300):
    """Regress targets of 500 +- 56 and return the root mean square error; 500 is far for a network with small steps."""
    torch.manual_seed(1)
    norm = PopArtValueNorm(shape=1)
    networks = make_networks("categorical", "observation", value_norm=norm if kind == "denormalize" else None)
    if kind == "torchrl":
        loss = torchrl_multiagent.MAPPOLoss(*networks, value_norm=norm)
        loss.set_keys(value=("agents", "state_value"))
    else:
        loss = MAPPOLoss(*networks)
    optimizer = torch.optim.Adam(networks[1].parameters(), lr=5e-3)
    weights = torch.randn(OBSERVATION) / OBSERVATION**0.5
    actor = networks[0]
    data = make_batch(actor, "categorical", (128,))
    data["value_target"] = 500 + 56 * (data["agents", "observation"] @ weights).unsqueeze(-1)
    for _ in range(steps):
        if kind == "denormalize":
            loss.update_value_norm(data)
        optimizer.zero_grad()
        loss(data)["loss_critic"].backward()
        optimizer.step()
    with torch.no_grad():
        error = networks[1](data.clone())["agents", "state_value"] - data["value_target"]
    return error.square().mean().sqrt().item()


def test_a_normalizing_critic_learns_targets_far_from_zero():
    assert rmse_after_training("denormalize") < 20  # a critic that says 500 everywhere has 56


@pytest.mark.parametrize("kind", ["plain", "torchrl"])
def test_a_plain_critic_does_not_learn_targets_far_from_zero(kind):
    # The negative control. TorchRL's value_norm alone rescales the loss, which Adam undoes.
    assert rmse_after_training(kind) > 300


# --- standardize


def numpy_standardized(values, mask, exclude_dims):
    """For each index of the excluded dimensions: minus the mean, over the deviation of n - 1, of the live rows."""
    values, mask = values.double().numpy(), mask.numpy()
    result = np.zeros_like(values)
    for index in np.ndindex(*(size if dim in exclude_dims else 1 for dim, size in enumerate(values.shape))):
        part = tuple(i if dim in exclude_dims else slice(None) for dim, i in enumerate(index))
        live = values[part][mask[part]]
        scaled = np.zeros_like(values[part])
        scaled[mask[part]] = (live - live.mean()) / live.std(ddof=1)
        result[part] = scaled
    return torch.from_numpy(result).float()


@pytest.mark.parametrize("exclude_dims", [(), (2,), (0,), (0, 2), (1, 2)], ids=str)
@pytest.mark.parametrize("negative", [False, True], ids=["positive-dims", "negative-dims"])
@pytest.mark.parametrize("live", [1.0, 0.6], ids=["all-live", "some-dead"])
def test_standardize_equals_numpy(exclude_dims, negative, live):
    values = 5 + 3 * torch.randn(8, 9, 3, 1)
    mask = torch.rand(values.shape) < live
    given = tuple(dim - 4 for dim in exclude_dims) if negative else exclude_dims
    standardized = standardize(values, mask, exclude_dims=given)
    assert_close(standardized, numpy_standardized(values, mask, exclude_dims), **TOLERANCE)
    assert_close(standardize(values, mask[..., 0], exclude_dims=given), standardized, rtol=0, atol=0)
    if live == 1.0:
        assert_close(standardize(values, exclude_dims=given), standardized, rtol=0, atol=0)


def test_standardized_values_have_mean_zero_and_deviation_one():
    values = 100 + 7 * torch.randn(64, 3, 1)
    mask = torch.rand(64, 3) < 0.5
    live = standardize(values, mask)[mask]
    assert live.mean().abs() < 1e-5
    assert live.std().item() == pytest.approx(1, abs=1e-5)


def test_standardize_gives_zero_to_rows_that_do_not_count():
    values = torch.tensor([[1.0], [3.0], [torch.nan], [torch.inf]])
    standardized = standardize(values, torch.tensor([True, True, False, False]))
    assert_close(standardized.flatten(), torch.tensor([-(0.5**0.5), 0.5**0.5, 0, 0]))


@pytest.mark.parametrize("constant", [0.0, 7.0, -1e6])
@pytest.mark.parametrize("live", [None, 0.5], ids=["all-live", "some-dead"])
def test_standardize_turns_a_constant_into_zeros(constant, live):
    values = torch.full((32, 3, 1), constant)
    mask = None if live is None else torch.rand(32, 3) < live
    assert (standardize(values, mask, exclude_dims=(-2,)) == 0).all()


@pytest.mark.parametrize("count", [0, 1])
def test_standardize_of_nothing_or_one_row_is_zero(count):
    mask = torch.zeros(6, 1, dtype=torch.bool)
    mask[:count] = True
    assert (standardize(torch.randn(6, 1), mask) == 0).all()


def test_standardize_leaves_its_input_alone_and_ignores_units():
    values = torch.randn(32, 3, 1)
    before = values.clone()
    standardized = standardize(values)
    assert torch.equal(values, before)
    assert_close(standardize(1000 * values + 5), standardized, rtol=1e-4, atol=1e-5)


def test_the_losss_normalization_is_standardize_for_each_agent():
    networks = make_networks("categorical")
    data = make_batch(networks[0], "categorical", live=0.7)
    by_hand = data.clone()
    by_hand["advantage"] = numpy_standardized(data["advantage"], data["agents", "mask"].unsqueeze(-1), (1,))
    inside = MAPPOLoss(*networks, normalize_advantage=True)(data)["loss_objective"]
    outside = MAPPOLoss(*networks, normalize_advantage=False)(by_hand)["loss_objective"]
    assert_close(inside, outside, **TOLERANCE)


def test_the_losss_normalization_can_share_statistics_among_agents():
    networks = make_networks("categorical")
    data = make_batch(networks[0], "categorical", live=0.7)
    by_hand = data.clone()
    by_hand["advantage"] = numpy_standardized(data["advantage"], data["agents", "mask"].unsqueeze(-1), ())
    inside = MAPPOLoss(*networks, normalize_advantage_exclude_dims=())(data)["loss_objective"]
    outside = MAPPOLoss(*networks, normalize_advantage=False)(by_hand)["loss_objective"]
    assert_close(inside, outside, **TOLERANCE)


def test_the_losss_normalization_of_a_teams_advantage_counts_steps_with_anyone_alive():
    networks = make_networks("categorical")
    data = make_batch(networks[0], "categorical", team=True)
    data["value_target"] = torch.zeros(12, AGENTS, 1)
    mask = torch.rand(12, AGENTS) < 0.4
    mask[:3] = False
    data["agents", "mask"] = mask
    by_hand = data.clone()
    alive = mask.any(-1, keepdim=True)
    by_hand["advantage"] = numpy_standardized(data["advantage"], alive, ())
    data["advantage"][~alive] = 1e3
    inside = MAPPOLoss(*networks)(data)["loss_objective"]
    outside = MAPPOLoss(*networks, normalize_advantage=False)(by_hand)["loss_objective"]
    assert_close(inside, outside, **TOLERANCE)


def test_an_empty_batch_of_values_is_left_empty():
    assert standardize(torch.zeros(0, 3, 1), exclude_dims=(-2,)).shape == (0, 3, 1)
