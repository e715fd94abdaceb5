"""The TensorDict keys that the library reads and writes, in TorchRL's multi-agent convention.

``B`` is any batch (environments, environments x time, or shuffled rows), ``N`` the number of agents of a group. The
group is called ``"agents"`` here; losses take its name from the actor's action key; ``loss.set_keys`` renames keys.

=========================================  =============  ===========================================================
key                                        shape          meaning
=========================================  =============  ===========================================================
``("agents", "observation")``              ``[B, N, O]``  local observations
``("agents", "action")``                   ``[B, N, A]``  actions (``[B, N]`` for a categorical)
``("agents", "action_log_prob")``          ``[B, N]``     log-probability of each agent's action when it was collected
``("agents", "action_mask")``              ``[B, N, A]``  legal actions (bool), read by the actor of a masked group
``("agents", "mask")``                     ``[B, N]``     live agents (bool); policies learn from their rows alone,
                                                          critics from all
``("agents", "state_value")``              ``[B, N, 1]``  the critic's value of each agent, in units of the return
``("next", "agents", "reward")``           ``[B, N, 1]``  reward of each agent
``("next", "agents", "episode_reward")``   ``[B, N, 1]``  undiscounted return of the episode so far
``("next", "done")``                       ``[B, 1]``     the episode ended, by termination or truncation
``("next", "terminated")``                 ``[B, 1]``     the episode ended and has no future: no bootstrapping
``("next", "info", "won")``                ``[B, 1]``     what an environment tells of an episode beyond its return,
                                                          by any name; its value at the last step is the episode's
``("agents", "update_log_ratio")``         ``[B, N]``     log-ratio of agents that have had their turn, else 0
``("agents", "reuse_source")``             ``[B, N]``     whose experience each agent learns from, if drawn
``"state"``                                ``[B, S]``     global state, where the environment has one
``"advantage"``, ``"value_target"``        ``[B, N, 1]``  written by a loss's value estimator
``("agents", "recurrent_state")``          ``[B, N, H]``  a recurrent actor's state before the step (``"next"``: after)
``("agents", "critic_state")``             ``[B, N, H]``  the same of a recurrent critic with a state for each agent
``"agents_critic_state"``                  ``[B, H]``     the same of a recurrent critic with one state for the team
``("agents", "action_value")``             ``[B, N, A]``  value of each action; of a policy its logits
``("agents", "subtask_logits")``           ``[B, N, K]``  LDSA: of each agent's choice of a subtask
``"is_init"``                              ``[B, 1]``     the step is the first of its episode (TorchRL's InitTracker)
``("agents", "order")``                    ``[B, N]``     in which an autoregressive actor's ``get_dist`` decodes agents
``("agents", "encoding")``                 ``[B, N, E]``  an autoregressive actor's encoder, handed to its critic
``"agents_step"``                          ``[B, 1]``     Sable: position in the episode
``"agents_encoder_memory"``                ``[B, ...]``   Sable: what its encoder retains of the episode so far
``"agents_decoder_memory"``                ``[B, ...]``   Sable: what its decoder retains
=========================================  =============  ===========================================================

A team reward and a team value (``[B, 1]`` at the root) work too: name them with ``loss.set_keys(reward=...)``.
"""

from __future__ import annotations

from tensordict import NestedKey, unravel_key

__all__ = ["sibling"]


def sibling(key: NestedKey, name: str) -> NestedKey:
    """Return the key of the entry ``name`` beside ``key``, in the same group.

    Example:
        >>> sibling(("agents", "action"), "reward"), sibling("action", "reward")
        (('agents', 'reward'), 'reward')
    """
    return unravel_key((*key[:-1], name)) if isinstance(key, tuple) else name
