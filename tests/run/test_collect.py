"""What collects follows from the loss, the environment and ``compile``, unless the configuration names it."""

import pytest
from omegaconf import OmegaConf
from torchrl.collectors import Collector
from torchrl.envs import EnvBase
from torchrl.envs.transforms import DoubleToFloat, TransformedEnv

from torchrl_marl.collectors import CompiledCollector, SequenceCollector
from torchrl_marl.envs import make_coordsum, make_env
from torchrl_marl.modules import collection_policy, make_actor, make_critic, make_sable, with_recurrent_state
from torchrl_marl.objectives import MAPPOLoss
from torchrl_marl.run import make_collector


def coordsum() -> EnvBase:
    return make_coordsum("CoordSum-2x3", num_envs=2, seed=0)


@pytest.mark.parametrize(
    ("make", "compile", "networks", "expected"),
    [
        (coordsum, False, "mlp", Collector),
        (coordsum, True, "mlp", CompiledCollector),
        (lambda: make_env("simple", num_envs=2, seed=0), True, "mlp", CompiledCollector),
        (lambda: TransformedEnv(coordsum(), DoubleToFloat()), True, "mlp", Collector),
        (coordsum, False, "sable", SequenceCollector),
        (coordsum, True, "sable", CompiledCollector),
    ],
)
def test_the_collector_suits_the_loss_and_the_environment(make, compile, networks, expected) -> None:
    env = make()
    actor, critic = make_sable(env, embed_dim=8) if networks == "sable" else (make_actor(env), make_critic(env))
    policy = collection_policy(actor, critic)
    env = with_recurrent_state(env, policy)
    cfg = OmegaConf.create({"collector": {}, "frames_per_batch": 8, "compile": compile})
    collector = make_collector(cfg, env, policy, MAPPOLoss(actor, critic, functional=False))
    assert type(collector) is expected
    if not (compile and expected is CompiledCollector):  # which would compile
        assert next(iter(collector)).shape == (2, 4)


def test_a_named_collector_is_taken() -> None:
    env = coordsum()
    actor, critic = make_actor(env), make_critic(env)
    named = {"_target_": "torchrl_marl.collectors.SequenceCollector"}
    cfg = OmegaConf.create({"collector": named, "frames_per_batch": 8, "compile": True})
    assert type(make_collector(cfg, env, actor, MAPPOLoss(actor, critic))) is SequenceCollector
