"""Malformed command lines of every recipe, and how each of them ends.

    python benchmarks/malformed.py                       # all, some minutes; a table and what did not end as it should
    python benchmarks/malformed.py --recipe magpo_vmas seps

Each case runs in a forked child, so that libraries are imported once. It ends well if it exits with 1 or 2 after one
line on stderr that names the key, without the folder of a run. Cases that end in another way are counted and shown.
"""

import argparse
import contextlib
import os
import runpy
import signal
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch

RECIPES = Path(__file__).parents[1] / "recipes"

_TINY = [
    "env.num_envs=8",
    "env.max_steps=10",
    "frames_per_batch=80",
    "minibatch_size=40",
    "epochs=1",
    "total_frames=80",
    "evaluation.interval=80",
    "evaluation.episodes=2",
    "evaluation.video=false",
    "logger.wandb_project=null",
    "device=cpu",
]
_LOOP = """
~seed ~total_frames ~frames_per_batch ~epochs ~minibatch_size ~gamma ~lmbda ~max_grad_norm ~evaluation ~logger ~folder
~resume ~device ~num_threads ~compile ~processes ~recipe ~method ~environment ~optimizer ~env ~loss ~actor ~collector
~env.num_envs ~env.max_steps ~env.scenario ~evaluation.interval ~evaluation.episodes ~evaluation.video
seed=abc seed=-1 seed=1.5 seed=null seed=true seed=99999999999999999999999 seed=4294967296 seed={a:1}
total_frames=0 total_frames=abc total_frames=1.5 total_frames=null total_frames=true total_frames=[1]
frames_per_batch=0 frames_per_batch=-5 frames_per_batch=abc frames_per_batch=null frames_per_batch=1e2
epochs=0 epochs=abc epochs=1.5 minibatch_size=0 minibatch_size=abc minibatch_size=81 minibatch_size=null
gamma=true gamma=1.5 gamma=-1 gamma=abc gamma=nan gamma=null lmbda=2 lmbda=false lmbda=[0.9] gamma=inf
max_grad_norm=0 max_grad_norm=-1 max_grad_norm=null max_grad_norm=abc max_grad_norm=nan max_grad_norm=true
evaluation.interval=1 evaluation.interval=0 evaluation.interval=abc evaluation.interval=null
evaluation.episodes=0 evaluation.episodes=abc evaluation.video=maybe evaluation.video=3 evaluation=5 evaluation.foo=1
folder=null folder=/dev/null folder=/proc/none folder=FILE folder=5 folder= resume=5 resume=[a] resume=nowhere
method=null method=a/b method=.. method= method=5 recipe=foo recipe=null environment=null environment=a/b
num_threads=0 num_threads=100000 num_threads=abc num_threads=null num_threads=true processes=2 processes=abc
processes=true processes=null device=gpu device=5 device=[cpu] device=cuda:x compile=maybe compile=null compile=1
env.num_envs=0 env.num_envs=abc env.num_envs=1000000000000 env.num_envs=81 env.num_envs=null env.num_envs=true
env.max_steps=0 env.max_steps=2.5 env.max_steps=abc env.max_steps=null env.max_steps=true env.max_steps=-1
env.scenario=nowhere env.scenario=null env.scenario=5 env.foo=1 env=nowhere env=null env=[a,b]
optimizer.lr=abc optimizer.lr=-1 optimizer.lr=nan optimizer.lr=null optimizer.eps=abc optimizer.foo=1
optimizer.betas=5 optimizer=5 optimizer._target_=torch.optim.Nothing optimizer._target_=5 optimizer._target_=nowhere.X
logger.tensorboard=maybe logger.wandb_mode=maybe logger.wandb_tags=5 logger=5 logger=null logger.foo=1
logger.wandb_project=5 total_frame=5 lossy=mars foo=1 foo.bar=1 env..x=1 =5 seed seed= loss=nowhere loss= loss=null
collector=nowhere collector.foo=1 collector=null actor=nowhere actor=null loss=[ seed=[1 seed=${nowhere}
frames_per_batch=99999999999999999999 hydra.foo=1 setting=nowhere +seed=1 loss=mars,mappo
total_frames=${oc.env:NOWHERE} loss._target_=os.system loss._target_=null env._target_=nowhere.make
""".split()
_NETWORKS = """
actor.hidden_sizes=5 actor.hidden_sizes=[0] actor.hidden_sizes=[-4] actor.hidden_sizes=[abc] actor.hidden_sizes=[2.5]
actor.hidden_sizes=null actor.activation=nothing actor.activation=5 actor.share_parameters=maybe
actor.share_parameters=[0] actor.foo=1 critic.hidden_sizes=[0] critic.hidden_sizes=abc critic.observes=nothing
critic.observes=5 critic.foo=1 critic=nowhere critic=null ~critic critic.value_norm=5 critic.value_norm.foo=1
critic.value_norm.beta=abc critic.value_norm.beta=2 actor.agent_id=maybe collector=sequences chunk_length=7
chunk_length=0 chunk_length=abc chunk_length=2.5 chunk_length=true chunk_length=20 collector.num_workers=2
""".split()
_AUTOREGRESSIVE = """
chunk_length=5 chunk_length=7 chunk_length=0 critic=mlp critic=gru critic.hidden_sizes=[8] critic.observes=state
""".split()
_RATIO = """
loss.entropy_coeff=-1 loss.entropy_coeff=abc loss.entropy_coeff=nan loss.entropy_coeff=null loss.entropy_coeff=inf
loss.critic_coeff=-0.5 loss.critic_coeff=abc loss.loss_critic_type=l3 loss.loss_critic_type=5 loss.reduction=median
loss.clip_value=0 loss.clip_value=-1 loss.clip_value=abc loss.normalize_advantage=maybe loss.functional=maybe
loss.foo=1 loss.normalize_advantage_exclude_dims=abc loss.gain=5 loss.gain=abc loss.gain=null
""".split()
_VMAS = [
    *(f"env.scenario_kwargs.n_agents={value}" for value in ("0", "-1", "2.5", "abc", "33", "null", "[3]", "true")),
    "env.scenario_kwargs=5",
    "env.scenario_kwargs.foo=1",
    "env.time_limit=never",
    "env.time_limit=5",
    "env.continuous_actions=maybe",
    "env.seed=abc",
]
OWN = {
    "mars_vmas": [
        *_NETWORKS,
        *_RATIO,
        *_VMAS,
        *(f"loss.target_ratios={value}" for value in ("[0.5,inf]", "[2,3]", "[0.5]", "[0,2]", "[nan,2]", "5", "abc")),
        *(f"loss.target_ratios={value}" for value in ("[0.99999999,1.00000001]", "[-1,2]", "null", "[a,b]", "[1,1]")),
        *(f"loss={loss}" for loss in ("happo", "magpo", "marpo", "oatrpo", "ctds")),
        "frames_per_batch=1000000000000 total_frames=1000000000000",
        "loss=mars_additive loss.target_ratios.epsilon=2",
        "loss=mars_additive loss.target_ratios.epsilon=0",
        "loss=mars_additive loss.target_ratios.epsilon=abc",
        "loss=mars_multiplicative loss.target_ratios.ratio=1",
        "loss=mars_multiplicative loss.target_ratios.ratio=abc",
        "loss=mappo loss.clip_epsilon=0",
        "loss=mappo loss.clip_epsilon=-1",
        "loss=mappo loss.clip_epsilon=[0.5]",
        "loss=mappo loss.clip_epsilon=abc",
        "loss=mappo loss.clip_epsilon=nan",
        "loss=mappo loss.target_ratios=[0.5,2]",
        "loss=maspo loss.clip_epsilon=2",
        "loss=seac loss.sharing_coeff=-1",
        "loss=seac loss.sharing_coeff=abc",
        "loss=seac actor.share_parameters=true",
        "seed=[1,2]",
        "seed=[1]",
        "loss.shuffle_agents=true",
        "guider=sable",
        "env.scenario=simple_tag",
        "env=vmas_simple_tag",
        "env=custom",
        "env=custom env.factory=5",
        "env=custom env.factory=nowhere:make",
        "env=custom env.factory=os:nothing",
        "env=jumanji env.scenario=nowhere",
        "env=football",
        "env=smacv2",
        "env=maze env.scenario=nowhere",
        "env=paxmen env.scenario=PaxMen-99",
        "env=paxmen env.scenario=PaxMen-x",
        "env=aerocombat env.scenario=AeroCombat-0v0",
        "env=coordsum env.scenario=CoordSum-0x10",
        "env=coordsum env.scenario=CoordSum-3x10-abc",
        "env=coordsum env.scenario_kwargs.n_agents=3",
        "collector=compiled",
        "collector.num_workers=2",
        "env.compile=true",
        "env=mpe env.scenario_kwargs=5",
        "collector=multiprocess collector.num_workers=3",
        "collector=multiprocess collector.num_workers=0",
        "collector=multiprocess collector.num_workers=abc",
        "collector=ray collector.num_workers=3",
        "collector=ray collector.resources=5",
        "collector=default collector.total_frames=abc",
        *(f"actor=mat {case}" for case in (*_AUTOREGRESSIVE, *_RATIO[:8])),
        "actor=mat actor.embed_dim=0",
        "actor=mat actor.embed_dim=abc",
        "actor=mat actor.embed_dim=63 actor.num_heads=2",
        "actor=mat actor.num_heads=0",
        "actor=mat actor.num_heads=5",
        "actor=mat actor.num_heads=abc",
        "actor=mat actor.num_blocks=0",
        "actor=mat actor.num_blocks=-1",
        "actor=mat actor.observes=nothing",
        "actor=mat actor.hidden_sizes=[8]",
        "actor=mat loss=happo",
        "actor=mat loss=seac",
        "actor=mat collector=sequences",
        *(f"actor=sable {case}" for case in (*_AUTOREGRESSIVE, *_RATIO[:8])),
        "actor=sable actor.embed_dim=0",
        "actor=sable actor.num_heads=5",
        "actor=sable actor.num_blocks=0",
        "actor=sable actor.decay_scaling=0",
        "actor=sable actor.decay_scaling=abc",
        "actor=sable actor.chunk_size=0",
        "actor=sable collector=compiled",
        "actor=sable minibatch_size=5",
        "actor=sable minibatch_size=9",
        "actor=sable loss=marpo",
        "experiment=nowhere",
        "+experiment=magpo_coordsum",
        "actor=gru chunk_length=3",
        "actor=gru actor.hidden_sizes=[] chunk_length=5",
        "optimizer._target_=torch.optim.SGD",
    ],
    "marpo_vmas": [
        *_NETWORKS,
        *_RATIO[:8],
        "loss.layout=nothing",
        "loss.layout=5",
        "loss.reflection_coeff=-1",
        "loss.reflection_coeff=abc",
        "loss.ema_rate=2",
        "loss.ema_rate=abc",
        "loss.kl_bias=-1",
        "loss.kl_target_init=-1",
        "loss.sequences=maybe",
        "loss=happo",
        "loss=magpo",
        "loss=rpo loss.clip_epsilon=0",
    ],
    "magpo_vmas": [
        *_AUTOREGRESSIVE,
        *_RATIO[:8],
        "experiment=magpo_coordsum setting=paper",
        "experiment=magpo_coordsum setting=null.x",
        "experiment=magpo_coordsum actor=mlp actor.hidden_sizes=5",
        "setting=happo/smax-2s3z",
        "setting=magpo/CoordSum-3x10 env=maze",
        "actor=mat",
        "collector=sequences",
        "minibatch_size=5",
        "minibatch_size=9",
        "guider=nowhere",
        "guider=null",
        "~guider",
        "guider.embed_dim=0",
        "guider.foo=1",
        "loss.guider_first=maybe",
        "loss.guider_first=1",
        "loss.shuffle_agents=maybe",
        "loss.shuffle_agents=null",
        "loss=mars",
        "loss=mappo",
        "loss.guider_learner_ratio=1",
        "loss.guider_learner_ratio=0.5",
        "loss.guider_learner_ratio=abc",
        "loss.rl_coeff=-1",
        "loss.rl_coeff=abc",
        "loss.learner_kl=nothing",
        "loss=magpo_adaptive loss.adapt_ratio.target=-1",
        "loss=magpo_adaptive loss.adapt_ratio.target=abc",
        "loss=magpo_adaptive loss.adapt_ratio=5",
    ],
    "oappo_vmas": [
        *_NETWORKS,
        *_RATIO[:8],
        "actor.share_parameters=true",
        "loss.reuse_matrix=XX",
        "loss.reuse_matrix=RR",
        "loss.reuse_matrix=[[1]]",
        "loss.own_weight=0",
        "loss.own_weight=2",
        "loss.own_weight=abc",
        "loss.kl_threshold=-1",
        "loss.kl_threshold=abc",
        "loss.reuse=nothing",
        "loss=oatrpo loss.max_kl=0",
        "loss=oatrpo loss.damping=-1",
        "loss=oatrpo loss.max_kl=nan",
        "experiment=oappo_maze env.scenario=red",
        "experiment=oappo_maze env.scenario_kwargs.x=1",
        "experiment=oappo_maze loss.reuse_matrix=XX",
        "experiment=oappo_maze loss=oatrpo loss.reuse_matrix=BB",
        "loss=oatrpo loss.max_kl=-1",
        "loss=oatrpo loss.max_kl=abc",
        "loss=hatrpo loss.reduction=sum",
    ],
    "groups_vmas": [*_NETWORKS, *_VMAS[8:], "loss=ctds", "env.scenario_kwargs.num_good_agents=-1"],
    "seps": [
        "cluster.num_clusters=0",
        "cluster.num_clusters=99",
        "cluster.num_clusters=abc",
        "cluster.index=nothing",
        "encode.lr=abc",
        "encode.num_epochs=0",
        "encode.minibatch_size=0",
        "encode.foo=1",
        "total_frames=1000",
        "epochs=3",
        "chunk_length=5",
        "loss=mars",
        "critic=gru",
        "optimizer.lr=0.1",
        "resume=RUN",
        "seed=[1,2]",
        "seed=abc",
    ],
}
LOOPS = ("mars_vmas", "marpo_vmas", "magpo_vmas", "oappo_vmas", "groups_vmas")
"""Recipes that get what every loop reads; the others are these with values of their own."""


@dataclass(frozen=True)
class Outcome:
    """How one command line ended: a word, the exit status (``None`` if it was stopped), and what it said on stderr."""

    kind: str
    status: int | None
    said: str


def cases(recipe: str) -> list[str]:
    """Malformed overrides of a recipe; those that must come together are separated by spaces."""
    return [*dict.fromkeys([*(_LOOP if recipe in LOOPS else []), *OWN[recipe]])]


def play(recipe: str, case: str, *, timeout: float) -> Outcome:
    """Run a recipe with malformed overrides in a forked child.

    Args:
        recipe: the script's name.
        case: overrides, see :func:`cases`.
        timeout: seconds after which it counts as hanging.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "FILE").touch()
        child = os.fork()
        if child == 0:
            _run(recipe, case, folder)
        status = _wait(child, timeout)
        said = (folder / "stderr").read_text()
        made = any(path.name in ("checkpoints", "config.yaml") for path in folder.rglob("*"))
    return Outcome(_kind(status, said, made), status, said)


def _run(recipe: str, case: str, folder: Path) -> None:
    """Be the child."""
    os.setsid()
    status = 70
    try:
        os.chdir(folder)
        for descriptor, name in ((1, "stdout"), (2, "stderr")):
            os.dup2(os.open(folder / name, os.O_WRONLY | os.O_CREAT), descriptor)
        sys.argv = [recipe, *_tiny(recipe, case), "folder=runs", *case.split(" ")]
        sys.path.insert(0, str(RECIPES))
        runpy.run_path(str(RECIPES / f"{recipe}.py"), run_name="__main__")
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
        if isinstance(end.code, str):
            sys.stderr.write(end.code + "\n")
    except BaseException:
        sys.excepthook(*sys.exc_info())
        status = 1
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)


def _tiny(recipe: str, case: str) -> list[str]:
    """Small sizes, but for what the case takes away or sets itself."""
    if recipe == "seps":
        return ["env.num_envs=8", "env.max_steps=10", "frames_per_batch=80", "encode.num_epochs=1", "device=cpu"]
    keys = [override.lstrip("~+").partition("=")[0] for override in case.split(" ")]
    return [size for size in _TINY if not any(_touches(key, size.partition("=")[0]) for key in keys)]


def _touches(key: str, other: str) -> bool:
    return key == other or (other.startswith(f"{key}.") and key not in ("env", "loss"))


def _wait(child: int, timeout: float) -> int | None:
    end = time.monotonic() + timeout
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.02)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


def _kind(status: int | None, said: str, made: bool) -> str:
    if status is None:
        return "hangs"
    if status < 0:
        return "killed"
    if status == 0:
        return "trains"
    if "Traceback" in said:
        return "traceback"
    if made:
        return "leaves a folder"
    usage = said.startswith("usage:")
    return "refused" if said.strip() and (usage or len(said.strip().splitlines()) == 1) else "more than one line"


def main() -> None:
    """Play the cases and print how they end."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", nargs="*", default=list(OWN), choices=list(OWN))
    parser.add_argument("--only", default="", help="cases that hold this text")
    parser.add_argument("--timeout", type=float, default=60.0, help="seconds until a case counts as hanging")
    parser.add_argument("--all", action="store_true", help="show what every case says, those refused well, too")
    arguments = parser.parse_args()

    import hydra  # noqa: F401  # before the first fork, as all that recipes import

    import torchrl_marl.run  # noqa: F401
    from torchrl_marl.envs.vmas import import_vmas

    import_vmas()
    torch.set_num_threads(1)
    counts: Counter[str] = Counter()
    for recipe in arguments.recipe:
        for case in cases(recipe):
            if arguments.only not in case:
                continue
            outcome = play(recipe, case, timeout=arguments.timeout)
            counts[outcome.kind] += 1
            if arguments.all or outcome.kind != "refused":
                lines = outcome.said.strip().splitlines()
                last = (lines or [""])[0 if outcome.kind == "refused" else -1]
                print(f"{outcome.kind:18} {recipe} {case}\n    {len(lines)} lines: {last[:300]}", flush=True)
    print(f"\n{sum(counts.values())} command lines: " + ", ".join(f"{n} {kind}" for kind, n in counts.most_common()))


if __name__ == "__main__":
    main()
