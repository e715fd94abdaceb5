"""MARPO: the paper's numbers, what reflection reads and where its gradients go, and the interval's state."""

import json
from pathlib import Path

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn
from torch.distributions import Categorical
from torch.testing import assert_close
from torchrl.modules import ProbabilisticActor

from tests.objectives.loss_factories import AGENTS, SPACES, gradients, make_batch, make_networks
from torchrl_marl.collectors import NextStepKeys
from torchrl_marl.objectives import MAPPOLoss, MARPOLoss, MARSLoss
from torchrl_marl.objectives.surrogates import (
    barrier_gain,
    clip_gain,
    kl_interval,
    quadratic_gain,
    reflective_clip_gain,
)

VECTORS = json.loads((Path(__file__).parent / "marpo_vectors.json").read_text())
TOLERANCE = {"rtol": 1e-5, "atol": 1e-6}
every_space = pytest.mark.parametrize("space", SPACES)
every_layout = pytest.mark.parametrize("layout", ["code", "paper", "paper_next_fixed", "rpo"])


def as_sequences(data, *, end=1):
    """A batch ``[B, T]`` whose first environment ends an episode after step ``end``, with the next step's keys."""
    batch = data.batch_size
    nxt = data.get("next", TensorDict({}, batch)).clone()
    observation = data["agents", "observation"]
    nxt["agents"] = {"observation": observation.roll(-1, 1)}
    nxt["done"] = torch.zeros(*batch, 1, dtype=torch.bool)
    nxt["done"][0, end] = True
    data = data.clone().set("next", nxt)
    return NextStepKeys(time_dim=1)(data)


def make(space="categorical", *, live=None, batch=(4, 3), **options):
    networks = make_networks(space)
    data = as_sequences(make_batch(networks[0], space, batch, live=live))
    return MARPOLoss(*networks, **options), data, networks


def run(loss, data):
    torch.manual_seed(5)
    return loss(data)


def plain(output, *, entropy=True):
    return {key: value for key, value in output.items() if entropy or "entropy" not in key}


# --- the paper's numbers


@pytest.fixture
def _double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def vector_example(layout, **options):
    """Loss, batch ``[E, T]`` and the logits whose gradient is known."""
    example = VECTORS["loss_example"]
    by_env = {key: torch.tensor(example[key]).transpose(0, 1) for key in ("logits_old", "logits_new", "adv", "active")}
    actions = torch.tensor(example["actions"]).transpose(0, 1).contiguous()
    logits = by_env["logits_new"].clone().requires_grad_()
    envs, time, agents = actions.shape
    batch = TensorDict(
        {
            "agents": {
                "parameters": logits,
                "logits": by_env["logits_old"],
                "action": actions,
                "action_log_prob": Categorical(logits=by_env["logits_old"]).log_prob(actions),
                "mask": by_env["active"].bool(),
            },
            "advantage": by_env["adv"].unsqueeze(-1),
            "value_target": torch.zeros(envs, time, agents, 1),
            "state": torch.zeros(envs, time, 3),
            "next": {
                "agents": {"parameters": logits.roll(-1, 1)},
                "done": torch.tensor(example["done"]).T.bool().unsqueeze(-1),
            },
        },
        batch_size=(envs, time),
        names=[None, "time"],
    )
    actor = ProbabilisticActor(
        TensorDictModule(nn.Identity(), in_keys=[("agents", "parameters")], out_keys=[("agents", "logits")]),
        in_keys=[("agents", "logits")],
        out_keys=[("agents", "action")],
        distribution_class=Categorical,
        return_log_prob=True,
        log_prob_key=("agents", "action_log_prob"),
    )
    critic = TensorDictModule(
        nn.Sequential(nn.Linear(3, agents), nn.Unflatten(-1, (agents, 1))), ["state"], [("agents", "state_value")]
    )
    settings = {"layout": layout, "normalize_advantage": False, **options}
    return MARPOLoss(actor, critic, **settings), NextStepKeys()(batch), logits


@pytest.mark.usefixtures("_double")
@every_layout
@pytest.mark.parametrize("form", ["rows", "sequences"])
def test_losses_and_gradients_are_those_of_the_vectors(layout, form):
    loss, batch, logits = vector_example(layout, sequences=form == "sequences")
    if form == "rows":  # shuffled: rows stand for themselves
        batch = batch.reshape(-1)[torch.randperm(8, generator=torch.Generator().manual_seed(0))]
    expected = VECTORS["loss_example"]["results"][layout]
    output = loss(batch)
    names = {"current_gain": "L0", "next_gain": "L1_masked_mean", "loss_objective": "loss"}
    if layout != "rpo":
        names |= {"kl": "kl", "kl_target": "target", "kl_interval_low": "x1", "kl_interval_high": "x2"}
    for name, key in names.items():
        assert output[name].item() == pytest.approx(expected[key], abs=1e-9), name
    (gradient,) = torch.autograd.grad(output["loss_objective"], logits)
    by_time = torch.tensor(expected["grad_logits_new"])
    assert_close(gradient.transpose(0, 1), by_time, rtol=0, atol=2e-9)  # central differences, accurate to 1e-9
    assert output["reflection_share"].item() == pytest.approx(9 / 15)  # pairs over live rows
    valid = torch.tensor(expected["valid"]).bool()
    later = torch.tensor(expected["next_ratio"])[valid]
    assert output["next_ratio"].item() == pytest.approx(later.mean().item(), abs=1e-12)
    ratio, live = torch.tensor(expected["ratio"]), torch.tensor(VECTORS["loss_example"]["active"]).bool()
    for name, values, (low, high) in (
        ("clip_fraction", ratio[live], expected["bounds"]["L0"]),
        ("reflective_clip_fraction", ratio[valid], expected["bounds"]["L1_current"]),
        ("next_clip_fraction", later, expected["bounds"]["L1_next"]),
    ):
        assert output[name].item() == pytest.approx(((values < low) | (values > high)).double().mean().item()), name


@pytest.mark.usefixtures("_double")
def test_the_target_follows_the_divergence_as_in_the_vectors():
    ema = VECTORS["ema"]
    loss, batch, _ = vector_example(
        "code", ema_rate=ema["rate"], kl_floor=ema["floor"], kl_bias=ema["bias"], kl_target_init=ema["target0"]
    )
    for step in ema["steps"]:
        # Two actions of probability p and 1 - p against 1/2: KL(old || new) = kl at p = (1 - sqrt(1 - e^(-2 kl))) / 2
        p = (1 - (1 - torch.tensor(-2 * step["kl"]).exp()).sqrt()) / 2
        impossible = torch.full((2, 4, 2, 2), -1e9)
        parameters = torch.stack([p.log(), (1 - p).log()]).expand(2, 4, 2, 2)
        batch["agents", "parameters"] = torch.cat([parameters, impossible], -1)
        batch["agents", "logits"] = torch.cat([torch.zeros(2, 4, 2, 2), impossible], -1)
        output = loss(batch)
        assert output["kl"].item() == pytest.approx(step["kl"], abs=1e-12)
        assert output["kl_target"].item() == pytest.approx(step["target"], abs=1e-12)
        assert output["kl_interval_low"].item() == pytest.approx(step["x1"], abs=1e-12)
        assert output["kl_interval_high"].item() == pytest.approx(step["x2"], abs=1e-12)


def test_the_reflective_gain_clips_each_ratio_on_its_own():
    # Columns: both inside; r above; r' below; both outside in opposite directions; A' = 0
    r = torch.tensor([1.1, 3.0, 1.0, 2.0, 2.0])
    later = torch.tensor([0.95, 1.0, 0.5, 0.25, 2.0])
    bounds = {"low": 0.5, "high": 1.5, "next_low": 0.8, "next_high": 1.2}
    clipped = torch.tensor([1.1 * 0.95, 1.5, 0.8, 1.5 * 0.8, 1.5 * 1.2])
    for advantage in (1.0, -2.0):
        next_advantage = torch.full((5,), advantage)
        gain = reflective_clip_gain(r.log(), later.log(), next_advantage, **bounds)
        assert_close(gain, torch.minimum(r * later * advantage, clipped * advantage))
    with pytest.raises(ValueError, match="the same shape"):
        reflective_clip_gain(r.log(), later.log(), torch.ones(5, 1), **bounds)
    with pytest.raises(ValueError, match="the same shape"):
        reflective_clip_gain(r.log(), later[:1].log(), torch.ones(5), **bounds)


# --- reductions


@every_space
@pytest.mark.parametrize("live", [None, 0.6], ids=["all-live", "some-dead"])
@pytest.mark.parametrize("normalize", [True, False], ids=["normalized", "plain"])
def test_without_reflection_it_is_mappo_bit_for_bit(space, live, normalize):
    networks = make_networks(space)
    data = make_batch(networks[0], space, live=live)
    options = {"clip_epsilon": (0.1, 0.3), "normalize_advantage": normalize}
    mappo = run(MAPPOLoss(*networks, **options), data)
    marpo = run(MARPOLoss(*networks, reflection_coeff=0.0, **options), data)
    for key in mappo.keys():
        assert_close(marpo[key], mappo[key], rtol=0, atol=0)
    assert_close(gradients(marpo, *networks), gradients(mappo, *networks), rtol=0, atol=0)


def test_with_a_barrier_and_without_reflection_it_is_mars():
    networks = make_networks("categorical")
    data = make_batch(networks[0], "categorical")
    mars = run(MARSLoss(*networks, target_ratios=(0.5, 2.0)), data)
    loss = MARPOLoss(*networks, reflection_coeff=0.0, clip_epsilon=(0.5, 1.0), gain=barrier_gain)
    for key in ("loss_objective", "loss_critic"):
        assert_close(run(loss, data)[key], mars[key], rtol=0, atol=0)


@every_space
@pytest.mark.parametrize("form", ["rows", "sequences"])
def test_at_unchanged_parameters_every_ratio_is_one(space, form):
    networks = make_networks(space)
    data = as_sequences(make_batch(networks[0], space, (4, 3), live=0.8))
    with torch.no_grad():
        old = networks[0].get_dist(data.clone()).log_prob(data["agents", "action"])
    data["agents", "action_log_prob"] = old
    data = as_sequences(data)
    loss = MARPOLoss(*networks, sequences=form == "sequences", normalize_advantage=False)
    output = run(loss, data)
    has_next, mask = data["next", "reflection_mask"], data["agents", "mask"]
    for key in ("min_ratio", "max_ratio", "next_ratio"):
        assert output[key].item() == pytest.approx(1, abs=1e-5)
    assert output["kl"].item() == pytest.approx(0, abs=1e-6)
    assert_close(output["current_gain"], data["advantage"].squeeze(-1)[mask].mean(), **TOLERANCE)
    later = data["next", "agents", "advantage"].squeeze(-1)[has_next]
    assert 0 < has_next.sum() < mask.sum()
    assert_close(output["next_gain"], later.mean(), **TOLERANCE)


@every_space
@every_layout
def test_sequences_give_the_losses_and_gradients_of_rows(space, layout):
    results = []
    for form in ("rows", "sequences"):
        loss, data, networks = make(space, live=0.8, layout=layout, sequences=form == "sequences")
        output = run(loss, data if form == "sequences" else data.reshape(-1))
        objective = {"loss_objective": output["loss_objective"]}
        results.append((plain(output, entropy=space != "continuous"), gradients(objective, *networks)))
    assert_close(*results, **TOLERANCE)


@every_space
def test_chunks_keep_the_pairs_across_their_ends(space):
    results = []
    for chunked in (False, True):
        loss, data, networks = make(space, batch=(4, 6), live=0.8, sequences=chunked)
        output = run(loss, data.reshape(8, 3) if chunked else data.reshape(-1))
        objective = {"loss_objective": output["loss_objective"]}
        results.append((plain(output, entropy=space != "continuous"), gradients(objective, *networks)))
    assert_close(*results, **TOLERANCE)


@pytest.mark.parametrize(("form", "passes"), [("rows", 24 + 24), ("sequences", 24 + 8)])
def test_the_policy_sees_the_next_steps_of_all_rows_or_of_the_last_of_each_sequence(form, passes):
    loss, data, (actor, _) = make(batch=(8, 3), functional=False, sequences=form == "sequences")
    seen = []
    actor[0].register_forward_hook(lambda module, inputs, output: seen.append(inputs[0].numel()))
    run(loss, data)
    assert sum(seen) == passes


@pytest.mark.parametrize("gain", [barrier_gain, quadratic_gain])
def test_another_trust_region_holds_the_product_of_the_ratios(gain):
    loss, data, (actor, _) = make(gain=gain, normalize_advantage=False, kl_target_init=0.05, ema_rate=0.0)
    with torch.no_grad():
        distribution = actor.get_dist(data.clone())
        log_ratio = distribution.log_prob(data["agents", "action"]) - data["agents", "action_log_prob"]
        later = actor.get_dist(data["next"].clone()).log_prob(data["next", "agents", "action"])
        later -= data["next", "agents", "action_log_prob"]
    x, y = kl_interval(0.05)
    low, high = x * x, y * y
    first = gain(log_ratio, data["advantage"].squeeze(-1), low=0.8, high=1.2).mean()
    second = gain(log_ratio + later, data["next", "agents", "advantage"].squeeze(-1), low=low, high=high)
    expected = -(first + 0.3 * second[data["next", "reflection_mask"]].mean())
    assert_close(run(loss, data)["loss_objective"], expected, **TOLERANCE)


# --- what reflection reads


@every_space
def test_both_ratios_carry_gradients(space):
    # Alone, the first ratio's gradient of the reflective term is that with the second held fixed, and vice versa.
    loss, data, (actor, _) = make(space, gain=clip_gain, normalize_advantage=False)
    data["advantage"][:] = 0  # the first term is gone
    whole = gradients({"loss_objective": run(loss, data)["loss_objective"]}, actor)
    parts = []
    for frozen in ("now", "later"):
        parts.append(_reflective_gradient(loss, data, actor, frozen))
    for total, now, later in zip(whole, *parts, strict=True):
        assert now.any()
        assert later.any()
        assert_close(now + later, total, **TOLERANCE)


def _reflective_gradient(loss, data, actor, frozen):
    def log_ratio(td):
        return actor.get_dist(td.clone()).log_prob(td["agents", "action"]) - td["agents", "action_log_prob"]

    now, later = log_ratio(data), log_ratio(data["next"])
    now, later = (now.detach(), later) if frozen == "now" else (now, later.detach())
    low, high = kl_interval(loss.kl_target.item())
    sides = {"low": low, "high": high, "next_low": low, "next_high": high}
    gain = reflective_clip_gain(now, later, data["next", "agents", "advantage"].squeeze(-1), **sides)
    mean = gain[data["next", "reflection_mask"]].mean()
    return torch.autograd.grad(-0.3 * mean, list(actor.parameters()))


@every_space
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("normalize", [True, False], ids=["normalized", "plain"])
def test_log_probs_and_advantages_of_rows_without_a_pair_do_not_matter(space, reduction, normalize):
    loss, data, networks = make(space, live=0.6, reduction=reduction, normalize_advantage=normalize, ema_rate=0.0)
    expected = run(loss, data)
    alone = ~data["next", "reflection_mask"]
    data["next", "agents", "action_log_prob"][alone] = torch.nan
    data["next", "agents", "advantage"][alone] = torch.nan
    output = run(loss, data)
    assert_close(plain(output), plain(expected), rtol=0, atol=0)
    assert_close(gradients(output, *networks), gradients(expected, *networks), **TOLERANCE)


def test_the_next_advantage_is_standardised_as_the_current_one():
    # Advantages a and 2 a + 3 are the same once standardised; so must the next ones be, by the same numbers.
    networks = make_networks("categorical")
    options = {"normalize_advantage_exclude_dims": (), "ema_rate": 0.0}
    data = make_batch(networks[0], "categorical", (4, 3), live=0.8)
    other = data.clone()
    other["advantage"] = 2 * data["advantage"] + 3
    outputs = [run(MARPOLoss(*networks, **options), as_sequences(batch)) for batch in (data, other)]
    assert_close(outputs[1]["loss_objective"], outputs[0]["loss_objective"], **TOLERANCE)
    live = data["agents", "mask"]
    standard = (data["advantage"] - data["advantage"][live].mean()) / data["advantage"][live].std()
    plain_loss = MARPOLoss(*networks, normalize_advantage=False, ema_rate=0.0)
    given = as_sequences(data.clone().set("advantage", standard))
    assert_close(run(plain_loss, given)["loss_objective"], outputs[0]["loss_objective"], **TOLERANCE)


def test_reductions_agree():
    outputs = {}
    for reduction in ("none", "sum", "mean"):
        loss, data, _ = make(live=0.8, reduction=reduction, normalize_advantage=False)
        outputs[reduction] = run(loss, data)
    assert outputs["none"]["loss_objective"].shape == (4, 3, AGENTS)
    assert_close(outputs["none"]["loss_objective"].sum(), outputs["sum"]["loss_objective"], **TOLERANCE)
    mean = outputs["mean"]
    assert_close(mean["loss_objective"], -(mean["current_gain"] + 0.3 * mean["next_gain"]), **TOLERANCE)


@every_space
def test_in_keys_are_all_that_forward_reads(space):
    loss, data, _ = make(space, live=0.7, ema_rate=0.0)
    output = run(loss, data)
    few = data.select(*loss.in_keys, strict=False)
    assert len(list(few.keys(True, True))) < len(list(data.keys(True, True)))
    assert_close(plain(run(loss, few)), plain(output), rtol=0, atol=0)
    assert sorted(output.keys()) == sorted(loss.out_keys)


@pytest.mark.parametrize("name", ["action", "action_log_prob", "advantage", "observation"])
def test_data_without_the_next_step_say_what_is_missing_and_what_writes_it(name):
    loss, data, _ = make()
    with pytest.raises(KeyError, match=rf"no \('next', 'agents', '{name}'\): apply .*NextStepKeys"):
        loss(data.exclude(("next", "agents", name)))
    with pytest.raises(KeyError, match=r"'reflection_mask'\): apply .*NextStepKeys"):
        loss(data.exclude("next"))


@pytest.mark.parametrize(
    ("key", "value", "match"),
    [
        ("reflection_mask", torch.ones(4, 3, AGENTS), r"reflection_mask'\) must be boolean, got torch.float32"),
        ("reflection_mask", torch.ones(4, 3, 1, dtype=torch.bool), r"reflection_mask'\) has shape \(4, 3, 1\)"),
        (
            ("agents", "advantage"),
            torch.ones(4, 3, AGENTS, 2),
            r"'next', 'agents', 'advantage'\) has shape \(4, 3, 3, 2",
        ),
    ],
    ids=str,
)
def test_entries_of_the_next_step_that_do_not_fit_are_named(key, value, match):
    loss, data, _ = make()
    data["next", key] = value
    with pytest.raises(ValueError, match=match):
        loss(data)


def test_shuffled_rows_are_no_sequences():
    loss, data, _ = make(sequences=True)
    with pytest.raises(ValueError, match=r"sequences=True needs data \[\*batch, time\], got \(12,\)"):
        loss(data.reshape(-1))


def test_without_an_interval_that_follows_it_no_divergence_is_measured():
    networks = make_networks("categorical")
    data = as_sequences(make_batch(networks[0], "categorical", (4, 3))).exclude(("agents", "logits"))
    for options in ({"layout": "rpo"}, {"reflection_coeff": 0.0}):
        output = MARPOLoss(*networks, **options)(data)
        assert "kl_target" not in output
    for options in ({}, {"layout": "paper", "reflection_coeff": 0.0}):
        with pytest.raises(KeyError, match="logits"):
            MARPOLoss(*networks, **options)(data)


def test_masked_steps_are_no_next_steps_of_a_sequence_either():
    # TorchRL's mask leaves step 1 of environment 2 out; neither form may learn from it, now or as what comes next.
    results = []
    for sequences in (False, True):
        loss, data, _ = make(sequences=sequences, normalize_advantage=False, ema_rate=0.0)
        data["collector", "mask"] = torch.ones(4, 3, dtype=torch.bool)
        data["collector", "mask"][2, 1] = False
        data = as_sequences(data)
        assert not data["next", "reflection_mask"][2, :2].any()
        results.append(plain(run(loss, data if sequences else data.reshape(-1))))
    assert_close(*results, **TOLERANCE)
    loss, data, _ = make(sequences=True, ema_rate=0.0)  # a mask that the pairs' writer has not seen
    data["collector", "mask"] = torch.ones(4, 3, dtype=torch.bool)
    data["collector", "mask"][2, 1] = False
    assert run(loss, data)["reflection_share"].item() == pytest.approx((7 - 2) / 11)  # environment 0 ends at step 1


@pytest.mark.parametrize("sequences", [False, True], ids=["rows", "sequences"])
def test_a_masked_step_has_no_reflective_term_whatever_its_pair_says(sequences):
    loss, data, _ = make(sequences=sequences, normalize_advantage=False, ema_rate=0.0, reduction="none")
    data["collector", "mask"] = torch.ones(4, 3, dtype=torch.bool)
    data["collector", "mask"][2, 1] = False  # a mask that the pairs' writer has not seen
    assert data["next", "reflection_mask"][2, 1].all()
    told = data.clone()
    told["next", "reflection_mask"][2, 1] = False
    found, expected = run(loss, data), run(loss, told)
    assert not found["loss_objective"][2, 1].any()
    for name in ("loss_objective", "next_gain", "next_ratio", "reflective_clip_fraction", "next_clip_fraction"):
        assert_close(found[name], expected[name], rtol=0, atol=0)


@pytest.mark.parametrize("key", [("agents", "loc"), ("agents", "scale")], ids=str)
def test_the_old_distributions_parameters_are_needed(key):
    loss, data, _ = make("continuous")
    with pytest.raises(KeyError, match=f"{key[-1]}.*parameters of its distribution"):
        loss(data.exclude(key))


def test_two_groups_have_masks_of_their_own():
    networks = make_networks("categorical", name="predators")
    data = make_batch(networks[0], "categorical", (4, 3), name="predators")
    data["next"] = {
        "predators": {"observation": data["predators", "observation"].roll(-1, 1)},
        "done": torch.zeros(4, 3, 1, dtype=torch.bool),
    }
    names = {"action": ("predators", "action"), "log_prob": ("predators", "action_log_prob")}
    NextStepKeys(**names, reflection_mask="predators_pair", time_dim=1)(data)
    loss = MARPOLoss(*networks)
    with pytest.raises(KeyError, match="reflection_mask"):
        loss(data)
    loss.set_keys(reflection_mask="predators_pair")
    assert ("next", "predators_pair") in loss.in_keys
    assert loss(data)["next_gain"] != 0


# --- the interval's state


def test_the_target_stays_below_its_maximum_and_moves_in_training_only():
    loss, data, _ = make(kl_bias=5.0, ema_rate=0.5, kl_target_max=0.3)
    loss.eval()
    assert run(loss, data)["kl_target"].item() == pytest.approx(0.01)
    loss.train()
    for _ in range(3):
        assert run(loss, data)["kl_target"].item() == pytest.approx(0.3)


def test_the_target_is_saved_and_restored(tmp_path):
    loss, data, _ = make()
    for _ in range(5):
        run(loss, data)
    torch.save(loss.state_dict(), tmp_path / "loss.pt")
    other, *_ = make()
    assert other.kl_target != loss.kl_target
    other.load_state_dict(torch.load(tmp_path / "loss.pt", weights_only=True))
    assert_close(plain(run(other, data)), plain(run(loss, data)), rtol=0, atol=0)


def test_the_bias_can_be_annealed_by_assignment():
    loss, data, _ = make(ema_rate=1.0, kl_floor=10.0, kl_target_max=100.0)
    buffer = loss.kl_bias
    for bias in (0.08, 0.04, 0.0):
        loss.kl_bias = bias
        assert run(loss, data)["kl_target"].item() == pytest.approx(10 + bias)
    assert loss.kl_bias is buffer


def test_the_divergence_is_that_from_the_policy_that_collected_the_batch():
    loss, data, (actor, _) = make("continuous", live=0.7)
    with torch.no_grad():
        for parameter in actor.parameters():
            parameter += 0.1
    loc, scale = data["agents", "loc"].double(), data["agents", "scale"].double()
    new = actor.get_dist_params(data.clone())["agents"]
    # of the Gaussians: squashing both alike leaves the divergence
    variance = (scale / new["scale"]).square()
    kl = (variance + ((new["loc"] - loc) / new["scale"]).square() - 1 - variance.log()).sum(-1) / 2
    assert_close(run(loss, data)["kl"], kl[data["agents", "mask"]].mean().detach(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_loss_may_be_cast(dtype):
    loss, data, _ = make()
    output = loss.to(dtype)(data.apply(lambda x: x.to(dtype) if x.is_floating_point() else x))
    assert output["loss_objective"].dtype == dtype
    assert 0.015 < output["kl_target"].item() < 0.03


def test_a_divergence_that_is_not_finite_leaves_the_target_alone():
    loss, data, _ = make()
    target = run(loss, data)["kl_target"]
    broken = data.clone()
    broken["agents", "observation"][0, 0, 0] = torch.nan
    output = run(loss, broken)
    assert output["kl"].isnan()
    assert output["loss_objective"].isnan()
    assert output["kl_target"] == target
    assert run(loss, data)["loss_objective"].isfinite()


def test_no_bias_moves_the_target_below_zero():
    loss, data, _ = make(ema_rate=1.0)
    loss.kl_bias = -5.0
    assert run(loss, data)["kl_target"] == 0


@pytest.mark.parametrize(
    ("option", "match"),
    [
        ({"layout": "typo"}, "layout must be one of code, paper, paper_next_fixed, rpo; got 'typo'"),
        ({"reflection_coeff": -0.1}, "reflection_coeff .* -0.1"),
        ({"ema_rate": 1.5}, "ema_rate.* 1.5"),
        ({"kl_bias": 0.0, "kl_floor": 0.0}, "kl_bias and kl_floor"),
        ({"kl_floor": -1.0}, "kl_bias and kl_floor .* -1.0"),
        ({"kl_target_init": 0.0}, "kl_target_init .* 0.0"),
        ({"kl_target_init": 0.5}, "kl_target_max = 0.3"),
        ({"next_clip_epsilon": 1.5}, "clip_epsilon .* 1.5"),
    ],
    ids=str,
)
def test_options_out_of_range_are_named(option, match):
    with pytest.raises(ValueError, match=match):
        MARPOLoss(*make_networks("categorical"), **option)


# --- execution


@every_space
def test_functional_equals_stateful(space):
    results = []
    for functional in (True, False):
        loss, data, networks = make(space, live=0.7, functional=functional)
        output = run(loss, data)
        results.append((plain(output), gradients(output, *networks)))
    assert_close(*results, rtol=0, atol=0)


@pytest.mark.parametrize("form", ["rows", "sequences"])
def test_compiled_graph_equals_eager(form):
    torch.compiler.reset()
    results = []
    for compiled in (True, False):
        loss, data, networks = make("masked", functional=False, sequences=form == "sequences")
        compute = torch.compile(loss, fullgraph=True, backend="aot_eager") if compiled else loss
        outputs = [run(compute, data) for _ in range(2)]  # the target moves between the two
        assert outputs[0]["kl_target"] != outputs[1]["kl_target"]
        results.append([plain(output) for output in outputs] + [gradients(outputs[1], *networks)])
    assert_close(*results, **TOLERANCE)


@pytest.mark.gpu
@every_space
@every_layout
def test_on_a_gpu_it_equals_the_cpu(space, layout):
    results = []
    for device in ("cpu", "cuda"):
        networks = [network.to(device) for network in make_networks(space)]
        data = as_sequences(make_batch(make_networks(space)[0], space, (4, 3), live=0.7)).to(device)
        output = run(MARPOLoss(*networks, layout=layout), data)
        objective = {"loss_objective": output["loss_objective"]}
        found = plain(output, entropy=space != "continuous")
        results.append(({k: v.cpu() for k, v in found.items()}, [g.cpu() for g in gradients(objective, *networks)]))
    assert_close(*results, rtol=1e-4, atol=1e-5)
