"""The TensorDict keys that the library reads and writes, in TorchRL's multi-agent convention.

``B`` is any batch (environments, environments x time, or shuffled rows), ``N`` the number of agents of a group. The
table uses the group name ``"agents"``. Losses take the name from the actor's action key; ``loss.set_keys`` renames it.

=========================================  =============  ===========================================================
key                                        shape          meaning
=========================================  =============  ===========================================================
``("agents", "observation")``              ``[B, N, O]``  local observations
``("agents", "image")``                    ``[B, N, …]``  an image (``uint8``) beside the observation, if there is one
``("agents", "action")``                   ``[B, N, A]``  actions (``[B, N]`` for a categorical)
``("agents", "action_log_prob")``          ``[B, N]``     log-probability of each agent's action when it was collected
``("agents", "action_mask")``              ``[B, N, A]``  legal actions (bool), read by the actor of a masked group
``("agents", "mask")``                     ``[B, N]``     live agents (bool); policies learn from live agents only,
                                                          critics from all
``("agents", "state_value")``              ``[B, N, 1]``  the critic's value of each agent, in units of the return
``("next", "agents", "reward")``           ``[B, N, 1]``  reward of each agent
``("next", "agents", "episode_reward")``   ``[B, N, 1]``  undiscounted cumulative return of the episode
``("next", "done")``                       ``[B, 1]``     the episode ended, by termination or truncation
``("next", "terminated")``                 ``[B, 1]``     the episode terminated: no bootstrapping
``("next", "info", "won")``                ``[B, 1]``     further outcome of an episode, by any name; the value at the
                                                          last step counts
``("agents", "update_log_ratio")``         ``[B, N]``     log-ratio of agents after their turn, else 0
``("agents", "reuse_source")``             ``[B, N]``     sampled source of each agent's experience
``"state"``                                ``[B, S]``     global state, where the environment has one
``"advantage"``, ``"value_target"``        ``[B, N, 1]``  written by a loss's value estimator
``("agents", "recurrent_state")``          ``[B, N, H]``  recurrent actor's state before the step (``"next"``: after)
``("agents", "critic_state")``             ``[B, N, H]``  state of a recurrent critic with one state per agent
``"agents_critic_state"``                  ``[B, H]``     state of a recurrent critic with one state for the team
``("agents", "action_value")``             ``[B, N, A]``  value of each action; the logits of a policy
``("agents", "subtask_logits")``           ``[B, N, K]``  LDSA: logits of each agent's choice of a subtask
``"is_init"``                              ``[B, 1]``     the step is the first of its episode (TorchRL's InitTracker)
``("agents", "order")``                    ``[B, N]``     decoding order of agents in an autoregressive ``get_dist``
``("agents", "encoding")``                 ``[B, N, E]``  encoder output of an autoregressive actor, read by its critic
``"agents_step"``                          ``[B, 1]``     Sable: position in the episode
``"agents_encoder_memory"``                ``[B, ...]``   Sable: the encoder's memory of the episode
``"agents_decoder_memory"``                ``[B, ...]``   Sable: the decoder's memory of the episode
=========================================  =============  ===========================================================

A team reward and a team value (``[B, 1]`` at the root) are also supported: set ``loss.set_keys(reward=...)``.
"""

from __future__ import annotations

from tensordict import NestedKey, unravel_key

__all__ = ["sibling"]


def sibling(key: NestedKey, name: str) -> NestedKey:
    """Return the key of the entry ``name`` in the group of ``key``.

    Example:
        >>> sibling(("agents", "action"), "reward"), sibling("action", "reward")
        (('agents', 'reward'), 'reward')
    """
    return unravel_key((*key[:-1], name)) if isinstance(key, tuple) else name
