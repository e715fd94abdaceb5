"""The mazes, by hand and by a search of their layouts that knows nothing of the environment's tables."""

from collections import deque

import pytest
import torch

from torchrl_marl.envs import MazeEnv, make_maze

TOP, BOTTOM = ["####S####", "####.####", "#.......#"], ["#.......#", "####.####", "####*####"]
LAYOUTS = {
    "black_red": [*TOP, "#.#R#B#.#", "#.#R#B#.#", "#.#R#B#.#", *BOTTOM],
    "black_blue_red": [*TOP, "#.#R#B.##", "#.#R#T.##", "#.#R#B.##", *BOTTOM],
}
FORBIDDEN = {"red": "#B", "black": "#R", "blue": "#RBT"}
AGENTS = {"black_red": ["red", "black"], "black_blue_red": ["red", "black", "blue"]}
MOVES = [(-1, 0), (1, 0), (0, -1), (0, 1), (0, 0)]
RED, BLACK, BLUE, OUTER = "ddlddddrdd", "ddrddddldd", "ddrrddddlldd", "ddlllddddrrrdd"


def neighbours(layout, forbidden, cell):
    for action, (down, right) in enumerate(MOVES):
        row, column = cell[0] + down, cell[1] + right
        free = 0 <= row < 9 and 0 <= column < 9 and layout[row][column] not in forbidden
        yield action, (row, column) if free else cell


def shortest(layout, forbidden):
    """Number of steps from the start to every cell, and the number of shortest ways."""
    start = (0, layout[0].index("S"))
    steps, ways, queue = {start: 0}, {start: 1}, deque([start])
    while queue:
        cell = queue.popleft()
        for successor in {successor for _, successor in neighbours(layout, forbidden, cell)}:
            if successor not in steps:
                steps[successor], ways[successor] = steps[cell] + 1, 0
                queue.append(successor)
            if steps[successor] == steps[cell] + 1:
                ways[successor] += ways[cell]
    return steps, ways


def play(env, scripts, num_steps=None):
    """Transitions of scripts of moves, one for each agent, who stay (".") when theirs has ended."""
    data, steps = env.reset(), []
    for step in range(num_steps or max(map(len, scripts))):
        moves = ["udlr.".index(script[step]) if step < len(script) else 4 for script in scripts]
        data["agents", "action"] = torch.tensor([moves])
        steps.append(env.step(data).clone())
        data = env.step_mdp(steps[-1])
        if data["done"]:
            break
    return torch.stack(steps, 1)[0]


@pytest.mark.parametrize(
    ("maze", "scripts", "arrivals", "total", "discounted"),
    [
        ("black_red", [RED, BLACK], [10, 10], 0.8, 0.722281),
        ("black_red", [OUTER, OUTER], [14, 14], 0.72, 0.615013),
        ("black_red", [BLACK, RED], [None, None], -2.0, -1.267935),
        ("black_red", ["", ""], [None, None], -2.0, -1.267935),
        ("black_blue_red", [RED, BLACK, BLUE], [10, 10, 12], 0.786667, 0.704224),
        ("black_blue_red", [BLUE, BLUE, BLUE], [12, 12, 12], 0.76, 0.668108),
        ("black_blue_red", [BLACK, BLACK, BLACK], [None, 10, None], -1.066667, None),
    ],
)
def test_scripted_episodes_have_the_returns_of_the_specification(maze, scripts, arrivals, total, discounted):
    data = play(MazeEnv(maze, num_envs=1), scripts, num_steps=100)
    reward = data["next", "agents", "reward"]
    assert (reward == reward[:, :1]).all()
    reward = reward[:, 0, 0].double()
    assert reward.sum().item() == pytest.approx(total, abs=1e-5)
    assert data["next", "agents", "episode_reward"][-1, 0, 0].item() == pytest.approx(total, abs=1e-5)
    if discounted is not None:
        assert (0.99 ** torch.arange(len(reward)) * reward).sum().item() == pytest.approx(discounted, abs=1e-5)
    everyone = None not in arrivals
    assert len(reward) == (max(arrivals) if everyone else 100)
    assert data["next", "terminated"][-1].item() is everyone
    assert data["next", "truncated"][-1].item() is not everyone
    assert data["agents", "mask"].sum(0).tolist() == [arrival or 100 for arrival in arrivals]


def test_the_info_tells_what_share_of_the_agents_has_arrived():
    data = play(MazeEnv("black_blue_red", num_envs=1), [RED, BLUE, BLUE])
    assert data["next", "info", "arrived"][:, 0].tolist() == [0.0] * 9 + [pytest.approx(1 / 3)] * 2 + [1.0]
    assert data["info", "arrived"][0].item() == 0


@pytest.mark.parametrize("maze", LAYOUTS)
def test_every_move_from_every_cell_follows_the_layout_and_the_colour(maze):
    env, layout = MazeEnv(maze, num_envs=405), LAYOUTS[maze]
    cells = torch.arange(81).repeat_interleave(5)
    for agent, color in enumerate(AGENTS[maze]):
        state = env.rules.reset(torch.zeros(405, dtype=torch.int64))
        state["cell"][:, agent] = cells
        action = torch.full((405, env.rules.num_agents), 4)
        action[:, agent] = torch.arange(5).repeat(81)
        after = env.rules.step(state, action)[0]["cell"]
        assert (after[:, [other for other in range(env.rules.num_agents) if other != agent]] == 4).all()
        for index in range(405):
            cell = divmod(int(cells[index]), 9)
            if layout[cell[0]][cell[1]] in "#" + FORBIDDEN[color]:
                continue  # the agent never is there
            expected = cell if cell == (8, 4) else dict(neighbours(layout, FORBIDDEN[color], cell))[index % 5]
            assert divmod(int(after[index, agent]), 9) == expected, (color, cell, index % 5)


@pytest.mark.parametrize(
    ("maze", "colors", "length"),
    [
        ("black_red", ["red"], 10),
        ("black_red", ["black"], 10),
        ("black_red", ["red", "black"], 14),
        ("black_blue_red", ["red"], 10),
        ("black_blue_red", ["black"], 10),
        ("black_blue_red", ["blue"], 12),
        ("black_blue_red", ["red", "black"], 12),
        ("black_blue_red", ["red", "black", "blue"], 12),
    ],
)
def test_shortest_ways_are_as_long_as_documented(maze, colors, length):
    steps, ways = shortest(LAYOUTS[maze], "".join(FORBIDDEN[color] for color in colors))
    assert steps[8, 4] == length
    if len(colors) == 1:
        assert ways[8, 4] == 1


@pytest.mark.parametrize("maze", LAYOUTS)
def test_observations_show_the_nine_cells_around_and_the_place(maze):
    env, layout = MazeEnv(maze, num_envs=1), LAYOUTS[maze]
    kinds = {"#": 0, ".": 1, "S": 1, "R": 2, "B": 3, "T": 4, "*": 5}
    for row in range(9):
        for column in range(9):
            state = env.rules.reset(torch.zeros(1, dtype=torch.int64))
            state["cell"][0, 1] = 9 * row + column
            data = env.rules.describe(state)
            expected = torch.zeros(72)
            for position in range(9):
                r, c = row + position // 3 - 1, column + position % 3 - 1
                kind = kinds[layout[r][c]] if 0 <= r < 9 and 0 <= c < 9 else 0
                expected[6 * position + kind] = 1
            expected[54 + row] = expected[63 + column] = 1
            assert torch.equal(data["agents", "observation"][0, 1], expected)
            assert torch.equal(data["state"][0, 99:117], expected[54:])
            assert data["agents", "mask"][0, 1] == (layout[row][column] != "*")
    codes = torch.tensor([kinds[letter] for line in layout for letter in line])
    torch.testing.assert_close(data["state"][0, :81], codes / 5)
    assert data["state"].shape == (1, 81 + 18 * len(AGENTS[maze]))


def test_agents_see_neither_each_other_nor_their_colour_nor_the_time():
    data = MazeEnv("black_blue_red", num_envs=1).reset()["agents", "observation"]
    assert (data == data[:, :1]).all()
    env = MazeEnv("black_blue_red", num_envs=1)
    later = play(env, ["", "", ""], num_steps=7)["next", "agents", "observation"][-1]
    assert torch.equal(later, data[0])


def test_who_has_arrived_costs_nothing_more():
    data = play(MazeEnv("black_red", num_envs=1, step_cost=0.5), [RED + "uuuu", ""], num_steps=20)
    expected = [-0.5] * 9 + [0.0] + [-0.25] * 10  # the arrival: (1 - 0.5 - 0.5) / 2
    torch.testing.assert_close(data["next", "agents", "reward"][:, 0, 0], torch.tensor(expected))


def test_random_walks_arrive_within_the_limit_about_once_in_eleven_episodes():
    torch.manual_seed(0)
    env = MazeEnv("black_red", num_envs=4000)
    data = env.reset()
    for _ in range(100):
        data = env.step_mdp(env.step(env.rand_action(data)))
    arrived = 1 - data["agents", "mask"].float().mean()
    assert arrived.item() == pytest.approx(0.087, abs=4 * (0.087 * 0.913 / 8000) ** 0.5)


def test_the_picture_holds_every_agent_s_colour_and_way():
    pytest.importorskip("PIL")
    env = MazeEnv("black_blue_red", num_envs=1)
    play(env, [RED[:-1], BLACK[:-1], BLUE[:-1]])
    picture = env.render().int()
    for color in ((209, 53, 63), (35, 38, 46), (47, 116, 192)):
        pixels = ((picture - torch.tensor(color)).abs().amax(-1) < 20).nonzero()
        assert len(pixels) > 700
        assert pixels[:, 0].max() - pixels[:, 0].min() > 7 * 38  # from start to goal


def test_an_unknown_maze_is_refused():
    with pytest.raises(ValueError, match="maze must be one of black_red, black_blue_red; got 'red'"):
        make_maze("red", num_envs=1)
