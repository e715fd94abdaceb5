"""HAPPO and HATRPO: agents that update one after the other do not lower the return.

The theorems speak of exact expectations and of a penalty on the largest divergence; the algorithms sample, and replace
the penalty by a clip or a mean divergence. So these tests show that our surrogate is the one of the theorems, that the
theorems' update, made of it, never lowers a return, and that the practical updates do not either where expectations are
exact and steps are small. They cannot show that a practical update never does: no theorem says so.
"""

import itertools

import pytest
import torch
from torch.testing import assert_close

from tests.theory.tabular import EXACT, Game, ascend, random_game, random_policies, write
from torchrl_marl.objectives import HAPPOLoss, HATRPOLoss
from torchrl_marl.objectives.divergences import categorical_kl
from torchrl_marl.objectives.surrogates import ratio_gain


def penalty(game, evaluation):
    """C of TRPO's bound, 4 discount max|A| / (1 - discount)^2."""
    return 4 * game.discount * evaluation.advantage.abs().max() / (1 - game.discount) ** 2


def largest_kl(old, new):
    return categorical_kl(old.log(), new.log()).max()


def expected_advantage(game, evaluation, joint):
    """E of the old advantage under another joint policy, in the states that the old one visits."""
    return evaluation.visits @ (joint * evaluation.advantage).sum(-1)


def surrogates(game, old, new, order):
    """What HAPPO's loss says that each agent's change gains, in turn, with the compound ratio of those before it."""
    actor, critic = game.networks(old)
    loss, rows, gains = HAPPOLoss(actor, critic, gain=ratio_gain, **EXACT), game.rows(old), {}
    for turn in loss.turns(rows, order=order):
        if turn != "critic":
            before = loss(rows)["loss_objective"]
            write(actor, turn, new[turn])
            gains[turn] = (before - loss(rows)["loss_objective"]).detach().sum()
    return gains


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_advantages_decompose_along_any_order_of_agents(order):
    """Multi-agent advantage decomposition (Kuba et al., Lemma 1; MAGPO, Lemma 1; OAPPO, appendix B).

    The gains of HAPPO's turns, whose m-th is E[A^{i_m}(s, a^{i_1:m-1}, a^{i_m})] with the first m agents at their new
    policies, add up to the expected joint advantage of the new joint policy, whatever the order and however far the
    policies move; and each is the difference of two such expectations. So the compound ratio, and nothing else, makes
    agents' advantages into the team's. Advantages are given: nothing is said of how a critic estimates them.
    """
    game = random_game(0)
    old, new = random_policies(game, 1), random_policies(game, 2, distance=2.0)
    gains, evaluation = surrogates(game, old, new, order), game.evaluate(game.joint(old))
    mixed = old.clone()
    for agent in order:
        before = expected_advantage(game, evaluation, game.joint(mixed))
        mixed[agent] = new[agent]
        assert_close(gains[agent], expected_advantage(game, evaluation, game.joint(mixed)) - before)
    assert_close(sum(gains.values()), expected_advantage(game, evaluation, game.joint(new)))


@pytest.mark.parametrize("seed", range(4))
def test_the_return_gains_at_least_the_surrogates_less_their_penalties(seed):
    """Kuba et al., Lemma 2 and Theorem 2's bound: J(new) - J(old) >= sum_m (L_m - C max KL_m), at every distance.

    The bound is far from tight: with a discount of 0.5 the penalty is of the order of 10 KL. It says what a step is
    worth at least, not which step to take.
    """
    game = random_game(seed)
    old = random_policies(game, seed)
    evaluation = game.evaluate(game.joint(old))
    for distance in (0.001, 0.01, 0.1, 1.0):
        new = random_policies(game, 10 + seed, near=old, distance=distance)
        gain = game.evaluate(game.joint(new)).ret - evaluation.ret
        divergences = sum(largest_kl(old[agent], new[agent]) for agent in range(game.num_agents))
        bound = sum(surrogates(game, old, new, (2, 0, 1)).values()) - penalty(game, evaluation) * divergences
        assert gain >= bound
        if distance == 0.001:
            assert abs(gain - bound) < 0.01  # not true for the sake of a huge penalty


def test_the_theorems_update_raises_the_return_every_time():
    """HATRPO's theorem (Kuba et al., Theorem 2): agents that maximise L_m - C max KL_m in turn improve monotonically.

    Agents need not find the maximum: whatever is better than standing still is enough, here a few steps of Adam that
    are taken back if they were not. The gain is at least what the penalised surrogates promise.
    """
    game = random_game(3, discount=0.2)
    actor, critic = game.networks(random_policies(game, 4))
    loss = HAPPOLoss(actor, critic, gain=ratio_gain, **EXACT)
    returns = []
    for _ in range(6):
        old = game.policies(actor)
        rows, evaluation, promised = game.rows(old), game.evaluate(game.joint(old)), torch.zeros(())
        returns.append(evaluation.ret)
        for turn in loss.turns(rows):
            if turn == "critic":
                continue
            before = -loss(rows)["loss_objective"].detach().sum()

            def worth(turn=turn, rows=rows, old=old, before=before, evaluation=evaluation):
                states = rows["agents", "observation"][:, turn].argmax(-1)
                logits = loss.actor_network.get_dist(rows).logits[:, turn]
                kl = categorical_kl(old[turn].log()[states], logits).max()
                return -loss(rows)["loss_objective"].sum() - before - penalty(game, evaluation) * kl

            ascend(worth, loss.agent_parameters(turn), steps=12, lr=0.02)
            if worth() < 0:
                write(actor, turn, old[turn])
            promised = promised + worth().detach()
        assert promised > 0
        assert game.evaluate(game.joint(game.policies(actor))).ret >= evaluation.ret + promised
    assert returns[-1] > returns[0] + 0.02


def test_hatrpo_with_exact_expectations_raises_the_return_every_time():
    """HATRPO's practical step: a mean divergence for the largest one, a line search for the penalty.

    ``reduction="mean"`` takes the divergence over the enumerated rows, all states alike. That each step improves is
    what the algorithm aims at, in this game with this radius; it is no theorem.
    """
    game = random_game(5)
    actor, critic = game.networks(random_policies(game, 6))
    loss = HATRPOLoss(actor, critic, max_kl=1e-3, **{**EXACT, "reduction": "mean"})
    returns = []
    for _ in range(15):
        old = game.policies(actor)
        rows = game.rows(old)
        rows["advantage"] *= len(rows)  # a mean of so many rows
        returns.append(game.evaluate(game.joint(old)).ret)
        for turn in loss.turns(rows):
            if turn != "critic":
                assert loss.step(rows)["step_fraction"] > 0
    assert all(later > earlier for earlier, later in itertools.pairwise(returns))
    assert returns[-1] > returns[0] + 0.3


def test_agents_that_update_at_once_can_lower_the_return_where_those_in_turn_raise_it():
    """Why HAPPO has turns: two agents are paid for different actions, and both mostly take the first one.

    At once, each moves to the second action, which the other one does too. In turn, the second agent's rows carry the
    first one's compound ratio, and it stays. The wide clip lets the agents move far; outside of turns the loss is
    MAPPO's with networks of agents' own. One game is an example, no claim about all games.
    """
    game = Game(torch.tensor([[0.0, 1.0, 1.0, 0.0]]), num_agents=2)
    start = torch.tensor([[[0.6, 0.4]], [[0.6, 0.4]]]).double()

    def returns(sequential):
        actor, critic = game.networks(start)
        loss, found = HAPPOLoss(actor, critic, clip_epsilon=0.9, **EXACT), []
        for _ in range(4):
            old = game.policies(actor)
            rows = game.rows(old)
            found.append(game.evaluate(game.joint(old)).ret)
            for turn in loss.turns(rows) if sequential else ("at once",):
                if turn != "critic":
                    trained = loss.agent_parameters(turn) if sequential else actor.parameters()
                    ascend(lambda rows=rows: -loss(rows)["loss_objective"].sum(), trained, steps=25)
        return torch.stack(found)

    at_once, in_turn = returns(sequential=False), returns(sequential=True)
    assert at_once[1] < 0.4 < at_once[0]
    assert (in_turn.diff() > 0).all()
    assert in_turn[-1] > 0.9
