import numpy as np
import pytest
import torch
from tensordict import TensorDict

from tests.recipes.runs import run_folders, run_recipe
from torchrl_marl.export import export_policy
from torchrl_marl.modules import (
    GroupSpec,
    ObservationNorm,
    make_actor,
    make_critic,
    make_recurrent_actor,
    make_recurrent_critic,
)
from torchrl_marl.run.checkpoints import load_policy
from torchrl_marl.run.records import read_metric

KEY = ("agents", "observation")


def observed(values, mask=None):
    agents = {"observation": values} if mask is None else {"observation": values, "mask": mask}
    return TensorDict({"agents": TensorDict(agents, values.shape[:-1])}, values.shape[:-2])


def test_statistics_of_batches_are_those_of_all_live_rows_together():
    torch.manual_seed(0)
    batches = [3 + 5 * torch.randn(size, 7, 2, 4) for size in (3, 1, 8)]
    masks = [torch.rand(batch.shape[:-1]) < 0.6 for batch in batches]
    norm = ObservationNorm(KEY, 4)
    for batch, mask in zip(batches, masks, strict=True):
        norm.update(observed(batch, mask))
    rows = torch.cat([batch[mask] for batch, mask in zip(batches, masks, strict=True)]).double()
    assert norm.count == len(rows)
    torch.testing.assert_close(norm.mean.double(), rows.mean(0), rtol=1e-5, atol=0)
    torch.testing.assert_close(norm.variance.double(), rows.var(0, correction=0), rtol=1e-5, atol=0)
    normalised = norm(rows.float())
    torch.testing.assert_close(normalised.mean(0), torch.zeros(4), rtol=0, atol=1e-5)
    torch.testing.assert_close(normalised.std(0, correction=0), torch.ones(4))


def test_it_changes_nothing_before_the_first_rows_and_clamps():
    norm = ObservationNorm(KEY, 2, clamp=3.0)
    norm.update(observed(torch.ones(5, 2, 2), torch.zeros(5, 2, dtype=torch.bool)))
    torch.testing.assert_close(norm(torch.tensor([[0.5, -9.0]])), torch.tensor([[0.5, -3.0]]))


@pytest.mark.parametrize("observes", ["joint_observation", "state", "observation"])
def test_networks_do_not_see_the_scale_of_observations(observes):
    spec = GroupSpec("agents", num_agents=2, observation_size=3, num_actions=4, state_size=5)
    torch.manual_seed(0)
    data = observed(torch.randn(200, 2, 3)).set("state", torch.randn(200, 5))
    scaled = observed(50 + 1000 * data[KEY]).set("state", 50 + 1000 * data["state"])
    for build in (make_actor, lambda *a, **k: make_critic(*a, observes=observes, **k)):
        results = []
        for batch in (data, scaled):
            torch.manual_seed(1)
            network = build(spec, normalize_observations=True)
            for norm in (module for module in network.modules() if isinstance(module, ObservationNorm)):
                norm.update(batch)
            written = network(batch.clone())
            results.append(written["agents", "logits" if build is make_actor else "state_value"])
        torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("observes", ["joint_observation", "state", "observation"])
def test_networks_with_a_memory_do_not_see_the_scale_either(observes):
    spec = GroupSpec("agents", num_agents=2, observation_size=3, num_actions=4, state_size=5)
    torch.manual_seed(0)
    data = observed(torch.randn(200, 2, 3)).set("state", torch.randn(200, 5))
    data["agents", "recurrent_state"] = data["agents", "critic_state"] = torch.randn(200, 2, 8)
    data["agents_critic_state"] = torch.randn(200, 8)
    scaled = data.clone().set(KEY, 50 + 1000 * data[KEY]).set("state", 50 + 1000 * data["state"])
    for build in (make_recurrent_actor, lambda *a, **k: make_recurrent_critic(*a, observes=observes, **k)):
        results = []
        for batch in (data, scaled):
            torch.manual_seed(1)
            network = build(spec, recurrent_size=8, normalize_observations=True)
            for norm in (module for module in network.modules() if isinstance(module, ObservationNorm)):
                norm.update(batch)
            written = network(batch.clone())
            results.append(written["agents", "logits" if build is make_recurrent_actor else "state_value"])
        torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("network", ["mlp", "gru"])
def test_a_run_keeps_its_statistics_and_learns_from_a_ratio_of_1(network, tmp_path, monkeypatch):
    norms = ["actor.normalize_observations=true", "critic.normalize_observations=true"]
    small = ["env=coordsum", "env.num_envs=8", "frames_per_batch=80", "total_frames=240", "evaluation.interval=80"]
    memory = [] if network == "mlp" else ["actor=gru", "critic=gru", "chunk_length=5"]
    run_recipe(monkeypatch, tmp_path, *small, *norms, *memory, "epochs=1", "minibatch_size=80")
    (folder,) = run_folders(tmp_path)
    ratios = [read_metric(folder, f"train/agents/{name}_ratio")[1] for name in ("min", "max")]
    np.testing.assert_allclose(ratios, np.ones((2, 3)), rtol=1e-5)
    policy = load_policy(folder)
    (norm,) = (module for module in policy.modules() if isinstance(module, ObservationNorm))
    assert norm.count > 0
    assert (norm.mean != 0).any()
    assert export_policy(folder, format="torch_export").exists()  # which compares it to the policy
