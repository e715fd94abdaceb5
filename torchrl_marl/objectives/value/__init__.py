"""Value-based methods, trained off-policy on discrete actions: VDN, QMIX, QPLEX and LDSA."""

from torchrl_marl.objectives.value.decomposition import QMIXLoss, QPLEXLoss, VDNLoss
from torchrl_marl.objectives.value.ldsa import LDSALoss
from torchrl_marl.objectives.value.value_loss import ValueLoss, ValueOptions

__all__ = ["LDSALoss", "QMIXLoss", "QPLEXLoss", "VDNLoss", "ValueLoss", "ValueOptions"]
