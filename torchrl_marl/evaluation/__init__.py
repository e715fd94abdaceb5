"""How runs are measured and shown."""

from torchrl_marl.evaluation.episodes import Episodes, evaluate
from torchrl_marl.evaluation.plots import plot_kl_interval, plot_learning_curve, plot_reuse_matrix

__all__ = ["Episodes", "evaluate", "plot_kl_interval", "plot_learning_curve", "plot_reuse_matrix"]
