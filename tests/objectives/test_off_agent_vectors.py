"""The sequential methods against reference vectors: objectives, gradients, factors, natural-gradient steps.

Linear-softmax policies, ``logits = W_i o``; what the fields of the file mean is written in its ``_about``.
"""

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

from torchrl_marl.modules import AgentNetworks
from torchrl_marl.objectives import HAPPOLoss, HATRPOLoss, OAPPOLoss, OATRPOLoss
from torchrl_marl.objectives.divergences import policy_kl
from torchrl_marl.objectives.trust_region import conjugate_gradient, fisher_vector_product, natural_step

VECTORS = json.loads(Path(__file__).with_name("off_agent_vectors.json").read_text())
ORDER = VECTORS["order"]
EXACT = {"rtol": 0, "atol": 1e-9}


@pytest.fixture(autouse=True)
def _double_precision():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def vector(name):
    return torch.tensor(VECTORS[name])


def make_actor(weights):
    networks = [nn.Linear(3, 4, bias=False) for _ in weights]
    for network, weight in zip(networks, weights, strict=True):
        network.weight.data.copy_(weight)
    return ProbabilisticActor(
        TensorDictModule(AgentNetworks(networks), [("agents", "observation")], [("agents", "logits")]),
        in_keys=[("agents", "logits")],
        out_keys=[("agents", "action")],
        distribution_class=Categorical,
        return_log_prob=True,
        log_prob_key=("agents", "action_log_prob"),
    )


def make_loss(cls, weights=None, **options):
    actor = make_actor(vector("W_old") if weights is None else weights)
    critic = TensorDictModule(nn.Linear(1, 1), ["state"], ["state_value"])
    loss = cls(actor, critic, entropy_coeff=0.0, normalize_advantage=False, **options)
    return loss, actor.module[0].module.networks


def make_batch(updated=()):
    """The rollout; agents in ``updated`` have had their turn."""
    own_log_ratio = vector("own_ratio").log()
    for agent in set(range(3)) - set(updated):
        own_log_ratio[..., agent] = 0
    agents = {
        "observation": vector("obs"),
        "action": vector("actions"),
        "action_log_prob": vector("logp_old"),
        "mask": vector("active").bool(),
        "update_log_ratio": own_log_ratio,
    }
    return TensorDict({"agents": agents, "advantage": vector("adv").unsqueeze(-1)}, batch_size=(3, 2))


def objective_and_gradient(loss, networks, data, agent):
    loss.turn = agent
    value = -loss(data)["loss_objective"]
    (gradient,) = torch.autograd.grad(value, networks[agent].weight)
    return value.detach(), gradient


def weights_in_turn(updated, candidate=None):
    """New parameters of the agents that have had their turn, and of the candidate; old ones of the rest."""
    return [vector("W_new" if i in (*updated, candidate) else "W_old")[i] for i in range(3)]


@pytest.mark.parametrize("position", range(3))
def test_happo_matches_the_reference_vectors(position):
    expected, updated = VECTORS["happo"][position], ORDER[:position]
    agent = expected["agent"]
    assert agent == ORDER[position]
    loss, networks = make_loss(HAPPOLoss, weights_in_turn(updated, agent))
    data = make_batch(updated)
    value, gradient = objective_and_gradient(loss, networks, data, agent)
    assert_close(value, torch.tensor(expected["surrogate"]), **EXACT)
    assert_close(gradient, torch.tensor(expected["grad_W"]), **EXACT)
    output, live = loss(data), data["agents", "mask"][..., agent]
    factor, ratio = torch.tensor(expected["factor"])[live], torch.tensor(expected["ratio"])[live]
    assert_close(output["mean_compound_ratio"], factor.mean(), **EXACT)
    assert_close(output["max_compound_ratio"], factor.max(), **EXACT)
    assert_close(output["max_ratio"], ratio.max(), **EXACT)
    assert_close(output["min_ratio"], ratio.min(), **EXACT)


def test_turns_accumulate_the_compound_ratio_of_the_reference_vectors():
    loss, networks = make_loss(HAPPOLoss)
    data = make_batch().exclude(("agents", "update_log_ratio"))
    for turn in loss.turns(data, order=ORDER):
        updates = data["agents", "update_log_ratio"]
        live = data["agents", "mask"]
        if turn == "critic":
            assert_close(updates[live], vector("own_ratio").log()[live], **EXACT)
            assert not updates[~live].any()
            continue
        seen = live.all(-1)  # the vectors' factor also counts what dead agents would have done
        factor = torch.tensor(VECTORS["happo"][ORDER.index(turn)]["factor"])
        assert_close(updates.sum(-1).exp()[seen], factor[seen], **EXACT)
        networks[turn].weight.data.copy_(vector("W_new")[turn])


@pytest.mark.parametrize("position", range(3))
@pytest.mark.parametrize("case", VECTORS["oappo"])
def test_oappo_matches_the_reference_vectors(case, position):
    expected, updated = VECTORS["oappo"][case]["agents"][position], ORDER[:position]
    agent = expected["agent"]
    loss, networks = make_loss(
        OAPPOLoss, weights_in_turn(updated, agent), reuse_matrix=torch.tensor(VECTORS["oappo"][case]["M"])
    )
    data = make_batch(updated)
    value, gradient = objective_and_gradient(loss, networks, data, agent)
    assert_close(value, torch.tensor(expected["objective"]), **EXACT)
    assert_close(gradient, torch.tensor(expected["grad_W"]), **EXACT)
    output, live = loss(data), data["agents", "mask"]
    sources = [j for j, weight in enumerate(expected["weights"]) if weight > 0]
    rho = torch.cat([torch.tensor(expected["rho"][j])[live[..., j]] for j in sources])
    factor = torch.cat([torch.tensor(expected["factor"][j])[live[..., j]] for j in sources])
    assert_close(output["max_ratio"], rho.max(), **EXACT)
    assert_close(output["min_ratio"], rho.min(), **EXACT)
    assert_close(output["mean_compound_ratio"], factor.mean(), **EXACT)
    assert_close(output["max_compound_ratio"], factor.max(), **EXACT)


@pytest.mark.parametrize("source", range(3))
def test_each_source_of_oappo_matches_its_term(source):
    # all of the weight on one source shows its term; the compound ratio leaves the source's own slot out
    for position, expected in enumerate(VECTORS["oappo"]["all_reuse_uniform"]["agents"]):
        matrix = torch.zeros(3, 3)
        matrix[:, source] = 1
        updated, agent = ORDER[:position], expected["agent"]
        loss, networks = make_loss(OAPPOLoss, weights_in_turn(updated, agent), reuse_matrix=matrix)
        value, _ = objective_and_gradient(loss, networks, make_batch(updated), agent)
        assert_close(value, torch.tensor(expected["terms"][source]), **EXACT)
    (expected,) = (a for a in VECTORS["oappo"]["all_reuse_uniform"]["agents"] if a["agent"] == 0)
    assert_close(torch.tensor(expected["factor"][2]), torch.ones(3, 2))  # only agent 2 was updated before


@pytest.mark.parametrize("case", range(len(VECTORS["oatrpo"])))
def test_oatrpo_matches_the_reference_vectors(case):
    expected = VECTORS["oatrpo"][case]
    agent, updated = expected["agent"], expected["already_updated"]
    matrix = torch.eye(3)
    matrix[agent] = torch.tensor(expected["weights"])
    loss, networks = make_loss(OATRPOLoss, weights_in_turn(updated), reuse_matrix=matrix, max_kl=expected["delta"])
    data = make_batch(updated)
    value, gradient = objective_and_gradient(loss, networks, data, agent)
    assert_close(value, torch.tensor(expected["surrogate_start"]), **EXACT)
    assert_close(gradient, torch.tensor(expected["g"]), **EXACT)
    output = loss.step(data)
    assert_close(output["expected_improvement"], torch.tensor(expected["expected_improve"]), **EXACT)
    accepted = expected["line_search"][-1]
    assert accepted["accepted"] is expected["accepted"] is True
    assert_close(output["step_fraction"], torch.tensor(accepted["fraction"]), **EXACT)
    assert_close(output["improvement"], torch.tensor(accepted["improve"]), **EXACT)
    assert_close(output["kl"], torch.tensor(accepted["kl"]), **EXACT)
    moved = vector("W_old")[agent] + accepted["fraction"] * torch.tensor(expected["full_step"])
    assert_close(networks[agent].weight.data, moved, **EXACT)


@pytest.mark.parametrize("case", range(len(VECTORS["oatrpo"])))
def test_products_solver_and_step_match_the_reference_vectors(case):
    expected = VECTORS["oatrpo"][case]
    weight = vector("W_old")[expected["agent"]].requires_grad_()
    kl = torch.tensor(0.0)
    for source, share in enumerate(expected["weights"]):
        rows = vector("obs")[..., source, :][vector("active").bool()[..., source]]
        new = Categorical(logits=rows @ weight.T)
        kl = kl + share * policy_kl(Categorical(logits=new.logits.detach()), new).mean()
    product = fisher_vector_product(kl, [weight], damping=0.1)
    probe = torch.tensor(expected["fvp_probe"]).flatten()
    assert_close(product(probe), torch.tensor(expected["fvp_result"]).flatten(), **EXACT)
    gradient = torch.tensor(expected["g"]).flatten()
    solution = conjugate_gradient(product, gradient)
    assert_close(solution, torch.tensor(expected["cg_x"]).flatten(), **EXACT)
    assert_close(solution @ product(solution), torch.tensor(expected["xHx"]), **EXACT)
    step = natural_step(product, gradient, max_kl=expected["delta"])
    assert_close(step, torch.tensor(expected["full_step"]).flatten(), **EXACT)


def test_hatrpo_takes_the_steps_of_oatrpo_without_reuse():
    for expected in VECTORS["oatrpo"]:
        if 1.0 in expected["weights"]:
            updated = expected["already_updated"]
            loss, _ = make_loss(HATRPOLoss, weights_in_turn(updated), max_kl=expected["delta"])
            loss.turn = expected["agent"]
            output = loss.step(make_batch(updated))
            assert_close(output["step_fraction"], torch.tensor(expected["line_search"][-1]["fraction"]), **EXACT)
            assert_close(output["kl"], torch.tensor(expected["line_search"][-1]["kl"]), **EXACT)


def test_the_exact_divergence_is_not_the_unweighted_one():
    # of agent 0's old and new policy over all rows; the sum over actions without weights is eight times as large
    observations, both = vector("obs")[..., 0, :], [vector(name)[0] for name in ("W_old", "W_new")]
    old, new = (Categorical(logits=observations @ weight.T) for weight in both)
    assert_close(policy_kl(old, new).mean(), torch.tensor(VECTORS["unweighted_kl"]["exact_mean"]), **EXACT)
    log_ratio = new.logits - old.logits
    unweighted = (log_ratio.expm1() - log_ratio).sum(-1).mean()
    assert_close(unweighted, torch.tensor(VECTORS["unweighted_kl"]["harl_style_mean"]), **EXACT)
