"""The wrapper of SMACv2 against a stand-in that answers as the package's interface does; the game is not free."""

import sys
import types

import numpy as np
import pytest
import torch
from torchrl.envs.utils import check_env_specs

from torchrl_marl.envs import check_env, make_smacv2, render_episode

SIZES = {"n_agents": 5, "n_actions": 11, "obs_shape": 82, "state_shape": 120, "episode_limit": 200}  # terran 5 v 5
DIES, WINS, LIMIT = 3, 5, 8  # steps: agent 0 falls, the enemies are beaten, the game's own limit


class StarCraft:
    """Episode 0 is won, episode 1 reaches the limit, in episode 2 the game crashes and starts again."""

    def __init__(self, **options):
        self.options, self.episode, self.timeouts, self.actions = options, -1, 0, []

    def get_env_info(self):
        return SIZES

    def reset(self):
        self.episode, self.step_count = self.episode + 1, 0  # and returns nothing, as after a failed reset

    def step(self, actions):
        legal = self.get_avail_actions()
        assert all(available[action] for available, action in zip(legal, actions, strict=True))
        self.actions, self.step_count = list(actions), self.step_count + 1
        kind = self.episode % 3
        if kind == 2 and self.step_count == WINS:
            return 0, True, {}
        won, timeout = kind == 0 and self.step_count == WINS, kind == 1 and self.step_count == LIMIT
        self.timeouts += timeout
        info = {"battle_won": won, "dead_allies": int(self.step_count >= DIES), "dead_enemies": 5 * won}
        return 0.5 + 10 * won, won or timeout, info

    def get_stats(self):
        return {"battles_won": 0, "battles_game": self.episode, "timeouts": self.timeouts, "restarts": 0}

    def get_obs(self):
        return [np.full(82, 10 * self.step_count + agent, dtype=np.float32) for agent in range(5)]

    def get_state(self):
        return np.full(120, self.step_count, dtype=np.float32)

    def get_avail_actions(self):
        alive = [self.step_count < DIES, True, True, True, True]
        return [[0, 1, 1, 1, 1, 1, *[0] * 5] if lives else [1] + [0] * 10 for lives in alive]


@pytest.fixture(autouse=True)
def smacv2(monkeypatch):
    module = types.ModuleType("smacv2.env")
    module.StarCraftCapabilityEnvWrapper = StarCraft
    monkeypatch.setitem(sys.modules, "smacv2", types.ModuleType("smacv2"))
    monkeypatch.setitem(sys.modules, "smacv2.env", module)


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
    assert torch.equal(data["next", "agents", "reward"], torch.full((2, 4, 5, 1), 0.5))


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


def test_a_limit_below_the_games_truncates_first():
    data = rollout(4, max_steps=4)["next"]
    assert data["truncated"].squeeze(-1).tolist() == [[False, False, False, True]] * 2
    assert not data["terminated"].any()


def test_the_check_knows_the_limit_and_finds_nothing(capsys):
    assert check_env(make_smacv2(num_envs=2, seed=0, max_steps=4), num_steps=12) == []
    assert "4 steps" in capsys.readouterr().out


def test_names_become_configurations():
    game = make_smacv2("zerg_10_vs_11_epo", num_envs=1)._games[0].env
    capabilities = game.options["capability_config"]
    assert (game.options["map_name"], capabilities["n_units"], capabilities["n_enemies"]) == ("10gen_zerg", 10, 11)
    assert capabilities["team_gen"]["unit_types"] == ["zergling", "baneling", "hydralisk"]
    assert sum(capabilities["team_gen"]["weights"]) == pytest.approx(1)
    assert (game.options["prob_obs_enemy"], game.options["action_mask"]) == (0.0, False)


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
    with pytest.raises(ValueError, match="cannot be drawn here: the game opens a window of its own"):
        render_episode(env, env.rand_action, tmp_path / "film.gif", max_steps=2)
