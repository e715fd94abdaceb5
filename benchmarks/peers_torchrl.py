"""TorchRL's MAPPO for VMAS, for speed.py.

With the path of TorchRL's own `sota-implementations/multiagent/mappo_ippo.py` as last argument, that script itself
runs, unchanged: its options are set on its command line and its collector is timed from outside. Without, a loop of
the same structure: Collector with a postprocessing transform, ReplayBuffer without replacement, ClipPPOLoss, GAE,
MultiAgentMLP.
"""

from __future__ import annotations

import runpy
import sys
import tempfile
from pathlib import Path

import torch
import torchrl.collectors
from contender import Setting, Stopwatch, Timing, main
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModule
from tensordict.nn.distributions import NormalParamExtractor
from torch import nn
from torchrl.data import LazyTensorStorage, ReplayBuffer, SamplerWithoutReplacement
from torchrl.envs import RewardSum, TransformedEnv, VmasEnv
from torchrl.modules import MultiAgentMLP, ProbabilisticActor, TanhNormal, ValueOperator
from torchrl.objectives import ClipPPOLoss, ValueEstimators


def run_script(script: Path, iterations: int, setting: Setting) -> list[Timing]:
    """Runs the original with its collector exchanged for one that is timed."""
    torch.set_num_threads(setting.threads)
    stopwatch = Stopwatch()

    class TimedCollector(torchrl.collectors.Collector):
        def __iter__(self):
            return stopwatch.watch(super().__iter__())

    torchrl.collectors.Collector = TimedCollector
    mlp = torchrl.modules.models.multiagent.MultiAgentMLP
    torchrl.modules.models.multiagent.MultiAgentMLP = lambda **options: mlp(**{**options, "num_cells": setting.width})
    sys.path.insert(0, str(script.parent))
    with tempfile.TemporaryDirectory() as folder:
        sys.argv = [
            str(script),
            f"seed={setting.seed}",
            f"env.scenario_name={setting.scenario}",
            f"env.scenario.n_agents={setting.num_agents}",
            f"env.max_steps={setting.max_steps}",
            f"collector.frames_per_batch={setting.frames}",
            f"collector.n_iters={iterations}",
            f"loss.gamma={setting.gamma}",
            f"loss.lmbda={setting.lmbda}",
            f"loss.clip_epsilon={setting.clip_epsilon}",
            f"loss.entropy_eps={setting.entropy_coeff}",
            f"train.num_epochs={setting.epochs}",
            f"train.minibatch_size={setting.minibatch_size}",
            f"train.lr={setting.lr}",
            f"train.max_grad_norm={setting.max_grad_norm}",
            "eval.evaluation_episodes=1",  # the number of evaluation environments; without a logger none is stepped
            "logger.backend=null",
            f"hydra.run.dir={folder}",
            "hydra.job.chdir=false",
        ]
        runpy.run_path(str(script), run_name="__main__")
    return stopwatch.timings


def expand_done(data: TensorDictBase) -> TensorDictBase:
    """Gives every agent the environment's done flags, as that script does."""
    shape = data["next", "agents", "reward"].shape
    for key in ("done", "terminated"):
        data["next", "agents", key] = data["next", key].unsqueeze(-1).expand(shape)
    return data


def network(inputs: int, outputs: int, setting: Setting, *, centralised: bool) -> MultiAgentMLP:
    return MultiAgentMLP(
        inputs,
        outputs,
        n_agents=setting.num_agents,
        centralised=centralised,
        share_params=True,
        depth=2,
        num_cells=setting.width,
        activation_class=nn.Tanh,
    )


def make_loss(env: TransformedEnv, setting: Setting) -> ClipPPOLoss:
    inputs = env.observation_spec["agents", "observation"].shape[-1]
    spec = env.full_action_spec_unbatched
    space = spec[env.action_key].space
    policy_network = network(inputs, 2 * space.low.shape[-1], setting, centralised=False)
    parameters = [("agents", "loc"), ("agents", "scale")]
    observation = [("agents", "observation")]
    policy = ProbabilisticActor(
        TensorDictModule(nn.Sequential(policy_network, NormalParamExtractor()), observation, parameters),
        spec=spec,
        in_keys=parameters,
        out_keys=[env.action_key],
        distribution_class=TanhNormal,
        distribution_kwargs={"low": space.low, "high": space.high},
        return_log_prob=True,
    )
    critic = ValueOperator(network(inputs, 1, setting, centralised=True), in_keys=observation)
    loss = ClipPPOLoss(
        policy,
        critic,
        clip_epsilon=setting.clip_epsilon,
        entropy_coeff=setting.entropy_coeff,
        normalize_advantage=False,
    )
    done = {key: ("agents", key) for key in ("done", "terminated")}
    loss.set_keys(reward=env.reward_key, action=env.action_key, **done)
    loss.make_value_estimator(ValueEstimators.GAE, gamma=setting.gamma, lmbda=setting.lmbda)
    return loss


def run(iterations: int, setting: Setting) -> list[Timing]:
    torch.set_num_threads(setting.threads)
    torch.manual_seed(setting.seed)
    env = VmasEnv(
        setting.scenario,
        num_envs=setting.num_envs,
        max_steps=setting.max_steps,
        seed=setting.seed,
        n_agents=setting.num_agents,
    )
    env = TransformedEnv(env, RewardSum(in_keys=[env.reward_key], out_keys=[("agents", "episode_reward")]))
    loss = make_loss(env, setting)
    optimizer = torch.optim.Adam(loss.parameters(), lr=setting.lr)
    collector = torchrl.collectors.Collector(
        env,
        loss.actor_network,
        frames_per_batch=setting.frames,
        total_frames=setting.frames * iterations,
        postproc=expand_done,
        auto_register_policy_transforms=False,
    )
    buffer = ReplayBuffer(
        storage=LazyTensorStorage(setting.frames),
        sampler=SamplerWithoutReplacement(),
        batch_size=setting.minibatch_size,
    )
    stopwatch = Stopwatch()
    for data in stopwatch.watch(collector):
        with torch.no_grad():
            loss.value_estimator(
                data, params=loss.critic_network_params, target_params=loss.target_critic_network_params
            )
        buffer.extend(data.reshape(-1))
        diagnostics = []
        for _ in range(setting.epochs * setting.minibatches):
            losses = loss(buffer.sample())
            diagnostics.append(losses.detach())
            (losses["loss_objective"] + losses["loss_critic"] + losses["loss_entropy"]).backward()
            norm = torch.nn.utils.clip_grad_norm_(loss.parameters(), setting.max_grad_norm)
            diagnostics[-1]["grad_norm"] = norm
            optimizer.step()
            optimizer.zero_grad()
        collector.update_policy_weights_()
        torch.stack(diagnostics)
    collector.shutdown()
    return stopwatch.timings


if __name__ == "__main__":
    script = Path(sys.argv.pop()).resolve() if len(sys.argv) > 3 else None
    main(
        run if script is None else lambda iterations, setting: run_script(script, iterations, setting),
        lambda: f"torchrl {torchrl.__version__}, torch {torch.__version__}",
    )
