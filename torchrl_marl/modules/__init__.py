"""Networks: actor and critic builders, feed-forward and recurrent, and value normalisation."""

from torchrl_marl.modules.actor_critic import make_actor, make_critic
from torchrl_marl.modules.agent_networks import AgentNetworks, agent_policy
from torchrl_marl.modules.group import GroupShape
from torchrl_marl.modules.recurrent import (
    MultiAgentGRU,
    RecurrentModule,
    collection_policy,
    make_recurrent_actor,
    make_recurrent_critic,
    with_recurrent_state,
)
from torchrl_marl.modules.value_norm import Denormalize

__all__ = [
    "AgentNetworks",
    "Denormalize",
    "GroupShape",
    "MultiAgentGRU",
    "RecurrentModule",
    "agent_policy",
    "collection_policy",
    "make_actor",
    "make_critic",
    "make_recurrent_actor",
    "make_recurrent_critic",
    "with_recurrent_state",
]
