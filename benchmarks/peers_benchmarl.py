"""BenchMARL's MAPPO for VMAS, for speed.py; runs in an environment of its own, as BenchMARL needs an older TorchRL.

BenchMARL's `Experiment` runs unchanged; its collector is timed from outside. What it computes for its log cannot be
turned off and is left out of the time.
"""

from __future__ import annotations

import tempfile
from importlib.metadata import version

import benchmarl.experiment.experiment as experiment_module
import torch
from benchmarl.algorithms import MappoConfig
from benchmarl.environments import VmasTask
from benchmarl.experiment import Experiment, ExperimentConfig
from benchmarl.models import MlpConfig
from contender import Setting, Stopwatch, Timing, main


def run(iterations: int, setting: Setting) -> list[Timing]:
    torch.set_num_threads(setting.threads)
    stopwatch = Stopwatch()

    class TimedCollector(experiment_module.SyncDataCollector):
        def __iter__(self):
            return stopwatch.watch(super().__iter__())

    experiment_module.SyncDataCollector = TimedCollector
    task = VmasTask[setting.scenario.upper()].get_task({"max_steps": setting.max_steps, "n_agents": setting.num_agents})
    algorithm = MappoConfig(
        share_param_critic=True,
        clip_epsilon=setting.clip_epsilon,
        entropy_coef=setting.entropy_coeff,
        critic_coef=1.0,
        loss_critic_type="smooth_l1",
        lmbda=setting.lmbda,
        scale_mapping="biased_softplus_1.0",
        use_tanh_normal=True,
        minibatch_advantage=False,
    )
    model = MlpConfig(
        num_cells=[setting.width, setting.width], layer_class=torch.nn.Linear, activation_class=torch.nn.Tanh
    )
    with tempfile.TemporaryDirectory() as folder:
        experiment = Experiment(task, algorithm, model, setting.seed, experiment_config(iterations, setting, folder))
        experiment.logger.log_collection = stopwatch.leave_out(experiment.logger.log_collection)
        experiment.run()
    return stopwatch.timings


def experiment_config(iterations: int, setting: Setting, folder: str) -> ExperimentConfig:
    config = ExperimentConfig.get_from_yaml()
    config.sampling_device = config.train_device = config.buffer_device = "cpu"
    config.gamma = setting.gamma
    config.lr = setting.lr
    config.clip_grad_norm, config.clip_grad_val = True, setting.max_grad_norm
    config.max_n_iters, config.max_n_frames = iterations + 1, None  # the last one is never timed to its end
    config.on_policy_collected_frames_per_batch = setting.frames
    config.on_policy_n_envs_per_worker = setting.num_envs
    config.on_policy_n_minibatch_iters = setting.epochs
    config.on_policy_minibatch_size = setting.minibatch_size
    config.evaluation, config.render, config.evaluation_episodes = False, False, 1
    config.loggers, config.create_json = [], False
    config.save_folder = folder
    return config


if __name__ == "__main__":
    main(run, lambda: f"benchmarl {version('benchmarl')}, torchrl {version('torchrl')}, torch {torch.__version__}")
