import copy
from functools import partial

import pytest
import torch
from omegaconf import ListConfig

from torchrl_marl.collectors import NextStepKeys, minibatches
from torchrl_marl.envs import make_aerocombat, make_coordsum
from torchrl_marl.modules import (
    collection_policy,
    make_actor,
    make_critic,
    make_mat,
    make_recurrent_actor,
    make_recurrent_critic,
    make_sable,
    with_recurrent_state,
)
from torchrl_marl.objectives import (
    ComposedLoss,
    CTDSLoss,
    HAPPOLoss,
    HATRPOLoss,
    MAGPOLoss,
    MAPPOLoss,
    MARPOLoss,
    MARSLoss,
    OAPPOLoss,
    SEACLoss,
)
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


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW])
def test_adams_step_in_the_graph_follows_groups_schedules_and_a_restored_state(kind, monkeypatch):
    compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, **_: compile(function, backend="aot_eager"))
    fresh, rows = build()

    def start(loss, compile):
        options = {"lr": 1e-2, "weight_decay": 0.1, "betas": (0.8, 0.95), "eps": 1e-5}
        optimizer = kind(loss.parameter_groups(critic_lr=3e-2), **options)
        return optimizer, make_update(loss, optimizer, max_grad_norm=0.1, compile=compile)

    trained = {}
    for compiled in (True, False):
        loss = copy.deepcopy(fresh)
        optimizer, update = start(loss, compiled)
        scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=4)
        for step in range(3):
            update(rows)
            scheduler.step()
            if step == 1:
                stored = copy.deepcopy(optimizer.state_dict())
                optimizer, update = start(loss, compiled)
                optimizer.load_state_dict(stored)
                scheduler.optimizer = optimizer
        trained[compiled] = [list(loss.parameters()), [optimizer.state[p] for p in loss.parameters()]]
    torch.testing.assert_close(trained[True], trained[False], rtol=1e-4, atol=1e-6)
    assert optimizer.param_groups[0]["lr"] < 0.5 * 1e-2


class Idle(torch.nn.Module):
    """A layer without an effect on what passes through it."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(2))

    def forward(self, values):
        return values


def test_adams_step_in_the_graph_leaves_parameters_without_an_effect_and_follows_its_own_settings(monkeypatch):
    compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, **options: compile(function, backend="eager", **options))
    fresh, rows = build()
    fresh.critic_network.module.append(Idle())
    trained = {}
    for compiled in (True, False):
        loss = copy.deepcopy(fresh)
        optimizer = torch.optim.AdamW(loss.parameters(), lr=1e-2, weight_decay=0.1)
        update = make_update(loss, optimizer, max_grad_norm=0.1, compile=compiled)
        for betas, decay in (((0.9, 0.999), 0.1), ((0.9, 0.999), 0.1), ((0.5, 0.9), 3.0)):
            optimizer.param_groups[0].update(betas=ListConfig(betas), weight_decay=decay)
            update(rows)
        trained[compiled] = list(loss.parameters())
        (idle,) = (module.weight for module in loss.modules() if isinstance(module, Idle))
        assert torch.equal(idle, torch.ones(2))
    torch.testing.assert_close(trained[True], trained[False], rtol=1e-4, atol=1e-6)


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


def test_sizes_are_constants_of_a_compiled_update_though_runs_before_it_had_others(monkeypatch):
    """In a grid over tasks, where Dynamo would take what has changed for a variable: slower, and checks may fail."""
    compile, given = torch.compile, []

    def backend(graph, inputs):
        given.append(inputs)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    monkeypatch.setattr(
        torch, "compile", lambda function, options, **kinds: compile(function, backend=backend, **kinds)
    )
    torch.manual_seed(0)
    for scenario in ("CoordSum-3x10", "CoordSum-5x20"):
        loss, rows = build(make_game=partial(make_coordsum, scenario), functional=True)
        torch.testing.assert_close(trained(loss, rows, compile=True), trained(loss, rows), rtol=1e-4, atol=1e-5)
    assert len(given) == 2
    assert all(isinstance(value, torch.Tensor) for inputs in given for value in inputs)


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


GRU = {"hidden_sizes": [8], "recurrent_size": 8, "head_sizes": []}
OWN = {"share_parameters": False}


def networks(env, method, kind):
    """What a method's loss is made of."""
    if kind in ("mat", "sable"):
        pair = (make_mat if kind == "mat" else make_sable)(env, embed_dim=8)
        return pair if method is MAPPOLoss else (*pair, make_recurrent_actor(env, **GRU))
    own = OWN if method in (HAPPOLoss, OAPPOLoss, ComposedLoss, HATRPOLoss, SEACLoss) else {}
    if kind == "gru":
        return make_recurrent_actor(env, **GRU, **own), make_recurrent_critic(env, **GRU)
    observes = {"observes": "observation", **OWN} if method is SEACLoss else {}
    return make_actor(env, hidden_sizes=[8], **own), make_critic(env, hidden_sizes=[8], **observes)


def guardless(compile, backend, function, *, options, **kinds):
    """``torch.compile`` with a backend in place of Inductor, without guards where Inductor has none."""
    kept = {name: value for name, value in options.items() if name == "guard_filter_fn"}
    return compile(function, backend=backend, options=kept, **kinds)


def traced_graphs(monkeypatch):
    """Let ``torch.compile`` differentiate and run what it traces, without Inductor; return a list that it fills."""
    torch.compiler.reset()
    graphs = []

    def backend(graph, inputs):
        compiled = torch._dynamo.lookup_backend("aot_eager")(graph, inputs)
        graphs.append(graph)  # not those that Dynamo traces anew for numbers that it took for tensors
        return compiled

    monkeypatch.setattr(torch, "compile", partial(guardless, torch.compile, backend))
    return graphs


METHODS = [
    (MAPPOLoss, "gru", {}),
    (MAGPOLoss, "sable", {}),
    (MARPOLoss, "mlp", {"sequences": True}),
    (MARPOLoss, "mlp", {"precision": "bfloat16"}),
    (HAPPOLoss, "mlp", {}),
    (OAPPOLoss, "mlp", {"reuse_matrix": "AR"}),
    (ComposedLoss, "mlp", {"reuse_matrix": "AR", "interval": "kl", "ema_rate": 0.5}),
    (ComposedLoss, "mlp", {"reuse_matrix": "AR", "interval": "kl", "ema_rate": 0.5, "order": "together"}),
    (HATRPOLoss, "mlp", {}),
    (SEACLoss, "mlp", {}),
    *(
        pytest.param(*case, {}, marks=pytest.mark.slow)
        for case in [(MAPPOLoss, "mat"), (MAPPOLoss, "sable"), (CTDSLoss, "mat"), (HAPPOLoss, "gru")]
    ),
]


@pytest.mark.parametrize(
    ("method", "kind", "options"), METHODS, ids=lambda value: getattr(value, "__name__", str(value))
)
def test_every_methods_losses_and_gradients_are_the_uncompiled_ones(method, kind, options, monkeypatch):
    """The loop of a recipe; agents that update in turn share one graph, and the critic has another."""
    graphs = traced_graphs(monkeypatch)
    monkeypatch.setattr(
        "torchrl_marl.modules.gru_sequence._compiled", lambda block, *_: block
    )  # which would be graphs of their own
    torch.manual_seed(0)
    env = make_coordsum("CoordSum-3x4", num_envs=4, seed=0)
    parts = networks(env, method, kind)
    policy = collection_policy(parts[0], parts[-1])
    env = with_recurrent_state(env, policy)
    loss = method(*parts, functional=False, **options)
    loss.make_value_estimator(gamma=0.99, lmbda=0.95)
    with torch.no_grad():
        batch = loss.prepare(env.rollout(6, policy, break_when_any_done=False))
    chunk = 3 if kind == "gru" and not loss.learns_sequences else None

    def learned(compile):
        own = copy.deepcopy(loss)
        update = make_update(own, torch.optim.SGD(own.parameters(), lr=0.1), max_grad_norm=1.0, compile=compile)
        torch.manual_seed(1)
        measured = []
        for phase in own.phases(batch.clone(), chunk_length=chunk):
            measured += [update(minibatch) for minibatch in phase.minibatches(12, epochs=2)]
        names = [[name for name in step if not name.startswith("explained")] for step in measured]
        steps = [
            {name: step[name].clone() for name in own_names} for step, own_names in zip(measured, names, strict=True)
        ]
        return steps, list(own.parameters())

    torch.testing.assert_close(learned(True), learned(False), rtol=1e-3, atol=1e-5)
    assert len(graphs) == (2 if loss.trains_in_parts and method is not HATRPOLoss else 1)


@pytest.mark.parametrize(
    ("method", "options", "rows", "kinds"),
    [
        (HAPPOLoss, {}, 12, 1),
        (HAPPOLoss, {}, 10, 2),  # minibatches of 10, 10 and 4
        (OAPPOLoss, {"reuse_matrix": [[0.5, 0.5, 0.0], [0.0, 1.0, 0.0], [0.2, 0.3, 0.5]]}, 12, 3),
        (OAPPOLoss, {"reuse_matrix": [[1.0, 0.0, 0.0], [0.0, 0.5, 0.5], [0.0, 0.0, 1.0]]}, 12, 2),
        (ComposedLoss, {"reuse_matrix": "AR", "interval": "kl", "ema_rate": 0.5}, 12, 1),
        pytest.param(OAPPOLoss, {"reuse_matrix": "AR", "reuse": "sampled"}, 12, 1, marks=pytest.mark.slow),
    ],
    ids=["happo", "uneven", "oappo", "two sources", "composed", "sampled"],
)
def test_adams_step_in_turns_is_the_uncompiled_one_from_a_graph_for_all_agents(
    method, options, rows, kinds, monkeypatch
):
    """Learning rates of their own, over two batches: momentum moves nobody out of turn, and norms are the learner's."""
    graphs = traced_graphs(monkeypatch)
    torch.manual_seed(0)
    env = make_coordsum("CoordSum-3x4", num_envs=4, seed=0)
    actor, critic = networks(env, method, "mlp")
    fresh = method(actor, critic, functional=False, **options)
    fresh.make_value_estimator(gamma=0.99, lmbda=0.95)
    with torch.no_grad():
        batches = [fresh.prepare(env.rollout(6, actor, break_when_any_done=False)) for _ in range(2)]

    def learned(compile):
        loss = copy.deepcopy(fresh)
        optimizer = torch.optim.Adam(loss.parameter_groups(critic_lr=3e-2), lr=1e-2)
        scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=4)
        update = make_update(loss, optimizer, max_grad_norm=0.1, compile=compile)
        torch.manual_seed(1)
        steps = []
        for batch in batches:
            for phase in loss.phases(batch.clone()):
                others = set(loss.parameters()) - set(loss.trained.parameters())
                before = {parameter: parameter.detach().clone() for parameter in others}
                for minibatch in phase.minibatches(rows, epochs=2):
                    measured = update(minibatch)
                    steps.append({name: value.clone() for name, value in measured.items() if name[:4] != "expl"})
                assert all(torch.equal(parameter, value) for parameter, value in before.items())
                assert all(parameter.grad is None for parameter in loss.parameters())
            scheduler.step()
        return steps, list(loss.parameters()), [optimizer.state[parameter] for parameter in loss.parameters()]

    torch.testing.assert_close(learned(True), learned(False), rtol=1e-3, atol=1e-5)
    assert len(graphs) == kinds + (2 if rows == 10 else 1)  # for each number of sources and of rows; the critic's


def test_agents_in_groups_of_their_own_learn_at_their_own_rates(monkeypatch):
    monkeypatch.setattr(torch, "compile", partial(guardless, torch.compile, lambda graph, _: graph))
    torch.manual_seed(0)
    env = make_coordsum("CoordSum-3x4", num_envs=4, seed=0)
    actor, critic = networks(env, HAPPOLoss, "mlp")
    fresh = HAPPOLoss(actor, critic, functional=False)
    fresh.make_value_estimator(gamma=0.99, lmbda=0.95)
    with torch.no_grad():
        batch = fresh.prepare(env.rollout(6, actor, break_when_any_done=False))

    def learned(compile):
        loss = copy.deepcopy(fresh)
        groups = [{"params": loss.agent_parameters(agent), "lr": 10.0**-agent} for agent in range(3)]
        optimizer = torch.optim.Adam([*groups, {"params": list(loss.critic_network.parameters())}], lr=1e-2)
        update = make_update(loss, optimizer, max_grad_norm=0.1, compile=compile)
        torch.manual_seed(1)
        for phase in loss.phases(batch.clone()):
            for minibatch in phase.minibatches(12, epochs=1):
                update(minibatch)
        return list(loss.parameters())

    torch.testing.assert_close(learned(True), learned(False), rtol=1e-3, atol=1e-5)


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
