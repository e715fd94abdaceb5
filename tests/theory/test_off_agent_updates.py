"""OAPPO: what an agent may gain from another one's experience, and what that is worth for the team.

Lemma 1 bounds J(new) - J(old) by surrogates E[A] in which agent e_m acts in slot m. For mappings other than the
identity this is a statement about the team in which it does: about the agents in their own slots it says nothing
unless they are alike, which is what Condition 1 asks for, approximately. Theorem 1's bound, "the largest number of a
neighbourhood of 0", has no number to test. So these tests show what the surrogate is, that the lemma holds for the team
that it speaks of and not for the printed one, and how the share of own experience decides between gain and loss.
"""

import itertools

import pytest
import torch
from torch.testing import assert_close

from tests.theory.tabular import EXACT, Game, ascend, random_game, random_policies, write
from tests.theory.test_sequential_updates import expected_advantage, largest_kl, penalty
from torchrl_marl.objectives import HAPPOLoss, OAPPOLoss
from torchrl_marl.objectives.surrogates import ratio_gain

CYCLE = torch.tensor([[0.0, 1.0, 0.0], [0.0, 0.0, 1.0], [1.0, 0.0, 0.0]])  # agent 0 learns from 1, 1 from 2, 2 from 0


def surrogates(game, old, new, mapping, order):
    """What OAPPO's loss says that each learner's change gains, in turn; and the team that it speaks of, ``[N, S, K]``.

    In learner i's turn, with source j, agents that have had their turn act in their own slots and i acts in slot j.
    """
    actor, critic = game.networks(old)
    loss = OAPPOLoss(actor, critic, reuse_matrix=mapping, gain=ratio_gain, **EXACT)
    rows, gains, team = game.rows(old), {}, old.clone()
    for turn in loss.turns(rows, order=order):
        if turn == "critic":
            continue
        source = int(mapping[turn].argmax())
        before, judged = team.clone(), team.clone()
        before[source], judged[source] = old[source], new[turn]
        write(actor, turn, old[source])
        standing = loss(rows)["loss_objective"]
        write(actor, turn, new[turn])
        gains[turn] = ((standing - loss(rows)["loss_objective"]).detach().sum(), before, judged)
        team[turn] = new[turn]
    return gains


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_a_learners_surrogate_is_the_advantage_of_the_team_in_which_it_acts_for_its_source(order):
    """Proposition 1 (Eq. 6): a ratio pi_i(a_j|o_j) / pi_j(a_j|o_j), times the compound ratio of the others.

    It is the expected advantage of a real team: the agents that have been updated in their own slots, learner i in
    slot j. In the paper they are in the slots of *their* sources; ours is the team that acts (the identity has both).
    """
    game = random_game(1)
    old, new = random_policies(game, 1), random_policies(game, 2)
    evaluation = game.evaluate(game.joint(old))
    for gain, before, judged in surrogates(game, old, new, CYCLE, order).values():
        joint_before, joint = game.joint(before), game.joint(judged)
        difference = expected_advantage(game, evaluation, joint) - expected_advantage(game, evaluation, joint_before)
        assert_close(gain, difference)


@pytest.mark.parametrize("seed", range(3))
def test_the_bound_holds_for_the_team_in_which_learners_act_for_their_sources(seed):
    """Lemma 1, read as the penalty of Algorithm 1 line 8, KL(pi_m, pi_{e_m}), and the return of that very team."""
    game = random_game(seed)
    old = random_policies(game, seed, distance=0.1)  # agents are alike: learners stay near their sources
    evaluation = game.evaluate(game.joint(old))
    for distance, mapping in itertools.product((0.0, 0.01, 0.3), itertools.permutations(range(3))):
        new = random_policies(game, 7, near=old, distance=distance)
        team = new[list(mapping)]  # agent mapping[m] acts in slot m
        divergences = sum(largest_kl(old[slot], team[slot]) for slot in range(3))
        gain = game.evaluate(game.joint(team)).ret - evaluation.ret
        expected = expected_advantage(game, evaluation, game.joint(team))
        assert gain >= expected - penalty(game, evaluation) * divergences


def test_the_lemma_as_printed_needs_agents_that_are_alike():
    """Lemma 1 literally, with KL(pi_{e_m}, new pi_{e_m}) and J of the agents in their own slots, is false in general.

    Nobody changes, so the left side and all penalties are zero; but two agents would be better off in each other's
    slots, so the surrogate is positive. Condition 1 excludes the mapping here: its divergence is above any small sigma.
    """
    game = Game(torch.tensor([[0.0, 1.0, 0.0, 0.0]]), num_agents=2)  # paid for actions 0 and 1
    old = torch.tensor([[[0.1, 0.9]], [[0.9, 0.1]]]).double()
    evaluation = game.evaluate(game.joint(old))
    exchanged = expected_advantage(game, evaluation, game.joint(old.flip(0)))
    assert exchanged > 0.5 > 0  # what the lemma says that standing still gains at least
    assert largest_kl(old[0], old[1]) > 1


def test_reuse_of_what_differs_too_much_is_switched_off_and_leaves_happos_guarantee():
    """Condition 1: with every other policy beyond the threshold, the surrogate is HAPPO's, and so is its theorem."""
    game = random_game(4)
    old = random_policies(game, 5)
    (actor, critic), (same, _) = game.networks(old), game.networks(old)
    gated = OAPPOLoss(actor, critic, own_weight=0.2, kl_threshold=1e-4, gain=ratio_gain, **EXACT)
    happo = HAPPOLoss(same, critic, gain=ratio_gain, **EXACT)
    rows = game.rows(old)
    new = random_policies(game, 6, near=old, distance=0.5)
    turns = (loss.turns(data, order=[2, 1, 0]) for loss, data in ((gated, rows), (happo, rows.clone())))
    for turn, _ in zip(*turns, strict=True):
        if turn != "critic":
            write(actor, turn, new[turn])
            write(same, turn, new[turn])
            assert_close(gated(rows)["loss_objective"].sum(), happo(rows)["loss_objective"].sum())
    assert torch.equal(gated.reuse.matrix, torch.eye(3))


@pytest.mark.parametrize(("own_weight", "sign"), [(1.0, 1), (0.7, 1), (0.4, -1), (0.2, -1)])
def test_with_opposite_interests_the_share_of_own_experience_decides_whether_the_return_rises(own_weight, sign):
    """Section 6.1, Fig. 3d: a small lambda puts others' experience first and can lead astray.

    Two agents with the same policy are paid for opposite actions. Condition 1 holds perfectly, the divergence is zero,
    and yet an agent that counts more of the other's experience than of its own moves the wrong way: closeness of
    policies alone does not make a reuse safe, and "approximately monotonic" has no bound here that does not depend on
    lambda. (In the paper's maze 0.4 does no harm: there the agents have most of the way in common.)
    """
    game = Game(torch.tensor([[1.0, 2.0, 0.0, 1.0]]), num_agents=2)  # a point for a first 0, one for a second 1
    old = torch.full((2, 1, 2), 0.5).double()
    actor, critic = game.networks(old)
    loss = OAPPOLoss(actor, critic, own_weight=own_weight, gain=ratio_gain, **EXACT)
    rows = game.rows(old)
    for turn in loss.turns(rows):
        if turn != "critic":
            ascend(lambda: -loss(rows)["loss_objective"].sum(), loss.agent_parameters(turn), steps=5)
    gain = game.evaluate(game.joint(game.policies(actor))).ret - game.evaluate(game.joint(old)).ret
    assert sign * gain > 0.05
