"""Losses, one class per method, and the equations that they are made of."""

from torchrl_marl.objectives.marpo import MARPOLoss
from torchrl_marl.objectives.mars import MARSLoss
from torchrl_marl.objectives.maspo import MASPOLoss
from torchrl_marl.objectives.ppo import IPPOLoss, MAPPOLoss
from torchrl_marl.objectives.ratio import RatioLoss, standardize

__all__ = ["IPPOLoss", "MAPPOLoss", "MARPOLoss", "MARSLoss", "MASPOLoss", "RatioLoss", "standardize"]
