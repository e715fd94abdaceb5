"""PaxMen by the rules of the MARS paper, by hand and by a plain implementation on lists."""

import random
from collections import deque

import pytest
import torch

from torchrl_marl.envs import PaxMenEnv, make_paxmen

MOVES = [(-1, 0), (1, 0), (0, -1), (0, 1)]
EAT, FLOOR, WALL = 4, 24, 25
COST = 0.025


def grids(rules):
    """The layouts as rows of cells: a wall, floor, or the number of a dot."""
    return rules.kind.reshape(-1, 15, 15).tolist()


def neighbours(grid, row, column):
    return [(row + down, column + right) for down, right in MOVES if grid[row + down][column + right] != WALL]


def distances(grid):
    steps, queue = {(7, 7): 0}, deque([(7, 7)])
    while queue:
        cell = queue.popleft()
        for other in neighbours(grid, *cell):
            if other not in steps:
                steps[other] = steps[cell] + 1
                queue.append(other)
    return steps


def placed(rules, cells, layout=0, dots=range(24)):
    """A state with the agents in the given cells and the given dots left."""
    state = rules.reset(torch.zeros(1, dtype=torch.int64))
    state["layout"] = torch.tensor([layout])
    state["cell"] = torch.tensor([[15 * row + column for row, column in cells]])
    state["dots"] = torch.tensor([[float(number in dots) for number in range(26)]])
    return state


def where(rules, number, layout=0):
    """The cell of a dot."""
    return divmod(rules.kind.reshape(-1, 225)[layout].tolist().index(number), 15)


def step(rules, state, *actions):
    state, data = rules.step(state, torch.tensor([actions]))
    reward = data["agents", "reward"]
    assert (reward == reward[:, :1]).all()
    return state, data, reward[0, 0, 0].item()


@pytest.fixture
def rules():
    return PaxMenEnv(3, num_envs=1, seed=0).rules


def test_every_layout_is_a_hub_with_corridors_to_eight_dead_ends_of_three_dots(rules):
    lengths = set()
    for grid in grids(rules):
        steps = distances(grid)
        free = {(row, column) for row in range(15) for column in range(15) if grid[row][column] != WALL}
        assert set(steps) == free  # all can be reached
        assert all(0 < row < 14 and 0 < column < 14 for row, column in free)
        hub = {(row, column) for row in (6, 7, 8) for column in (6, 7, 8)}
        assert hub <= free
        assert sum(cell in hub for r, c in free - hub for cell in neighbours(grid, r, c)) == 4  # four ways out
        corridors = free - hub
        links = sum(len(neighbours(grid, *cell)) for cell in corridors)  # those to the hub once, others twice
        assert links == 2 * (len(corridors) - 4) + 4  # four trees
        ends = [cell for cell in free if len(neighbours(grid, *cell)) == 1]
        lengths.add(tuple(sorted(steps[end] for end in ends)))
        dots = {grid[r][c]: (r, c) for r, c in free if grid[r][c] != FLOOR}
        assert sorted(dots) == list(range(24))
        for end in ends:
            arm, seen = end, {end}
            for _ in range(2):
                (arm,) = [cell for cell in neighbours(grid, *arm) if cell not in seen]
                seen.add(arm)
            assert seen <= set(dots.values())
        assert len(ends) == 8
    assert lengths == {(7, 9, 9, 9, 10, 10, 10, 11), (7, 8, 9, 10, 10, 10, 11, 11), (7, 7, 8, 9, 9, 11, 11, 11)}


def test_layouts_are_three_mazes_in_all_orientations(rules):
    layouts = {tuple(map(tuple, grid)) for grid in grids(rules)}
    assert len(layouts) == 24
    turned = {tuple(zip(*grid[::-1], strict=True)) for grid in layouts}
    mirrored = {tuple(row[::-1] for row in grid) for grid in layouts}
    assert turned == mirrored == layouts


def test_every_episode_draws_a_layout_and_all_are_equally_likely():
    env = PaxMenEnv(4, num_envs=24_000, seed=0)
    counts = env.reset()["state"][:, :24].sum(0)
    assert ((counts - 1000) ** 2 / 1000).sum() < 23 + 4 * 46**0.5
    first, second = (env.reset()["state"][:, :24].argmax(-1) for _ in range(2))
    assert (first == second).float().mean().item() == pytest.approx(1 / 24, abs=0.006)


def test_agents_begin_in_distinct_cells_of_the_hub():
    cells = PaxMenEnv(8, num_envs=1).reset()["state"][0, 48:].reshape(8, 2) * 14
    assert len(cells.unique(dim=0)) == 8
    assert cells.min() >= 6 - 1e-4
    assert cells.max() <= 8 + 1e-4


def test_a_dot_is_one_for_the_team_however_many_eat_it(rules):
    dot, other, hub = where(rules, 0), where(rules, 5), (7, 7)
    for cells, actions, eaten in [
        ((dot, hub, hub), (EAT, 0, 0), {0}),
        ((dot, dot, hub), (EAT, EAT, EAT), {0}),
        ((dot, dot, dot), (EAT, EAT, EAT), {0}),
        ((dot, other, dot), (EAT, EAT, EAT), {0, 5}),
        ((hub, hub, hub), (EAT, EAT, EAT), set()),
        ((dot, dot, dot), (0, 1, 2), set()),  # only eating eats
    ]:
        state, data, reward = step(rules, placed(rules, cells), *actions)
        assert reward == pytest.approx(len(eaten) - COST)
        assert set(range(24)) - set(state["dots"][0].nonzero().flatten().tolist()) == eaten
        assert torch.equal(data["state"][0, 24:48], state["dots"][0, :24])
    state, _, _ = step(rules, placed(rules, (dot, hub, hub)), EAT, 0, 0)
    assert step(rules, state, EAT, EAT, EAT)[2] == pytest.approx(-COST)  # it is gone


def test_dots_come_back_when_the_last_is_eaten(rules):
    dot = where(rules, 7)
    state, data, reward = step(rules, placed(rules, (dot, (7, 7), (7, 7)), dots={7}), EAT, 0, 0)
    assert reward == pytest.approx(1 - COST)
    assert data["state"][0, 24:48].tolist() == [1] * 24
    assert step(rules, state, EAT, 0, 0)[2] == pytest.approx(1 - COST)
    state, data, _ = step(rules, placed(rules, (dot, (7, 7), (7, 7)), dots={7, 8}), EAT, 0, 0)
    assert data["state"][0, 24:48].sum() == 1


def test_the_info_counts_the_dots_eaten_in_all_rounds(rules):
    dot, hub = where(rules, 7), (7, 7)
    state, data, _ = step(rules, placed(rules, (dot, hub, hub), dots={7, 8}), 4, 0, 0)
    assert data["info", "eaten"].tolist() == [[pytest.approx(1 / 24)]]
    state["dots"] = placed(rules, (dot, hub, hub), dots={7})["dots"]
    state, data, _ = step(rules, state, 4, 0, 0)  # the last one: they come back
    assert data["info", "eaten"].tolist() == [[pytest.approx(2 / 24)]]
    for _ in range(3):
        state, data, _ = step(rules, state, 4, 0, 0)
    assert data["info", "eaten"].tolist() == [[pytest.approx(3 / 24)]]
    assert rules.describe(rules.restart(state, torch.tensor([True])))["info", "eaten"].tolist() == [[0.0]]


def test_moves_go_where_there_is_no_wall(rules):
    for layout in (0, 7, 13, 23):
        grid = grids(rules)[layout]
        for row, column in distances(grid):
            for action, (down, right) in enumerate([*MOVES, (0, 0)]):
                state, *_ = step(rules, placed(rules, [(row, column)] * 3, layout), action, EAT, EAT)
                ahead = (row + down, column + right)
                expected = ahead if grid[ahead[0]][ahead[1]] != WALL else (row, column)
                assert divmod(int(state["cell"][0, 0]), 15) == expected


@pytest.mark.parametrize("radius", [1, 2, 3])
def test_observations_show_walls_dots_and_other_agents_around(radius):
    rules = PaxMenEnv(4, view_radius=radius, num_envs=1).rules
    chance = random.Random(0)
    for layout in range(0, 24, 5):
        grid = grids(rules)[layout]
        for _ in range(20):
            middle = chance.choice(sorted(distances(grid)))
            near = [cell for cell in distances(grid) if max(abs(cell[0] - middle[0]), abs(cell[1] - middle[1])) <= 3]
            cells = [chance.choice(sorted(near)) for _ in range(4)]
            dots = set(chance.sample(range(24), 12))
            seen = rules.describe(placed(rules, cells, layout, dots))["agents", "observation"][0]
            side = 2 * radius + 1
            for agent, (row, column) in enumerate(cells):
                expected = torch.zeros(3, side, side)
                for r in range(side):
                    for c in range(side):
                        y, x = row + r - radius, column + c - radius
                        kind = grid[y][x] if 0 <= y < 15 and 0 <= x < 15 else WALL
                        expected[0, r, c] = kind == WALL
                        expected[1, r, c] = kind in dots
                        expected[2, r, c] = any(cells[other] == (y, x) for other in range(4) if other != agent)
                assert torch.equal(seen[agent], expected.flatten())


def test_an_agent_sees_itself_nowhere(rules):
    seen = rules.describe(placed(rules, ((7, 7), (1, 3), (1, 3))))["agents", "observation"][0].reshape(3, 3, 25)
    assert seen[:, 2].sum(-1).tolist() == [0, 1, 1]
    assert seen[1:, 2, 12].tolist() == [1, 1]  # who shares its cell is in the middle


def test_random_play_equals_a_plain_implementation():
    env = make_paxmen("PaxMen-5", num_envs=3, max_steps=400, seed=3)
    chance = random.Random(1)
    data = env.reset()
    layouts = [grids(env.rules)[int(row[:24].argmax())] for row in data["state"]]
    cells = [[tuple(place) for place in (row[48:] * 14).round().int().reshape(5, 2).tolist()] for row in data["state"]]
    dots = [{0, 1, 2} for _ in range(3)]  # one dead end, so that random walks come to an end of it
    env.state["dots"] = (torch.arange(26).expand(3, -1) < 3).float()
    rounds, returns = 0, [0.0] * 3
    for _ in range(400):
        actions = []
        for k, grid in enumerate(layouts):
            actions.append([EAT if grid[r][c] in dots[k] else chance.randrange(5) for r, c in cells[k]])
            bites = {grid[r][c] for (r, c), action in zip(cells[k], actions[k], strict=True) if action == EAT} & dots[k]
            returns[k] += len(bites) - COST
            dots[k] = dots[k] - bites or set(range(24))
            rounds += bool(bites) and len(dots[k]) == 24
            for agent, action in enumerate(actions[k]):
                r, c = cells[k][agent]
                if action != EAT and (ahead := (r + MOVES[action][0], c + MOVES[action][1])) in neighbours(grid, r, c):
                    cells[k][agent] = ahead
        data = env.step_mdp(env.step(data.set(("agents", "action"), torch.tensor(actions))))
        flags = torch.tensor([[float(number in left) for number in range(24)] for left in dots])
        torch.testing.assert_close(data["state"][:, 24:48], flags)
        torch.testing.assert_close((data["state"][:, 48:] * 14).reshape(3, 5, 2), torch.tensor(cells).float())
        total = data["agents", "episode_reward"][:, 0, 0]
        torch.testing.assert_close(total, torch.tensor(returns), atol=1e-3, rtol=0)
    assert data["truncated"].all()
    assert not data["terminated"].any()
    assert rounds > 0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: make_paxmen("PaxMen", num_envs=1), "scenario must be PaxMen-N .* got 'PaxMen'"),
        (lambda: PaxMenEnv(9, num_envs=1), "num_agents must be at most 8, the cells of the hub; got 9"),
        (lambda: PaxMenEnv(view_radius=0, num_envs=1), "view_radius must be at least 1, got 0"),
    ],
)
def test_wrong_arguments_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
