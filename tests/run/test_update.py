import copy

import pytest
import torch

from torchrl_marl.collectors import NextStepKeys, minibatches
from torchrl_marl.envs import make_aerocombat, make_coordsum
from torchrl_marl.modules import make_actor, make_critic
from torchrl_marl.objectives import MAGPOLoss, MARPOLoss, MARSLoss
from torchrl_marl.objectives.magpo import follow_imitation_gap
from torchrl_marl.run.update import make_update

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def guided(actor, critic, **options):
    """A loss of six parts that moves its bound."""
    torch.manual_seed(3)
    learner = copy.deepcopy(actor)
    for parameter in learner.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    return MAGPOLoss(actor, critic, learner, adapt_ratio=follow_imitation_gap, **options)


def build(device="cpu", method=MARSLoss, make_game=make_coordsum, **options):
    """A loss, and rows that it can be trained on."""
    env = make_game(num_envs=8, seed=0, device=device)
    actor, critic = (
        make_actor(env, hidden_sizes=[16], device=device),
        make_critic(env, hidden_sizes=[16], device=device),
    )
    loss = method(actor, critic, **{"functional": False, **options})
    loss.make_value_estimator(gamma=0.99, lmbda=0.95)
    with torch.no_grad():
        rollout = env.rollout(12, actor, break_when_any_done=False)
        critic_params = {"params": loss.critic_network_params} if loss.functional else {}
        rows = NextStepKeys(time_dim=1)(loss.value_estimator(rollout, **critic_params)).reshape(-1)
    return loss, rows.select(*loss.in_keys, strict=False)


def trained(loss, rows, device="cpu", size=32, **options):
    """What 2 epochs measured, and the parameters and buffers they led to; always from the same start."""
    loss = copy.deepcopy(loss)
    adam = torch.optim.Adam(loss.parameters(), lr=1e-2, fused=options != {})
    update = make_update(loss, adam, max_grad_norm=0.1, **options)
    torch.manual_seed(0)
    measured = [update(minibatch) for _ in range(2) for minibatch in minibatches(rows, size)]
    assert all(len(minibatch) == size for minibatch in minibatches(rows, size)) or size != 32
    names = [key for key in measured[0] if not key.startswith("explained")]  # a quotient of small numbers
    return [{name: step[name].clone() for name in names} for step in measured], [*loss.parameters(), *loss.buffers()]


@pytest.mark.parametrize("method", [MARSLoss, guided])
def test_an_update_is_the_step_of_a_plain_loop(method):
    loss, rows = build(method=method)
    loss_before = copy.deepcopy(loss)
    measured, parameters = trained(loss, rows)
    optimizer = torch.optim.Adam(loss.parameters(), lr=1e-2)
    torch.manual_seed(0)
    expected = []
    for _ in range(2):
        for index in torch.randperm(96).split(32):
            losses = loss(rows[index])
            sum(value for name, value in losses.items() if name.startswith("loss_")).backward()
            of_learner = [] if method is MARSLoss else list(loss.learner_network.parameters())
            others = [parameter for parameter in loss.parameters() if all(parameter is not own for own in of_learner)]
            norms = {"grad_norm": torch.nn.utils.clip_grad_norm_(others, 0.1)}
            if of_learner:
                norms["learner_grad_norm"] = torch.nn.utils.clip_grad_norm_(of_learner, 0.1)
            optimizer.step()
            optimizer.zero_grad()
            expected.append({**losses, **norms})
    for step, true in zip(measured, expected, strict=True):
        assert all(torch.equal(value, true[name]) and not value.requires_grad for name, value in step.items())
    assert all(torch.equal(*pair) for pair in zip(parameters, [*loss.parameters(), *loss.buffers()], strict=True))
    for (name, after), before in zip(loss.named_parameters(), loss_before.parameters(), strict=True):
        assert not torch.equal(after, before), name  # the learner's, too


@pytest.mark.parametrize("device", DEVICES)
def test_a_compiled_update_leads_to_the_same_parameters(device):
    loss, rows = build(device)
    torch.testing.assert_close(
        trained(loss, rows, device, compile=True), trained(loss, rows, device), rtol=1e-3, atol=1e-5
    )


class Doubled(torch.nn.Module):
    """A layer whose weight is that of another one as well."""

    def __init__(self, layer):
        super().__init__()
        self.first, self.second = layer, copy.copy(layer)
        self.second._parameters = dict(layer._parameters)

    def forward(self, values):
        return self.first(values) + self.second(values)


@pytest.mark.parametrize("case", ["plain", "functional", "tied", "buffers", "guided", "noise"])
def test_a_traced_update_is_the_uncompiled_one(case, monkeypatch):
    """Also of parameters that cannot be replaced one by one, of a loss that changes itself, and of one with noise."""
    compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, **_: compile(function, backend="aot_eager"))
    torch.manual_seed(0)
    kind = {
        "functional": {"functional": True},
        "buffers": {"method": MARPOLoss},
        "guided": {"method": guided},
        "noise": {"make_game": make_aerocombat},
    }
    loss, rows = build(**kind.get(case, {}))
    if case == "tied":
        loss.critic_network.module = torch.nn.Sequential(loss.critic_network.module, Doubled(torch.nn.Linear(1, 1)))
    size = 36 if case == "plain" else 32  # of 96 rows: the last minibatch is smaller
    traced, plain = (trained(loss, rows, size=size, compile=compile) for compile in (True, False))
    if case == "noise":  # which Adam's first step amplifies
        traced, plain = traced[0][0], plain[0][0]
    torch.testing.assert_close(traced, plain, rtol=1e-4, atol=1e-5)


def test_settings_of_a_loss_that_change_between_compiled_updates_take_effect(monkeypatch):
    compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, **options: compile(function, backend="eager", **options))
    fresh, rows = build()
    measured = {}
    for compiled in (True, False):
        loss = copy.deepcopy(fresh)
        update = make_update(loss, torch.optim.SGD(loss.parameters(), lr=0.0), max_grad_norm=1.0, compile=compiled)
        steps = [update(rows)]
        loss.loss_critic_type = "l2"
        steps.append(update(rows))
        loss.entropy_coeff = torch.tensor(2.0)
        steps.append(update(rows))
        measured[compiled] = steps
    torch.testing.assert_close(measured[True], measured[False])
    for step, name in enumerate(("loss_critic", "loss_entropy")):
        assert not torch.equal(measured[True][step][name], measured[True][step + 1][name])


@pytest.mark.parametrize("max_grad_norm", [0.0, -1.0, float("nan")])
def test_a_norm_that_stops_or_turns_gradients_is_refused(max_grad_norm):
    loss, _ = build()
    optimizer = torch.optim.Adam(loss.parameters())
    with pytest.raises(ValueError, match=r"max_grad_norm must be a number above 0 \(inf: no limit\)"):
        make_update(loss, optimizer, max_grad_norm=max_grad_norm)


def test_an_infinite_norm_leaves_gradients_as_they_are():
    taken = []
    for max_grad_norm in (float("inf"), 1e9):
        torch.manual_seed(0)
        loss, rows = build()
        optimizer = torch.optim.SGD(loss.parameters(), lr=0.1)
        make_update(loss, optimizer, max_grad_norm=max_grad_norm)(rows)
        taken.append(torch.cat([parameter.detach().flatten() for parameter in loss.parameters()]))
    assert torch.equal(*taken)
