"""Networks: actors and critics, feed-forward and recurrent, autoregressive joint policies, and value normalisation."""

from torchrl_marl.modules.actor_critic import make_actor, make_critic
from torchrl_marl.modules.agent_networks import AgentNetworks, agent_policy
from torchrl_marl.modules.autoregressive import AutoregressiveActor, AutoregressiveCritic
from torchrl_marl.modules.clusters import AgentAutoencoder, cluster_agents, encode_agents
from torchrl_marl.modules.images import make_cnn_actor, make_cnn_critic
from torchrl_marl.modules.layers import make_policy, num_outputs
from torchrl_marl.modules.mat import make_mat
from torchrl_marl.modules.mixers import QPLEXMixer
from torchrl_marl.modules.observation_norm import ObservationNorm
from torchrl_marl.modules.recurrent import (
    MultiAgentGRU,
    RecurrentModule,
    collection_policy,
    make_recurrent_actor,
    make_recurrent_critic,
    with_recurrent_state,
)
from torchrl_marl.modules.sable import make_sable
from torchrl_marl.modules.spec import GroupSpec
from torchrl_marl.modules.subtasks import make_ldsa_actor
from torchrl_marl.modules.value_norm import Denormalize

__all__ = [
    "AgentAutoencoder",
    "AgentNetworks",
    "AutoregressiveActor",
    "AutoregressiveCritic",
    "Denormalize",
    "GroupSpec",
    "MultiAgentGRU",
    "ObservationNorm",
    "QPLEXMixer",
    "RecurrentModule",
    "agent_policy",
    "cluster_agents",
    "collection_policy",
    "encode_agents",
    "make_actor",
    "make_cnn_actor",
    "make_cnn_critic",
    "make_critic",
    "make_ldsa_actor",
    "make_mat",
    "make_policy",
    "make_recurrent_actor",
    "make_recurrent_critic",
    "make_sable",
    "num_outputs",
    "with_recurrent_state",
]
