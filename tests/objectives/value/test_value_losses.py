"""Targets, masks, memories and the contract of value-based losses; LDSA's subtasks."""

import math

import pytest
import torch
from tensordict import TensorDict
from torch.testing import assert_close
from torchrl.data import Categorical
from torchrl.envs import ExplorationType, set_exploration_type
from torchrl.modules import EGreedyModule, set_recurrent_mode
from torchrl.objectives import HardUpdate, SoftUpdate, ValueEstimators

from tests.objectives.recall_env import RecallEnv
from tests.objectives.value.factories import (
    ACTIONS,
    AGENTS,
    LOSSES,
    OBSERVATION,
    SIZE,
    make_loss,
    make_spec,
    make_table,
    make_transitions,
    with_targets,
)
from torchrl_marl.collectors import ChunkReplayBuffer, epsilon_greedy
from torchrl_marl.modules import (
    GroupSpec,
    ObservationNorm,
    make_actor,
    make_ldsa_actor,
    make_recurrent_actor,
    with_recurrent_state,
)
from torchrl_marl.modules.subtasks import SubtaskHead
from torchrl_marl.objectives import LDSALoss, QMIXLoss, QPLEXLoss, ValueLoss, VDNLoss
from torchrl_marl.objectives.value.ldsa import subtask_distance, subtask_switching

every_loss = pytest.mark.parametrize("name", LOSSES)
RECURRENT = {"LDSA": (5, 6)}  # sequences; the others get rows


def make(name, **options):
    loss, actor = make_loss(name, **options)
    loss.make_value_estimator(gamma=0.9)
    return loss, actor


def run(loss, data):
    """Forward with the same draws of subtasks each time."""
    torch.manual_seed(5)
    return loss(data)


def batch_of(name):
    return RECURRENT.get(name, (12,))


# --- targets


def by_hand(*, double_dqn=True, reward=3.0, done=True, terminated=False, mask=(True, True), live=(True, True)):
    """A VDN loss of two agents with two actions in situations 0 and 1, and one transition from 0 to 1."""
    spec = GroupSpec("agents", 2, 2, num_actions=2)
    loss = with_targets(VDNLoss(make_table(2, 2, 2), spec, double_dqn=double_dqn))
    loss.make_value_estimator(gamma=0.5)
    online = torch.tensor([[[1.0, 2.0], [3.0, 4.0]], [[5.0, 6.0], [8.0, 7.0]]])  # [situation, agent, action]
    target = torch.tensor([[[0.0, 0.0], [0.0, 0.0]], [[70.0, 10.0], [20.0, 50.0]]])
    loss.local_value_network_params["module", "values"].data.copy_(online)
    loss.target_local_value_network_params["module", "values"].data.copy_(target)
    first, second = (torch.eye(2)[situation].expand(1, 2, 2) for situation in (0, 1))
    following = {"observation": second, "reward": torch.tensor([[[reward - 1], [reward + 1]]])}
    following["action_mask"] = torch.tensor([[[True, mask[0]], [True, mask[1]]]])
    following["mask"] = torch.tensor([live])
    ends = {"done": torch.tensor([[done]]), "terminated": torch.tensor([[terminated]])}
    now = {"observation": first, "action": torch.tensor([[1, 0]])}
    data = TensorDict({"agents": now, "next": {"agents": following, **ends}}, batch_size=1)
    output = loss(data)
    assert output["pred_value"] == 2 + 3
    assert_close(output["loss_value"], (output["pred_value"] - output["target_value"]) ** 2)
    return output["target_value"].item()


def test_double_q_learning_values_the_online_networks_action_by_the_target_networks():
    assert by_hand() == 3 + 0.5 * (10 + 20)  # the online networks prefer actions 1 and 0
    assert by_hand(double_dqn=False) == 3 + 0.5 * (70 + 50)


def test_a_truncated_episode_is_bootstrapped_and_a_terminated_one_is_not():
    assert by_hand(done=True, terminated=False) == by_hand(done=False) == 3 + 0.5 * 30
    assert by_hand(done=True, terminated=True) == 3


def test_illegal_actions_are_not_bootstrapped():
    assert by_hand(mask=(False, True)) == 3 + 0.5 * (70 + 20)  # agent 0 prefers the one that is left
    assert by_hand(mask=(False, True), double_dqn=False) == 3 + 0.5 * (70 + 50)
    assert by_hand(mask=(True, False), double_dqn=False) == 3 + 0.5 * (70 + 20)


def test_an_agent_that_has_died_adds_nothing_to_the_next_value():
    assert by_hand(live=(True, False)) == 3 + 0.5 * 10
    assert by_hand(live=(False, False)) == 3


def test_td_lambda_looks_further_within_sequences():
    loss, _ = make("VDN")
    data = make_transitions(loss, (4, 6))
    one_step = loss(data)["target_value"]
    loss.make_value_estimator(ValueEstimators.TDLambda, gamma=0.9, lmbda=1e-4)
    assert_close(loss(data)["target_value"], one_step, rtol=1e-3, atol=1e-3)
    loss.make_value_estimator(ValueEstimators.TDLambda, gamma=0.9, lmbda=0.8)
    assert (loss(data)["target_value"] - one_step).abs() > 0.01


@every_loss
def test_gradients_never_reach_targets(name):
    loss, _ = make(name)
    data = make_transitions(loss, batch_of(name))
    output = run(loss, data)
    sum(value for key, value in output.items() if key.startswith("loss_")).backward()
    online = list(loss.parameters())
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in online)
    for params in (loss.target_local_value_network_params, loss.target_mixer_network_params):
        assert not any(target.requires_grad or target.grad is not None for target in params.values(True, True))
    # the next step's reward is a part of the target alone: it moves the loss, not the value
    (gradient,) = torch.autograd.grad(run(loss, data)["loss_value"], online[:1])
    shifted = data.clone()
    shifted["next", "agents", "reward"] += 1
    assert run(loss, shifted)["pred_value"] == output["pred_value"]
    assert not torch.equal(torch.autograd.grad(run(loss, shifted)["loss_value"], online[:1])[0], gradient)


@pytest.mark.parametrize("restored", [False, True])
def test_target_networks_normalise_observations_as_the_online_ones_do(restored):
    spec = GroupSpec("agents", AGENTS, OBSERVATION, num_actions=ACTIONS)

    def start():
        actor = make_actor(spec, hidden_sizes=[8], normalize_observations=True)
        loss = QMIXLoss(actor, spec)
        return loss, SoftUpdate(loss, tau=0.5), next(m for m in actor.modules() if isinstance(m, ObservationNorm))

    data = TensorDict({"agents": {"observation": 5 + 3 * torch.randn(20, AGENTS, OBSERVATION)}}, 20)
    loss, targets, norm = start()
    norm.update(data)
    if restored:
        stored = loss.state_dict()
        loss, targets, norm = start()
        loss.load_state_dict(stored)
        norm.update(data + 1)
    targets.step()  # parameters are the same: so are the values
    found = []
    for params in (loss.local_value_network_params, loss.target_local_value_network_params):
        with params.to_module(loss.local_value_network):
            found.append(loss.local_value_network(data.clone())["agents", "logits"])
    assert norm.count == 20 * AGENTS * (1 + restored)
    assert_close(*found, rtol=0, atol=0)


@every_loss
@pytest.mark.parametrize("updater", [lambda loss: SoftUpdate(loss, tau=0.25), lambda loss: HardUpdate(loss)])
def test_torchrls_updaters_move_the_targets(name, updater):
    loss, _ = make(name)
    moves = updater(loss)  # which sets the targets to the parameters
    *_, key = loss.local_value_network_params.keys(True, True)
    target, online = loss.target_local_value_network_params[key], loss.local_value_network_params[key]
    assert torch.equal(target, online)
    online.data.add_(1.0)
    if isinstance(moves, SoftUpdate):
        moves.step()
        assert_close(online - target, torch.full_like(online, 0.75))
    else:
        moves.value_network_update_interval = 0
        moves.step()
        assert torch.equal(target, online)


# --- masks


@every_loss
def test_illegal_actions_take_no_part(name):
    loss, _ = make(name, masked=True)
    data = make_transitions(loss, batch_of(name), masked=True)
    before = run(loss, data)
    values = loss.tensor_keys.action_value

    def raise_illegal(module, args, output):
        args[0][values] = torch.where(args[0]["agents", "action_mask"], args[0][values], 1e4)

    loss.local_value_network.register_forward_hook(raise_illegal)
    assert_close(run(loss, data), before)


@every_loss
def test_dead_agents_add_zero_and_learn_nothing(name):
    loss, _ = make(name)
    data = make_transitions(loss, batch_of(name), live=0.6)
    before = run(loss, data)
    values, dead = loss.tensor_keys.action_value, ~data["agents", "mask"]

    def change_dead(module, args, output):
        live = args[0]["agents", "mask"].unsqueeze(-1)
        args[0][values] = torch.where(live, args[0][values], 7.0 - args[0][values])

    loss.local_value_network.register_forward_hook(change_dead)
    assert_close(run(loss, data), before)
    if name == "VDN":
        online = loss._evaluate(data, target=False)
        chosen = online[values].gather(-1, data["agents", "action"].unsqueeze(-1)).squeeze(-1)
        assert_close(before["pred_value"], chosen.where(~dead, 0.0).sum(-1).mean())


@every_loss
def test_padding_takes_no_part(name):
    loss, _ = make(name)
    data = make_transitions(loss, batch_of(name))
    data["collector", "mask"] = torch.arange(len(data)).reshape(-1, *(1 for _ in data.shape)).expand(*data.shape, 1) < 3
    if name != "LDSA":  # whose subtasks are drawn for all rows
        assert_close(run(loss, data), run(loss, data[:3]))
    changed = data.clone()
    changed["next", "agents", "reward"][3:] = 1e3
    assert_close(run(loss, changed), run(loss, data))


def test_exploration_takes_legal_actions_and_all_of_them():
    spec = make_spec(masked=True)
    actor = make_actor(spec, hidden_sizes=(SIZE,))
    loss = VDNLoss(actor, spec)
    data = make_transitions(loss, (500,), masked=True).select(("agents", "observation"), ("agents", "action_mask"))
    data["agents"].batch_size = (500, AGENTS)
    exploration = EGreedyModule(
        Categorical(ACTIONS, shape=(500, AGENTS)),
        eps_init=0.5,
        eps_end=0.0,
        annealing_num_steps=10,
        action_key=("agents", "action"),
        action_mask_key=("agents", "action_mask"),
    )
    policy = epsilon_greedy(actor, exploration)
    mask = data["agents", "action_mask"]
    with set_exploration_type(ExplorationType.RANDOM), torch.no_grad():
        explored = policy(data.clone())["agents", "action"]
        exploration.step(10)
        greedy = policy(data.clone())["agents", "action"]
    with set_exploration_type(ExplorationType.DETERMINISTIC), torch.no_grad():
        evaluated = actor(data.clone())["agents", "action"]
    assert mask.gather(-1, explored.unsqueeze(-1)).all()
    assert torch.equal(greedy, evaluated)
    # with probability one half a random action of those that are legal, which is the greedy one at times
    expected = (0.5 * (1 - 1 / mask.sum(-1))).sum().item()
    assert (explored != greedy).sum().item() == pytest.approx(expected, abs=4 * math.sqrt(expected))


# --- memories


@pytest.mark.parametrize("ldsa", [False, True], ids=["gru", "ldsa"])
def test_recurrent_replay_equals_online_unrolling(ldsa):
    spec = GroupSpec("agents", 2, 2, num_actions=2)
    actor = make_ldsa_actor(spec, recurrent_size=SIZE) if ldsa else make_recurrent_actor(spec, recurrent_size=SIZE)
    loss = with_targets((LDSALoss if ldsa else QMIXLoss)(actor, spec))
    env = with_recurrent_state(RecallEnv(4, num_steps=5), actor)
    with torch.no_grad(), set_exploration_type(ExplorationType.DETERMINISTIC):
        batch = env.rollout(12, actor, break_when_any_done=False)  # episodes end within chunks
    states, values = loss.recurrent_state_keys, loss.tensor_keys.action_value
    buffer = ChunkReplayBuffer([*loss.in_keys, values], states, capacity=48, batch_size=40, chunk_length=4)
    buffer.extend(batch)
    replayed = buffer.sample()
    stored = replayed[values]
    with torch.no_grad(), set_recurrent_mode(True):
        online = loss._evaluate(replayed.exclude(values), target=False)
        following = loss._evaluate_next(online, target=False)
    assert replayed.shape == (10, 4)
    assert_close(online[values], stored, rtol=1e-5, atol=1e-6)
    assert replayed[states[0]][:, 0].any()  # some chunks start within an episode
    # what is observed next is valued as one step later, unless an episode has ended in between
    goes_on = ~replayed["next", "done"][:, :-1].squeeze(-1)
    assert_close(following[values][:, :-1][goes_on], stored[:, 1:][goes_on], rtol=1e-5, atol=1e-6)


def test_the_buffer_holds_the_newest_steps_and_goes_on_from_its_state():
    buffers = [ChunkReplayBuffer(["x"], capacity=10, batch_size=6, chunk_length=2) for _ in range(2)]
    for start in (0, 8, 16):
        buffers[0].extend(TensorDict({"x": torch.arange(start, start + 8).reshape(2, 4)}, batch_size=(2, 4)))
    state = buffers[0].state_dict()
    buffers[1].load_state_dict(state)
    drawn = []
    for buffer in buffers:
        torch.manual_seed(0)
        drawn.append(torch.stack([buffer.sample()["x"] for _ in range(20)]))
    assert torch.equal(*drawn)
    assert drawn[0].shape == (20, 3, 2)
    assert set(drawn[0].flatten().tolist()) == set(range(14, 24))
    assert torch.equal(drawn[0][..., 1], drawn[0][..., 0] + 1)


def test_a_buffer_that_holds_no_sample_is_refused():
    with pytest.raises(ValueError, match="capacity must be at least the 40 steps of a sample; got 39"):
        ChunkReplayBuffer(["x"], capacity=39, batch_size=40)
    with pytest.raises(ValueError, match="chunk_length must be an integer: a recurrent policy"):
        ChunkReplayBuffer(["x"], ["h"], capacity=50, batch_size=40)


# --- LDSA


def make_head():
    """Two subtasks with representations (tanh 1, 0) and (0, tanh 1), one memory of each kind, two actions."""
    head = SubtaskHead(recurrent_size=1, num_actions=2, num_subtasks=2, subtask_size=2)
    head.encoder.weight.data.copy_(torch.eye(2))
    head.ability.weight.data.copy_(torch.tensor([[2.0], [-1.0]]))
    head.ability.bias.data.zero_()
    head.weight.weight.data.copy_(torch.tensor([[3.0, 5.0], [4.0, 6.0]]))
    head.weight.bias.data.zero_()
    head.bias.weight.data.copy_(torch.tensor([[1.0, 0.0], [0.0, 2.0]]))
    head.bias.bias.data.zero_()
    return head


def test_agents_choose_the_subtask_that_fits_their_ability_and_act_by_its_values():
    t = math.tanh(1)
    state = torch.tensor([[1.0, 10.0], [-1.0, 10.0]])  # ability, then the policy's memory
    with set_exploration_type(ExplorationType.DETERMINISTIC):
        logits, values = make_head()(state)
    assert_close(logits, t * torch.tensor([[2.0, -1.0], [-2.0, 1.0]]))
    assert_close(values, t * torch.tensor([[10 * 3.0 + 1, 10 * 4.0], [10 * 5.0, 10 * 6.0 + 2]]))


def test_explored_subtasks_are_drawn_by_their_probabilities_with_a_gradient():
    head, state = make_head(), torch.tensor([[0.5, 10.0]]).expand(4000, 2)
    with set_exploration_type(ExplorationType.RANDOM):
        logits, values = head(state)
    first = (values[:, 0] < 40 * math.tanh(1)).float().mean().item()  # 31 tanh 1 or 50 tanh 1
    probability = logits[0].softmax(-1)[0].item()
    assert first == pytest.approx(probability, abs=4 * math.sqrt(probability * (1 - probability) / 4000))
    values.sum().backward()
    assert head.ability.weight.grad.any()
    assert head.encoder.weight.grad.any()


def test_the_regularisers_of_a_case_by_hand():
    # Distances 25 between the first two, 1 and 20 to the third; each pair counts twice of six.
    subtasks = torch.tensor([[0.0, 0.0], [3.0, 4.0], [1.0, 0.0]], requires_grad=True)
    distance = subtask_distance(subtasks)
    assert_close(distance.item(), (25 + 1 + 20) / 3)
    (gradient,) = torch.autograd.grad(distance, subtasks)
    assert_close(gradient[0], 2 * torch.tensor([-4.0, -4.0]) / 6)  # of the pairs in which it is the first
    # One agent, three steps: one half to 4/5 within an episode; the third step starts another one.
    logits = torch.tensor([[0.0, 0.0], [math.log(4), 0.0], [9.0, 0.0]]).reshape(1, 3, 1, 2).requires_grad_()
    is_init = torch.tensor([True, False, True]).reshape(1, 3, 1)
    switching = subtask_switching(logits, is_init)
    assert_close(switching.item(), 0.5 * math.log(0.5 / 0.8) + 0.5 * math.log(0.5 / 0.2))
    (gradient,) = torch.autograd.grad(switching, logits)
    assert_close(gradient[0, :, 0], torch.tensor([[0.0, 0.0], [0.3, -0.3], [0.0, 0.0]]))  # p_after - p_before


def test_ldsa_weighs_its_regularisers():
    loss, _ = make("LDSA", distance_coeff=0.25, switching_coeff=0.5)
    data = make_transitions(loss, (5, 6))
    output = run(loss, data)
    with loss._parameters_of("local_value_network", target=False):
        head = next(module for module in loss.local_value_network.modules() if isinstance(module, SubtaskHead))
        assert_close(output["loss_distance"], -0.25 * subtask_distance(head.subtasks()))
    with set_recurrent_mode(True):
        logits = loss._evaluate(data, target=False)["agents", "subtask_logits"]
    assert_close(output["loss_switching"], 0.5 * subtask_switching(logits, data["is_init"]))


# --- contract


@every_loss
def test_out_keys_are_what_forward_returns_and_losses_alone_carry_gradients(name):
    loss, _ = make(name)
    output = run(loss, make_transitions(loss, batch_of(name)))
    assert sorted(output.keys()) == sorted(loss.out_keys)
    for key, value in output.items():
        assert value.shape == ()
        assert value.requires_grad == key.startswith("loss_")


@every_loss
def test_in_keys_are_all_that_forward_reads_and_it_writes_nothing(name):
    loss, _ = make(name, masked=True)
    data = make_transitions(loss, batch_of(name), masked=True, live=0.7)
    data["agents", "unrelated"] = torch.zeros(*data.shape, AGENTS)
    before = data.clone()
    assert_close(run(loss, data.select(*loss.in_keys, strict=False)), run(loss, data), rtol=0, atol=0)
    assert sorted(map(str, data.keys(True, True))) == sorted(map(str, before.keys(True, True)))
    assert (data == before).all()


@every_loss
def test_keys_can_be_renamed(name):
    loss, _ = make(name)
    data = make_transitions(loss, batch_of(name))
    before = run(loss, data)
    loss.set_keys(action="act", reward="paid", done="over", terminated="dead")
    renamed = data.exclude(("agents", "action"), ("next", "agents", "reward"), ("next", "done"), ("next", "terminated"))
    renamed["act"], renamed["next", "paid"] = data["agents", "action"], data["next", "agents", "reward"].mean(-2)
    renamed["next", "over"], renamed["next", "dead"] = data["next", "done"], data["next", "terminated"]
    assert {"act", ("next", "paid"), ("next", "over"), ("next", "dead")} <= set(loss.in_keys)
    assert_close(run(loss, renamed), before)


@every_loss
def test_a_state_dict_restores_parameters_and_targets(name):
    one, other = make(name)[0], make(name)[0]
    data = make_transitions(one, batch_of(name))
    assert run(one, data)["loss_value"] != run(other, data)["loss_value"]
    other.load_state_dict(one.state_dict())
    assert_close(run(other, data), run(one, data), rtol=0, atol=0)


@every_loss
def test_parameters_are_the_networks_own(name):
    loss, actor = make(name)
    held = {id(parameter) for parameter in loss.parameters()}
    assert {id(parameter) for parameter in actor.parameters()} <= held
    assert loss.functional


@every_loss
def test_a_missing_entry_is_named(name):
    loss, _ = make(name)
    data = make_transitions(loss, batch_of(name))
    for key in (("agents", "action"), ("next", "agents", "reward"), ("next", "done")):
        with pytest.raises(KeyError, match=key[-1]):
            loss(data.exclude(key))


@pytest.mark.parametrize("name", ["QPLEX", "LDSA"])  # QPLEX has all of VDN's graph, LDSA QMIX's and a memory
def test_compiled_equals_eager(name):
    torch.compiler.reset()
    loss, _ = make(name, masked=True)
    loss.deterministic_sampling_mode = ExplorationType.DETERMINISTIC  # of subtasks: compiled noise is another
    data = make_transitions(loss, (2, 3) if name == "LDSA" else (5,), masked=True, live=0.7)
    outputs = [module(data) for module in (torch.compile(loss, fullgraph=True, backend="aot_eager"), loss)]
    assert_close(outputs[0], outputs[1], rtol=1e-4, atol=1e-5)
    parameters = list(loss.parameters())
    gradients = [
        torch.autograd.grad(output["loss_value"], parameters, allow_unused=True, materialize_grads=True)
        for output in outputs
    ]
    for compiled, eager in zip(*gradients, strict=True):
        assert_close(compiled, eager, rtol=1e-3, atol=1e-4)


# --- refusals


@every_loss
def test_continuous_actions_are_refused(name):
    spec = GroupSpec("agents", AGENTS, OBSERVATION, action_low=(-1.0,), action_high=(1.0,))
    actor = make_loss("LDSA")[1] if name == "LDSA" else make_actor(spec)
    with pytest.raises(ValueError, match="Loss needs discrete actions, but 'agents' has continuous ones"):
        LOSSES[name](actor, spec)
    with pytest.raises(ValueError, match="LDSA needs discrete actions"):
        make_ldsa_actor(spec)


@every_loss
def test_a_mixer_of_another_number_of_agents_is_refused(name):
    loss, actor = make_loss(name)
    data = make_transitions(loss, batch_of(name))
    with pytest.raises(ValueError, match=r"the mixer of \w+ is made for 4 agents with 4 actions each") as refused:
        with_targets(LOSSES[name](actor, make_spec(agents=4)))(data)
    assert "\n" not in str(refused.value)


def test_options_out_of_range_are_refused():
    spec = make_spec()
    with pytest.raises(TypeError, match="ValueLoss is abstract"):
        ValueLoss(make_table(), None, spec)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="loss_function must be one of l2, l1, smooth_l1; got 'huber'"):
        VDNLoss(make_table(), spec, loss_function="huber")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="num_heads must be at least 1; got 0"):
        QPLEXLoss(make_table(), spec, num_heads=0)
    with pytest.raises(ValueError, match="LDSALoss needs agents that choose subtasks"):
        LDSALoss(make_table(), spec)
    with pytest.raises(ValueError, match="num_subtasks must be at least 2; got 1"):
        make_ldsa_actor(spec, num_subtasks=1)
    with pytest.raises(ValueError, match="distance_coeff must be a number of at least 0; got -1"):
        LDSALoss(make_ldsa_actor(spec), spec, distance_coeff=-1)


@pytest.mark.parametrize("name", ["QMIX", "QPLEX"])
def test_mixers_see_the_state_where_there_is_one(name):
    spec = make_spec(state_size=7)
    loss = with_targets(LOSSES[name](make_table(), spec))
    assert {"state", ("next", "state")} <= set(loss.in_keys)
    data = make_transitions(loss)
    data["state"], data["next", "state"] = torch.randn(12, 7), torch.randn(12, 7)
    before = loss(data)
    other = data.clone()
    other["state"] += 1
    assert loss(other)["pred_value"] != before["pred_value"]
