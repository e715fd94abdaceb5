"""The wrapper of SMACv2 against a stand-in that does what the package's source does, quirks included.

Recorded from oxwhirl/smacv2 at 9dabb98: arguments, sizes, what a distribution reads, when a game is started, how
rewards are scaled, when ``get_stats`` fails. The game is not free software, and no machine of ours has it.
"""

import sys
import types

import numpy as np
import pytest
import torch
from torchrl.envs.utils import check_env_specs

from torchrl_marl.envs import check_env, make_smacv2, render_episode

DIES, WINS, LIMIT = 3, 5, 8  # steps: agent 0 falls, the enemies are beaten, the game's own limit
HEALTH = 100  # of an enemy
DISTRIBUTIONS = {  # what they read of their part of capability_config
    "weighted_teams": {"unit_types", "weights", "exception_unit_types", "observe"},
    "surrounded_and_reflect": {"p", "map_x", "map_y"},
}


class Game:
    """SMAC's environment: episode 0 is won, episode 1 reaches the limit, in episode 2 the game crashes."""

    def __init__(
        self,
        *,
        map_name,
        capability_config,
        conic_fov=False,
        obs_own_pos=False,
        use_unit_ranges=False,
        min_attack_range=2,
        seed=None,
        prob_obs_enemy=1.0,
        action_mask=True,
    ):
        assert (conic_fov, obs_own_pos, use_unit_ranges, min_attack_range) == (False, True, True, 2)  # as in the paper
        assert seed is None or 0 <= seed < 2**32  # or the game does not take it
        self.map_name, self.seed, self.extended = map_name, seed, (prob_obs_enemy, action_mask)
        self.shields = map_name == "10gen_protoss"
        self.n_agents, self.n_enemies = (capability_config[name] for name in ("n_units", "n_enemies"))
        self.n_actions = 6 + self.n_enemies
        self.max_reward = 10 * self.n_enemies + 200
        self._episode_count = self._episode_steps = self.launches = self.episode = 0
        self.battles_won = self.battles_game = self.timeouts = self.force_restarts = 0

    def get_env_info(self):
        allies, enemies, shield = self.n_agents, self.n_enemies, int(self.shields)
        seen = 4 + enemies * (8 + shield) + (allies - 1) * (8 + shield) + 6 + shield
        state = allies * (7 + shield) + enemies * (6 + shield) + allies * self.n_actions
        sizes = {"state_shape": state, "obs_shape": seen, "cap_shape": 3, "n_actions": self.n_actions}
        return {**sizes, "n_agents": allies, "episode_limit": LIMIT, "agent_features": [], "enemy_features": []}

    def reset(self, episode_config):
        self._episode_steps = 0
        if self._episode_count == 0:
            self.launches += 1
            self.max_reward += HEALTH * self.n_enemies
        return self.get_obs(), self.get_state()

    def step(self, actions):
        legal = self.get_avail_actions()
        assert all(available[action] for available, action in zip(legal, actions, strict=True))
        kind = self.episode % 3
        if kind == 2 and self._episode_steps == WINS - 1:
            self.force_restarts += 1
            self.episode += 1
            return 0, True, {}
        self._episode_steps += 1
        won = kind == 0 and self._episode_steps == WINS
        timeout = self._episode_steps == LIMIT
        info = {"battle_won": won, "dead_allies": int(self._episode_steps >= DIES), "dead_enemies": 5 * won}
        reward = (HEALTH + 10) * self.n_enemies + 200 if won else 0
        over = won or timeout
        self.battles_won, self.timeouts = self.battles_won + won, self.timeouts + timeout
        self.battles_game, self.episode = self.battles_game + over, self.episode + over
        self._episode_count += over
        return reward / (self.max_reward / 20), over, info

    def get_stats(self):
        counts = {"battles_won": self.battles_won, "battles_game": self.battles_game, "timeouts": self.timeouts}
        return {**counts, "win_rate": self.battles_won / self.battles_game, "restarts": self.force_restarts}

    def get_obs(self):
        size = self.get_env_info()["obs_shape"]
        return [np.full(size, 10 * self._episode_steps + agent, dtype=np.float32) for agent in range(self.n_agents)]

    def get_state(self):
        return np.full(self.get_env_info()["state_shape"], self._episode_steps, dtype=np.float32)

    def get_avail_actions(self):
        alive = [agent > 0 or self._episode_steps < DIES for agent in range(self.n_agents)]
        return [[0, *[1] * 5, *[0] * self.n_enemies] if lives else [1] + [0] * (5 + self.n_enemies) for lives in alive]


class StarCraft:
    """The package's wrapper, which draws teams and starts and hands all else on."""

    def __init__(self, **options):
        self.capability_config = options["capability_config"]
        for key in self.capability_config.keys() - {"n_units", "n_enemies"}:
            given = self.capability_config[key]
            assert given.keys() - {"dist_type"} == DISTRIBUTIONS[given["dist_type"]]
        self.env = Game(**options)

    def reset(self):
        self.env.reset({})  # and it returns nothing, as after a failed reset

    def __getattr__(self, name):
        return getattr(self.env, name)


@pytest.fixture(autouse=True)
def smacv2(monkeypatch):
    module, absl = types.ModuleType("smacv2.env"), types.ModuleType("absl")
    module.StarCraftCapabilityEnvWrapper = StarCraft
    absl.flags = types.SimpleNamespace(FLAGS=Flags())
    monkeypatch.setitem(sys.modules, "absl", absl)
    monkeypatch.setitem(sys.modules, "smacv2", types.ModuleType("smacv2"))
    monkeypatch.setitem(sys.modules, "smacv2.env", module)
    return absl.flags.FLAGS


class Flags:
    """Those of absl: PySC2 cannot start the game before they are parsed."""

    calls = 0

    def is_parsed(self):
        return self.calls > 0

    def __call__(self, arguments):
        self.calls += 1


def rollout(num_steps, **options):
    torch.manual_seed(0)
    return make_smacv2(num_envs=2, seed=0, **options).rollout(num_steps, break_when_any_done=False)


def test_data_match_the_specs():
    check_env_specs(make_smacv2(num_envs=2, seed=0))


def test_observations_masks_and_state_are_grouped():
    data = rollout(4)
    expected = 10 * torch.arange(4.0)[:, None] + torch.arange(5.0)
    assert torch.equal(data["agents", "observation"][0], expected.unsqueeze(-1).expand(4, 5, 82))
    assert torch.equal(data["state"][0], torch.arange(4.0)[:, None].expand(4, 120))
    assert data["agents", "action_mask"][0, 0].sum(-1).tolist() == [5] * 5


def test_the_fallen_have_no_action_and_no_part_in_losses():
    data = rollout(DIES + 1)
    assert data["agents", "mask"][0, :, 0].tolist() == [True] * DIES + [False]
    assert data["agents", "mask"][:, :, 1:].all()
    assert data["agents", "action"][:, DIES, 0].tolist() == [0, 0]


def test_a_win_terminates_the_limit_and_a_crash_truncate():
    data = rollout(WINS + LIMIT + WINS)["next"]
    ends = [WINS - 1, WINS + LIMIT - 1, WINS + LIMIT + WINS - 1]
    for course in data.unbind(0):
        assert course["done"].squeeze(-1).nonzero().flatten().tolist() == ends
        assert course["terminated"][ends].flatten().tolist() == [True, False, False]
        assert course["truncated"][ends].flatten().tolist() == [False, True, True]


def test_the_step_that_wins_a_battle_says_so():
    won = rollout(WINS + LIMIT + WINS)["next", "info", "won"]
    assert won.nonzero().tolist() == [[0, WINS - 1, 0], [1, WINS - 1, 0]]
    assert won.sum() == 2


def test_a_limit_below_the_games_truncates_first():
    data = rollout(4, max_steps=4)["next"]
    assert data["truncated"].squeeze(-1).tolist() == [[False, False, False, True]] * 2
    assert not data["terminated"].any()


def test_a_battle_won_gives_twenty_in_one_game_whatever_was_reset_before():
    env = make_smacv2(num_envs=2, seed=0)
    env.reset()
    env.rollout(2)
    reward = env.rollout(WINS, break_when_any_done=False)["next", "agents", "reward"]
    assert torch.equal(reward[:, :-1], torch.zeros(2, WINS - 1, 5, 1))
    assert torch.equal(reward[:, -1], torch.full((2, 5, 1), 20.0))
    assert [game.env.launches for game in env._games] == [1, 1]


def test_the_flags_that_the_game_is_started_with_are_parsed_once(smacv2):
    make_smacv2(num_envs=1)
    make_smacv2(num_envs=1)
    assert smacv2.calls == 1


@pytest.mark.parametrize(("seed", "expected"), [(3, [3, 4]), (2**32 - 1, [2**32 - 1, 0]), (-1, [2**32 - 1, 0])])
def test_every_game_has_a_seed_that_it_can_take(seed, expected):
    assert [game.env.seed for game in make_smacv2(num_envs=2, seed=seed)._games] == expected


def test_the_check_knows_the_limit_and_finds_nothing(capsys):
    assert check_env(make_smacv2(num_envs=2, seed=0, max_steps=4), num_steps=12) == []
    assert "4 steps" in capsys.readouterr().out


def test_names_become_configurations():
    game = make_smacv2("zerg_10_vs_11_epo", num_envs=1)._games[0].env
    capabilities = game.capability_config
    assert (game.map_name, capabilities["n_units"], capabilities["n_enemies"]) == ("10gen_zerg", 10, 11)
    assert capabilities["team_gen"]["unit_types"] == ["zergling", "baneling", "hydralisk"]
    assert sum(capabilities["team_gen"]["weights"]) == pytest.approx(1)
    assert game.extended == (0.0, False)


def test_a_missing_game_gives_the_steps(monkeypatch):
    def reset(self):
        raise FileNotFoundError("StarCraftII/Versions")

    monkeypatch.setattr(StarCraft, "reset", reset)
    with pytest.raises(FileNotFoundError, match=r"download Blizzard's Linux package .* SC2PATH .* SMAC_Maps"):
        make_smacv2(num_envs=1).reset()


def test_a_missing_package_gives_the_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "smacv2.env", None)
    with pytest.raises(ImportError, match=r"pip install .*smacv2\.git"):
        make_smacv2(num_envs=1)


@pytest.mark.parametrize("name", ["orc_5_vs_5", "terran_5v5", "terran_5_vs_5_hard"])
def test_unknown_scenarios_are_named(name):
    with pytest.raises(ValueError, match=f"scenario must be RACE_N_vs_M.*got '{name}'"):
        make_smacv2(name, num_envs=1)


def test_a_film_is_refused_clearly(tmp_path):
    pytest.importorskip("PIL")
    env = make_smacv2(num_envs=1)
    with pytest.raises(ValueError, match="cannot be drawn here: the game renders in its own window only"):
        render_episode(env, env.rand_action, tmp_path / "film.gif", max_steps=2)
