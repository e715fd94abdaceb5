"""Evaluation, comparison and plots of runs."""

from torchrl_marl.evaluation.episodes import Episodes, evaluate
from torchrl_marl.evaluation.plots import plot_kl_interval, plot_learning_curve, plot_method, plot_reuse_matrix
from torchrl_marl.evaluation.statistics import (
    iqm,
    min_max_normalize,
    optimality_gap,
    performance_profile,
    probability_of_improvement,
    sample_efficiency,
    stratified_bootstrap_interval,
)

__all__ = [
    "Episodes",
    "evaluate",
    "iqm",
    "min_max_normalize",
    "optimality_gap",
    "performance_profile",
    "plot_kl_interval",
    "plot_learning_curve",
    "plot_method",
    "plot_reuse_matrix",
    "probability_of_improvement",
    "sample_efficiency",
    "stratified_bootstrap_interval",
]
