"""A study in one command: `python benchmarks/study.py small` (minutes) or `python benchmarks/study.py papers` (a GPU).

A study is a table of the recipes' commands, each for several seeds. Stop it whenever you like: the same command skips
finished runs and goes on with begun ones. In the end each part gets a page by recipes/compare.py, FOLDER/PART/page/.
`papers` has the scale of the papers, 20 M frames and 10 seeds, at the recipes' settings or, on CoordSum, those that
MAGPO's authors publish; tune first where that matters (`recipes/tune.py`), and put what you find into the table.
Where the table has a list of commands, the one that does best on tuning seeds is run; see FOLDER/PART/tuning.json.
`plan` has the parts of results/plan.md in its order; each says how many core-hours it takes.
"""

import argparse
import hashlib
import itertools
import json
import shlex
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

from episodes import to_table, write_table
from omegaconf import OmegaConf

RECIPES = Path(__file__).resolve().parents[1] / "recipes"


@dataclass(frozen=True)
class Part:
    """What stands on one page."""

    name: str
    commands: Sequence[str | Sequence[str]]  # without seed and folder; of a list the best on the tuning seeds
    num_seeds: int
    baseline: str  # as recipes/compare.py calls it
    split: Sequence[str] = ()
    tuning_seeds: Sequence[int] = (1000,)  # none of those that results are reported on
    tuning: str = ""  # overrides of tuning runs
    first_seed: int = 0
    core_hours: float | None = None

    @property
    def seeds(self) -> range:
        """Seeds that results are reported on."""
        return range(self.first_seed, self.first_seed + self.num_seeds)


def grid(*choices: Iterable[str]) -> list[str]:
    """One command for each choice of one word, or of several, from every list."""
    return [" ".join(words) for words in itertools.product(*choices)]


MAZES = "total_frames={} evaluation.interval={}"
IN_MAZE = "oappo_vmas.py experiment=oappo_maze"
SEPS_PAIRINGS = (("black_red", "01"), *(("black_blue_red", clusters) for clusters in ("011", "010", "001")))
LARGE = (
    "total_frames=20000000 evaluation.interval=400000 evaluation.video=false "
    "env.num_envs=600 frames_per_batch=60000 minibatch_size=10000"
)
MAGPO_COORDSUM = "magpo_vmas.py experiment=magpo_coordsum"
GAMES = "mars_vmas.py"


def settings(*methods: str) -> list[str]:
    """What MAGPO's authors tuned for methods on two tasks of CoordSum."""
    return [f"setting={method}/CoordSum-{task}" for method in methods for task in ("3x10", "5x20")]


def mazes(frames: int) -> list[Part]:
    """Both mazes of OAPPO's paper with ten seeds."""
    return [
        Part(
            "black_red",
            grid(
                [
                    "mars_vmas.py experiment=mappo_maze",
                    "oappo_vmas.py experiment=oappo_maze loss=happo",
                    *grid(["oappo_vmas.py experiment=oappo_maze"], ["loss=hatrpo", "loss=oatrpo"]),
                    *grid(
                        ["oappo_vmas.py experiment=oappo_maze"],
                        [f"loss.kl_threshold={sigma}" for sigma in (0.01, 0.1, 1, 10)]
                        + [f"loss.kl_threshold=0.1 loss.own_weight={weight}" for weight in (0.2, 0.4)]
                        + [f"loss=oappo_fading loss.kl_threshold={sigma}" for sigma in (0.1, 1)],
                    ),
                ],
                [MAZES.format(frames, 64_000)],
            ),
            num_seeds=10,
            baseline="happo kl_threshold=None own_weight=None",
            split=("loss.kl_threshold", "loss.own_weight"),
        ),
        Part(
            "black_blue_red",
            grid(
                [
                    "mars_vmas.py experiment=mappo_maze",
                    *grid(
                        ["oappo_vmas.py experiment=oappo_maze"],
                        ["loss.kl_threshold=0.1"]
                        + [f"loss.reuse_matrix={scheme}" for scheme in ("NR", "RR", "UR", "AR")],
                    ),
                ],
                ["env.scenario=black_blue_red"],
                [MAZES.format(frames, 64_000)],
            ),
            num_seeds=10,
            baseline="mappo reuse_matrix=None",
            split=("loss.reuse_matrix",),
        ),
        Part(  # SEAC with the best of three learning rates; SEPS with each pairing of agents (seps.py finds one)
            "mazes_sharing",
            [
                *(
                    grid(
                        [f"mars_vmas.py experiment=mappo_maze loss=seac env.scenario={maze}"],
                        ["frames_per_batch=1280 minibatch_size=1280 epochs=1"],
                        [f"optimizer.lr={lr}" for lr in (3e-4, 1e-3, 3e-3)],
                        [MAZES.format(frames, 64_000)],
                    )
                    for maze in ("black_red", "black_blue_red")
                ),
                *grid(
                    ["mars_vmas.py experiment=mappo_maze"],
                    [
                        f"env.scenario={maze} method=seps-{clusters} actor.share_parameters=[{','.join(clusters)}]"
                        for maze, clusters in SEPS_PAIRINGS
                    ],
                    [MAZES.format(frames, 64_000)],
                ),
            ],
            num_seeds=10,
            baseline="seac",
        ),
    ]


def guided(name: str, ppo: str, autoregressive: str, magpo: str, setting: str) -> Part:
    """MAGPO's comparison at one setting for all methods, which none of them was tuned for."""
    return Part(
        name,
        grid(
            [
                *grid([ppo], ["loss=mappo", "loss=ippo"]),
                *grid(["mars_vmas.py actor=mat", "mars_vmas.py actor=sable"], [autoregressive]),
                *grid([magpo], ["loss=magpo loss.guider_learner_ratio=1.3 loss.rl_coeff=2", "loss=ctds"]),
            ],
            [setting],
        ),
        num_seeds=5,
        baseline="mappo",
    )


def coordsum_setting(scenario: str, frames: int) -> str:
    return (
        f"env.scenario={scenario} total_frames={frames} evaluation.interval={frames // 10} evaluation.video=false "
        "env.num_envs=64 frames_per_batch=2048 minibatch_size=512 epochs=4 optimizer.lr=5e-4"
    )


def coordsum(scenario: str, frames: int) -> Part:
    """With memories."""
    return guided(
        scenario,
        "mars_vmas.py env=coordsum actor=gru critic=gru chunk_length=32",
        "env=coordsum loss=mappo actor.embed_dim=32",
        MAGPO_COORDSUM,
        coordsum_setting(scenario, frames),
    )


WIDTHS = {  # of trust regions, from narrow to wide; clip_epsilon lies between 0 and 1
    "mars": [
        f"loss.target_ratios=[{low},{high}]" for low, high in ((0.8, 1.25), (0.5, 2), (0.33, 3), (0.2, 5), (0.1, 10))
    ],
    "maspo": [f"loss.clip_epsilon={epsilon}" for epsilon in (0.2, 0.4, 0.6, 0.8, 0.95)],
    "mappo": [f"loss.clip_epsilon={epsilon}" for epsilon in (0.1, 0.2, 0.3, 0.4, 0.8)],
}
LEARNING_RATES = [f"optimizer.lr={lr}" for lr in (5e-4, 1e-3, 2e-3, 4e-3, 8e-3)]


def tuned(
    name: str,
    task: str,
    setting: str,
    tuning: str,
    *,
    choices: Mapping[str, Sequence[str]] = WIDTHS,
    rates: Sequence[str] = LEARNING_RATES,
) -> Part:
    """Methods, MARS, MASPO and MAPPO unless told otherwise, each with the best of its choices and learning rates."""
    return Part(
        name,
        [grid([task], [f"loss={method}"], own, rates, [setting]) for method, own in choices.items()],
        num_seeds=5,
        baseline="mappo",
        tuning=tuning,
    )


SMALL_MLPS = "actor.hidden_sizes=[64,64] critic.hidden_sizes=[64,64]"
BY_THEMSELVES = (
    f"mars_vmas.py loss=mappo {SMALL_MLPS}",
    "mars_vmas.py loss=mappo actor=gru critic=gru chunk_length=25",
    f"oappo_vmas.py {SMALL_MLPS}",
)
GUIDED = "magpo_vmas.py actor.hidden_sizes=[64,64] guider.embed_dim=32"
SMALL_VMAS = f"total_frames=240000 evaluation.interval=24000 evaluation.video=false env.num_envs=240 {SMALL_MLPS}"


def tuned_vmas(scenario: str) -> Part:
    return tuned(scenario, f"mars_vmas.py env.scenario={scenario}", SMALL_VMAS, "total_frames=120000")


def tuned_marpo(scenario: str) -> Part:
    """MARPO, RPO and MAPPO, each with the best of 18 settings; reflection has a coefficient, so fewer widths."""
    widths = (0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8)
    reflections = grid(
        [f"loss.clip_epsilon={epsilon}" for epsilon in (0.1, 0.2, 0.4)],
        [f"loss.reflection_coeff={coefficient}" for coefficient in (0.1, 0.3, 1)],
    )
    clips = [f"loss.clip_epsilon={epsilon}" for epsilon in widths]
    return tuned(
        f"marpo_{scenario}",
        f"marpo_vmas.py chunk_length=5 env.scenario={scenario}",
        SMALL_VMAS,
        "total_frames=120000",
        choices={"marpo": reflections, "rpo": reflections, "mappo": clips},
        rates=["optimizer.lr=2e-3", "optimizer.lr=4e-3"],
    )


def retuned(name: str, task: str, setting: str, core_hours: float, choices: Mapping[str, Sequence[str]]) -> Part:
    """Methods with the best three settings of an earlier grid: chosen on three new seeds, run with ten new ones."""
    return Part(
        name,
        [grid([task], [f"loss={method}"], own, [setting]) for method, own in choices.items()],
        num_seeds=10,
        first_seed=5,
        baseline="mappo",
        tuning_seeds=(1001, 1002, 1003),
        core_hours=core_hours,
    )


def widths(key: str, *chosen: tuple[object, str]) -> list[str]:
    """Settings of a loss by its width and the learning rate."""
    return [f"loss.{key}={width} optimizer.lr={rate}" for width, rate in chosen]


def reflections(*chosen: tuple[float, float, str]) -> list[str]:
    return [f"loss.clip_epsilon={clip} loss.reflection_coeff={share} optimizer.lr={lr}" for clip, share, lr in chosen]


# The anchor: JaxMARL's simple_spread follows PettingZoo's and is three to seven times as fast as env=mpe.
SPREAD = (
    "env=jaxmarl env.scenario=simple_spread_3ag env.max_steps=25 total_frames=1000000 evaluation.interval=100000 "
    "evaluation.video=false actor.hidden_sizes=[64,64]"
)
SPREAD_CRITIC = "critic.hidden_sizes=[64,64]"
XUANCE = (  # the settings of XuanCe's published curves
    "env.num_envs=16 frames_per_batch=400 minibatch_size=400 epochs=1 optimizer.lr=7e-4 gamma=0.95 lmbda=0.95 "
    "loss.clip_value=0.2 loss.entropy_coeff=0.01"
)
OURS = "env.num_envs=200 frames_per_batch=5000 minibatch_size=1000"
MARPO_RECIPE = "marpo_vmas.py chunk_length=5"

APART = "actor.share_parameters=false actor.agent_id=false"  # in every cell, since agents that take turns need it
GAIN = "loss.gain._target_=torchrl_marl.objectives.surrogates.{}_gain loss.gain._partial_=true"
REGIONS = {  # with the signs of two columns
    "clip": ("", -1, -1),
    "quadratic": (GAIN.format("quadratic"), 1, -1),
    "barrier": (GAIN.format("barrier"), -1, 1),
    "interval": ("loss.interval=kl loss.kl_bias=0.19", 1, 1),
}


BASE = "clip+off+own+turns"
"""The composition's cell with the first level of every axis."""


def cells() -> Iterable[str]:
    """Half of the 32 compositions, of resolution V: the order is the product of the other columns."""
    own = "loss.clip_epsilon=[0.5,1.0] loss.next_clip_epsilon=[0.5,1.0] loss.kl_threshold=0.1"
    reflections = {"off": ("loss.reflection_coeff=0", -1), "on": ("loss.reflection_coeff=0.3", 1)}
    experiences = {"own": ("loss.own_weight=1", -1), "reuse": ("loss.own_weight=0.7", 1)}
    for chosen in itertools.product(REGIONS.items(), reflections.items(), experiences.items()):
        (region, (gain, a, b)), (reflection, (coefficient, c)), (data, (weight, d)) = chosen
        order = "turns" if a * b * c * d > 0 else "together"
        words = f"loss=composed loss.order={order} {gain} {coefficient} {weight} {own}"
        yield f"oappo_vmas.py {words} method={region}+{reflection}+{data}+{order}"


def composition(name: str, task: str, core_hours: float) -> Part:
    """The screening on one task."""
    commands = grid(cells(), [f"{APART} optimizer.lr=2e-3 {task}"])
    return Part(name, commands, num_seeds=3, baseline=BASE, core_hours=core_hours)


MAZE_TASK = (
    "env=maze env.scenario=black_blue_red env.num_envs=256 total_frames=256000 frames_per_batch=6400 "
    "minibatch_size=6400 evaluation.interval=64000 evaluation.episodes=1 evaluation.video=false"
)
COORDSUM_TASK = (
    "env=coordsum env.scenario=CoordSum-3x10 env.num_envs=64 total_frames=256000 frames_per_batch=6400 "
    "minibatch_size=1600 evaluation.interval=25600 evaluation.video=false"
)
SCREENING = [
    *(
        composition(f"composition_{task}", f"env=vmas env.scenario={task} {SMALL_VMAS}", 0.5)
        for task in ("balance", "reverse_transport")
    ),
    composition("composition_maze", f"{MAZE_TASK} actor.hidden_sizes=[32] critic.hidden_sizes=[32]", 0.3),
    composition("composition_coordsum", f"{COORDSUM_TASK} {SMALL_MLPS}", 0.4),
    composition("composition_spread", f"{SPREAD.replace('1000000', '500000')} {SPREAD_CRITIC} {OURS}", 0.6),
    Part(  # a guider with the barrier beside one with the clip
        "composition_guided",
        grid(
            ["magpo_vmas.py loss.clip_epsilon=[0.5,1.0] guider.embed_dim=32 optimizer.lr=2e-3"],
            ["method=magpo+clip", f"method=magpo+barrier {GAIN.format('barrier')}"],
            [f"{MAZE_TASK} actor.hidden_sizes=[32]", f"{COORDSUM_TASK} actor.hidden_sizes=[64,64]"],
        ),
        num_seeds=3,
        baseline="magpo+clip",
        core_hours=0.5,
    ),
]

PLAN = [
    retuned(
        "reverse_transport",
        f"{MARPO_RECIPE} env.scenario=reverse_transport",
        SMALL_VMAS,
        0.6,
        {
            "marpo": reflections((0.4, 1, "2e-3"), (0.2, 1, "2e-3"), (0.4, 1, "4e-3")),
            "rpo": reflections((0.4, 0.3, "4e-3"), (0.4, 0.1, "4e-3"), (0.4, 0.3, "2e-3")),
            "mappo": widths("clip_epsilon", (0.3, "2e-3"), (0.3, "4e-3"), (0.4, "4e-3")),
        },
    ),
    Part(  # one update of one minibatch, at ratios of 1, where MAPPO, MARS and MASPO are the same
        "spread_xuance",
        grid(
            ["mars_vmas.py loss=mappo loss.clip_epsilon=0.2", f"{MARPO_RECIPE} loss=marpo"],
            [f"{SPREAD} {SPREAD_CRITIC} {XUANCE}"],
        ),
        num_seeds=5,
        baseline="mappo",
        core_hours=0.7,
    ),
    Part(
        "spread",
        [
            grid([recipe], [f"loss={method}"], own, [f"{SPREAD} {SPREAD_CRITIC} {OURS}"])
            for recipe, method, own in (
                ("mars_vmas.py", "mappo", [f"loss.clip_epsilon={width}" for width in (0.1, 0.2, 0.4)]),
                ("mars_vmas.py", "mars", [f"loss.target_ratios={pair}" for pair in ("[0.5,2]", "[0.33,3]", "[0.2,5]")]),
                ("mars_vmas.py", "maspo", [f"loss.clip_epsilon={width}" for width in (0.4, 0.6, 0.8)]),
                (MARPO_RECIPE, "marpo", [f"loss.clip_epsilon={width}" for width in (0.1, 0.2, 0.4)]),
            )
        ],
        num_seeds=5,
        baseline="mappo",
        tuning_seeds=(1000, 1001, 1002),
        tuning="total_frames=200000 evaluation.interval=20000",
        core_hours=0.9,
    ),
    Part(  # MAPPO with discrete actions stands between the value-based methods and the continuous ones
        "spread_discrete",
        [
            f"mars_vmas.py loss=mappo {SPREAD} {SPREAD_CRITIC} {OURS} env.scenario_kwargs.action_type=Discrete",
            *(
                f"qmix_vmas.py loss={method} {SPREAD} env.num_envs=48 env.scenario_kwargs.action_type=Discrete"
                for method in ("qmix", "vdn")
            ),
        ],
        num_seeds=5,
        baseline="mappo",
        core_hours=0.9,
    ),
    Part(  # the value-based methods of MARPO's Table 1, on the smallest map
        "smax_value",
        grid(
            ["qmix_vmas.py"],
            ["loss=qmix", "loss=ldsa"],
            ["env=jaxmarl env.scenario=smax-3m total_frames=400000 evaluation.interval=40000 evaluation.video=false"],
        ),
        num_seeds=3,
        baseline="qmix",
        core_hours=0.6,
    ),
    retuned(
        "balance",
        f"{MARPO_RECIPE} env.scenario=balance",
        SMALL_VMAS,
        0.9,
        {
            "mars": widths("target_ratios", ("[0.2,5]", "8e-3"), ("[0.1,10]", "8e-3"), ("[0.1,10]", "4e-3")),
            "maspo": widths("clip_epsilon", (0.95, "4e-3"), (0.8, "8e-3"), (0.8, "2e-3")),
            "mappo": widths("clip_epsilon", (0.4, "4e-3"), (0.4, "2e-3"), (0.4, "8e-3")),
            "marpo": reflections((0.4, 1, "2e-3"), (0.2, 0.3, "4e-3"), (0.4, 0.3, "2e-3")),
            "rpo": reflections((0.4, 0.1, "2e-3"), (0.4, 1, "4e-3"), (0.4, 0.3, "2e-3")),
        },
    ),
    Part(  # O4, beside the ten seeds of `cores`
        "mazes_order",
        grid([IN_MAZE], ["loss=oappo", "loss=oatrpo"], ["loss.kl_threshold=0.1"], [MAZES.format(256_000, 64_000)]),
        num_seeds=20,
        first_seed=10,
        baseline="oappo",
        core_hours=0.3,
    ),
    *(  # O10: shares that fade and the gate
        Part(
            f"fading_{maze}",
            grid(
                [f"{IN_MAZE} env.scenario={maze}"],
                ["loss=oappo_fading", *gates],
                ["loss.kl_threshold=0.1", "loss.kl_threshold=1"],
                [MAZES.format(256_000, 64_000)],
            ),
            num_seeds=10,
            baseline="oappo_fading kl_threshold=0.1",
            split=("loss.kl_threshold",),
            core_hours=0.2 * (1 + len(gates)),
        )
        for maze, gates in (("black_red", ()), ("black_blue_red", ("loss=oappo",)))  # the gate's: `cores`
    ),
    Part(  # O11: the other five seeds, with the learning rates that the first five had
        "sharing_seeds",
        [
            *(
                f"mars_vmas.py experiment=mappo_maze loss=seac env.scenario={maze} frames_per_batch=1280 "
                f"minibatch_size=1280 epochs=1 optimizer.lr=3e-3 {MAZES.format(256_000, 64_000)}"
                for maze in ("black_red", "black_blue_red")
            ),
            *(
                f"mars_vmas.py experiment=mappo_maze env.scenario={maze} method=seps-{clusters} "
                f"actor.share_parameters=[{','.join(clusters)}] {MAZES.format(256_000, 64_000)}"
                for maze, clusters in SEPS_PAIRINGS
            ),
        ],
        num_seeds=5,
        first_seed=5,
        baseline="seac",
        core_hours=0.3,
    ),
    *SCREENING,
    Part(  # M3, M4, M6, M8: nothing but the penalty and where the targets lie: the upper one is six times the lower
        "aerocombat_ablations",
        grid(
            [f"mars_vmas.py env=aerocombat env.num_envs=240 frames_per_batch=14400 minibatch_size=3600 {SMALL_MLPS}"],
            [
                "loss=mars loss.target_ratios=[0.5,3]",
                "loss=mars_multiplicative loss.target_ratios.ratio=2.449",
                "loss=mars_additive loss.target_ratios.epsilon=0.714",
                "loss=mappo_asymmetric loss.clip_epsilon=[0.5,2]",
                "loss=maspo_asymmetric loss.clip_epsilon=[0.5,2]",
            ],
            ["total_frames=5000000 evaluation.interval=250000 evaluation.video=false optimizer.lr=2e-3 compile=true"],
        ),
        num_seeds=5,
        baseline="mars",
        core_hours=1.6,
    ),
]

STUDIES = {
    "plan": PLAN,
    "cores": [
        *mazes(256_000),
        coordsum("CoordSum-3x10", 512_000),
        coordsum("CoordSum-5x20", 256_000),
        Part(  # the recipe's defaults
            "vmas",
            grid(
                ["mars_vmas.py"],
                ["loss=mars", "loss=mappo"],
                ["env.scenario=navigation", "env.scenario=balance total_frames=480000 evaluation.interval=40000"],
                ["evaluation.video=false"],
            ),
            num_seeds=3,
            baseline="mappo",
        ),
        tuned_vmas("balance"),
        tuned_vmas("navigation"),
        tuned(
            "aerocombat",
            "mars_vmas.py env=aerocombat env.num_envs=240 frames_per_batch=14400 minibatch_size=1800 "
            "actor.hidden_sizes=[64,64] critic.hidden_sizes=[64,64] compile=true",
            "total_frames=1440000 evaluation.interval=144000 evaluation.video=false",
            "total_frames=576000 evaluation.interval=57600",
        ),
        tuned(
            "paxmen",
            "mars_vmas.py env=paxmen actor=gru critic=gru chunk_length=25 env.num_envs=120 frames_per_batch=12000 "
            "minibatch_size=3000 actor.hidden_sizes=[64] critic.hidden_sizes=[64] actor.recurrent_size=64 "
            "critic.recurrent_size=64 actor.head_sizes=[64]",
            "total_frames=720000 evaluation.interval=72000 evaluation.video=false",
            "total_frames=288000",
        ),
        Part(
            "transport",
            grid(
                ["mars_vmas.py env.scenario=transport"],
                ["loss=mars", "loss=mappo"],
                [
                    "env.continuous_actions=false env.num_envs=1200 env.max_steps=300 gamma=0.97 lmbda=0.9 "
                    "frames_per_batch=60000 minibatch_size=6000 optimizer.lr=2e-3 loss.entropy_coeff=0.001 "
                    "actor.hidden_sizes=[64,64] critic.hidden_sizes=[64,64] compile=true "
                    "total_frames=30000000 evaluation.interval=600000"
                ],
            ),
            num_seeds=3,
            baseline="mappo",
        ),
        *(
            Part(
                f"compiled_{name}",
                grid(
                    commands,
                    [f"env.scenario={task} env.num_envs=60 evaluation.video=false"],
                    [f"total_frames={frames} evaluation.interval={frames // 10}"],
                    ["compile=false", "compile=true"],
                ),
                num_seeds=5,
                baseline=f"{'magpo' if name == 'guided' else 'mappo'} compile=False actor=make_actor",
                split=("compile", "actor._target_"),
                core_hours=0.3,
            )
            for name, task, frames, commands in (
                ("navigation", "navigation", 60_000, [*BY_THEMSELVES]),
                ("guided", "navigation", 120_000, [GUIDED]),
                ("balance", "balance", 120_000, [*BY_THEMSELVES, GUIDED]),
            )
        ),
        guided(
            "magpo_navigation",
            "mars_vmas.py actor.hidden_sizes=[64,64] critic.hidden_sizes=[64,64]",
            "loss=mappo actor.embed_dim=32",
            "magpo_vmas.py actor.hidden_sizes=[64,64] guider.embed_dim=32",
            "env.scenario=navigation env.num_envs=120 total_frames=120000 evaluation.interval=12000 "
            "evaluation.video=false",
        ),
        Part(
            "magpo_ablations",
            grid(
                [MAGPO_COORDSUM],
                [
                    *(
                        f"loss=magpo loss.guider_learner_ratio={delta} loss.rl_coeff={coefficient} guider={guider}"
                        for delta, coefficient, guider in (
                            *((1.3, 2, "sable"), (1.3, 0, "sable"), (1.3, 2, "mat")),
                            *((1.1, 2, "sable"), (2, 2, "sable")),
                        )
                    ),
                    *(f"loss=ctds loss.rl_coeff={coefficient} guider=sable" for coefficient in (0, 1, 2, 4)),  # Fig. 5b
                ],
                [coordsum_setting("CoordSum-3x10", 512_000)],
            ),
            num_seeds=3,
            baseline="magpo guider_learner_ratio=1.3 rl_coeff=2 guider=make_sable",
            split=("loss.guider_learner_ratio", "loss.rl_coeff", "guider._target_"),
        ),
        Part(  # the pairs of the paper's Figure 4
            "marpo_sensitivity",
            grid(
                ["marpo_vmas.py chunk_length=5"],
                [
                    f"loss.kl_bias={bias} loss.ema_rate={rate}"
                    for bias, rate in ((0.08, 0.08), (0.05, 0.05), (0.1, 0.08), (0.1, 0.01))
                ],
                ["env.scenario=navigation", "env.scenario=balance"],
                [SMALL_VMAS],
            ),
            num_seeds=5,
            baseline="marpo kl_bias=0.08 ema_rate=0.08",
            split=("loss.kl_bias", "loss.ema_rate"),
        ),
        *(tuned_marpo(scenario) for scenario in ("navigation", "reverse_transport", "balance")),
    ],
    "small": [
        Part(
            "mazes",
            grid(
                ["mars_vmas.py experiment=mappo_maze", "oappo_vmas.py experiment=oappo_maze loss=happo"],
                [MAZES.format(192_000, 64_000)],
            ),
            num_seeds=3,
            baseline="mappo",
        ),
        Part(
            "coordsum",
            grid(
                ["mars_vmas.py env=coordsum actor.hidden_sizes=[64,64] critic.hidden_sizes=[64,64]"],
                ["loss=mars", "loss=maspo", "loss=mappo"],
                ["total_frames=120000"],
            ),
            num_seeds=5,
            baseline="mappo",
        ),
    ],
    "papers": [
        Part(
            "mars",
            grid(
                [
                    *grid(["mars_vmas.py"], ["env.scenario=navigation", "env.scenario=balance"]),
                    *grid([GAMES], ["env=paxmen", "env=aerocombat"]),
                ],
                ["loss=mars", "loss=maspo", "loss=mappo"],
                [LARGE],
            ),
            num_seeds=10,
            baseline="mappo",
        ),
        Part(
            "mars_ablations",
            grid(
                [f"{GAMES} env=aerocombat env.scenario=AeroCombat-8v8"],
                [
                    *grid(["loss=mars", "loss=mars_multiplicative", "loss=mars_additive"]),
                    *grid(["loss=mappo_asymmetric", "loss=maspo_asymmetric"]),
                ],
                [LARGE],
            ),
            num_seeds=10,
            baseline="mars",
        ),
        Part(
            "marpo",
            grid(
                ["marpo_vmas.py"],
                [f"env.scenario={name}" for name in ("navigation", "reverse_transport", "balance")],
                ["loss=marpo", "loss=rpo", "loss=mappo"],
                [LARGE],
            ),
            num_seeds=10,
            baseline="mappo",
        ),
        Part(
            "magpo",
            [
                *grid(["magpo_vmas.py"], settings("magpo", "ctds")),
                *grid(["mars_vmas.py"], settings("mappo", "ippo", "mat", "sable")),
            ],
            num_seeds=10,
            baseline="mappo",
        ),
        *mazes(512_000),
    ],
}


def missing(command: str, seeds: Iterable[int], folder: Path) -> list[list[str]]:
    """The recipes' command lines that are left to do of one line of the table."""
    recipe, *overrides = shlex.split(command)
    runs = [path.parent for path in folder.rglob("config.yaml")]  # some may have ended before their first checkpoint
    runs = [run for run in runs if any((run / "checkpoints").glob("checkpoint-*"))]
    begun = {OmegaConf.load(run / "config.yaml").seed: run for run in runs}
    fresh = [seed for seed in seeds if seed not in begun]
    left = [[recipe, f"resume={run}"] for run in begun.values() if not (run / "summary.json").exists()]
    return left + [[recipe, *overrides, f"folder={folder}", f"seed={seed}"] for seed in fresh]


def run_part(part: Part, folder: Path, *, jobs: int, options: Sequence[str]) -> None:
    """Run what is missing of a part, then write its page and the table of its episodes, page/episodes.csv.gz."""
    if part.core_hours is not None:
        print(f"{part.name}: {part.core_hours} core-hours in all.", flush=True)
    commands = chosen(part, folder, jobs=jobs, options=options)
    folders = run_commands(commands, part.seeds, folder / "runs", jobs=jobs, options=options)
    paths = [str(path) for path in folders.values() if any(path.rglob("summary.json"))]
    if paths:
        output = ["--output", str(folder / "page")]
        execute(["compare.py", *paths, *output, "--baseline", part.baseline, "--split", *part.split])
        if (records := folder / "page/evaluations.json").exists():
            write_table(to_table(json.loads(records.read_text())), folder / "page/episodes.csv.gz")


def chosen(part: Part, folder: Path, *, jobs: int, options: Sequence[str]) -> list[str]:
    """Of each list of commands the one with the highest mean of the last fifth of evaluations over the tuning seeds.

    A command that fails, because it diverges for example, is not chosen; in tuning.json its score is null.
    """
    lists = [command for command in part.commands if not isinstance(command, str)]
    tuned = {command: f"{command} {part.tuning}".strip() for commands in lists for command in commands}
    folders = run_commands([*tuned.values()], part.tuning_seeds, folder / "tuning", jobs=jobs, options=options)
    scores = {}
    for command, words in tuned.items():
        summaries = [json.loads(path.read_text()) for path in folders[words].rglob("summary.json")]
        if len(summaries) == len(part.tuning_seeds):
            scores[command] = mean(summary["last_fifth"] for summary in summaries)
    if tuned:
        every = {command: scores.get(command) for command in tuned}
        record = {"seeds": part.tuning_seeds, "overrides": part.tuning, "last_fifth": every}
        (folder / "tuning.json").write_text(json.dumps(record, indent=1))
    for commands in lists:
        if not scores.keys() & set(commands):
            raise SystemExit(f"Every command that {part.name} chooses from has failed: {'; '.join(commands)}.")
    return [
        command
        if isinstance(command, str)
        else max((choice for choice in command if choice in scores), key=scores.__getitem__)
        for command in part.commands
    ]


def run_commands(
    commands: Sequence[str], seeds: Iterable[int], folder: Path, *, jobs: int, options: Sequence[str]
) -> dict[str, Path]:
    """Run what is missing of commands; return the folder of each."""
    folders = {command: folder / hashlib.sha1(command.encode()).hexdigest()[:8] for command in commands}
    left = [missing(command, seeds, own) for command, own in folders.items()]
    # seed by seed, so that a study that is stopped has as many of each method
    lines = [line for turn in itertools.zip_longest(*left) for line in turn if line is not None]
    with ThreadPoolExecutor(jobs) as pool:
        codes = list(pool.map(lambda line: execute(line if "resume=" in line[1] else [*line, *options]), lines))
    if any(codes):
        print(f"{sum(map(bool, codes))} of {len(codes)} commands failed; the same command tries again.")
    return folders


def execute(line: Sequence[str]) -> int:
    """Run a recipe; return its exit status."""
    recipe, *words = line
    print(shlex.join(["python", f"recipes/{recipe}", *words]), flush=True)
    return subprocess.run([sys.executable, str(RECIPES / recipe), *words]).returncode


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", choices=STUDIES)
    parser.add_argument("--folder", type=Path, help="where runs and pages go; default runs/study_STUDY")
    parser.add_argument("--parts", nargs="+", help="only these parts of the study")
    parser.add_argument("--jobs", type=int, default=1, help="recipes to run at the same time")
    parser.add_argument("--options", nargs="*", default=[], help="overrides for every run, such as device=cuda")
    arguments = parser.parse_args()
    for part in STUDIES[arguments.study]:
        if arguments.parts is None or part.name in arguments.parts:
            root = arguments.folder or Path("runs") / f"study_{arguments.study}"
            run_part(part, root / part.name, jobs=arguments.jobs, options=arguments.options)
