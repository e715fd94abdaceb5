"""Networks: actor and critic builders and value normalisation."""

from torchrl_marl.modules.actor_critic import make_actor, make_critic
from torchrl_marl.modules.group import GroupShape
from torchrl_marl.modules.value_norm import Denormalize

__all__ = ["Denormalize", "GroupShape", "make_actor", "make_critic"]
