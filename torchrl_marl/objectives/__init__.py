"""Losses, one class per method, and the equations behind them."""

from torchrl_marl.objectives.composition import ComposedLoss
from torchrl_marl.objectives.ctds import CTDSLoss
from torchrl_marl.objectives.happo import HAPPOLoss, HATRPOLoss
from torchrl_marl.objectives.magpo import MAGPOLoss
from torchrl_marl.objectives.marpo import MARPOLoss
from torchrl_marl.objectives.mars import MARSLoss
from torchrl_marl.objectives.masking import standardize
from torchrl_marl.objectives.natural_gradient import NaturalGradientLoss
from torchrl_marl.objectives.off_agent import OAPPOLoss, OATRPOLoss
from torchrl_marl.objectives.ppo import IPPOLoss, MAPPOLoss, MASPOLoss
from torchrl_marl.objectives.ratio import RatioLoss
from torchrl_marl.objectives.seac import SEACLoss
from torchrl_marl.objectives.sequential import SequentialLoss
from torchrl_marl.objectives.value import LDSALoss, QMIXLoss, QPLEXLoss, ValueLoss, VDNLoss

__all__ = [
    "CTDSLoss",
    "ComposedLoss",
    "HAPPOLoss",
    "HATRPOLoss",
    "IPPOLoss",
    "LDSALoss",
    "MAGPOLoss",
    "MAPPOLoss",
    "MARPOLoss",
    "MARSLoss",
    "MASPOLoss",
    "NaturalGradientLoss",
    "OAPPOLoss",
    "OATRPOLoss",
    "QMIXLoss",
    "QPLEXLoss",
    "RatioLoss",
    "SEACLoss",
    "SequentialLoss",
    "VDNLoss",
    "ValueLoss",
    "standardize",
]
