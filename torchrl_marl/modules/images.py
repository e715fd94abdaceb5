"""Builders of actors and critics that observe images."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from tensordict import NestedKey
from tensordict.nn import TensorDictModule
from torch import Tensor, nn
from torchrl.envs import EnvBase
from torchrl.modules import ConvNet, ProbabilisticActor, ValueNorm

from torchrl_marl.modules.layers import (
    Activation,
    Chain,
    Networks,
    initialize,
    make_policy,
    num_outputs,
)
from torchrl_marl.modules.spec import GroupSpec, group_shape
from torchrl_marl.modules.value_norm import Denormalize

__all__ = ["make_cnn_actor", "make_cnn_critic"]


class _ImageEncoder(nn.Module):
    """Convolutional layers and a linear layer: ``[..., C, H, W]`` or ``[..., H, W, C]`` to ``[..., features]``.

    Observations ``[..., O]`` beside the images are appended to the features. ``uint8`` values are scaled to [0, 1]. The
    channel dimension is the smaller of the first and the last dimension.
    """

    def __init__(
        self,
        shape: GroupSpec,
        num_channels: Sequence[int],
        kernel_sizes: Sequence[int],
        strides: Sequence[int],
        features: int,
    ) -> None:
        super().__init__()
        if shape.image is None:
            raise ValueError(f"A CNN needs images [agents, C, H, W] or [agents, H, W, C]; {shape.name!r} has vectors.")
        if not len(num_channels) == len(kernel_sizes) == len(strides):
            raise ValueError(
                "num_channels, kernel_sizes and strides need an entry for each layer; "
                f"got {list(num_channels)}, {list(kernel_sizes)}, {list(strides)}."
            )
        first, middle, last = shape.image
        self.channels_last = last <= first
        size = (last, first, middle) if self.channels_last else (first, middle, last)
        self.convolutions = ConvNet(
            size[0],
            num_cells=list(num_channels),
            kernel_sizes=list(kernel_sizes),
            strides=list(strides),
            activation_class=nn.ReLU,
        )
        sides = list(size[1:])
        for kernel, stride in zip(kernel_sizes, strides, strict=True):
            sides = [(side - kernel) // stride + 1 for side in sides]
            if min(sides) < 1:
                raise ValueError(
                    f"kernel_sizes {list(kernel_sizes)} with strides {list(strides)} are too large for images of "
                    f"{size[1]} x {size[2]}."
                )
        self.features = nn.Linear(num_channels[-1] * math.prod(sides), features)
        beside = shape.image_key == "image"
        self.num_outputs = features + (shape.observation_size if beside else 0)
        keys = ["image", "observation"] if beside else ["observation"]
        self.in_keys: list[NestedKey] = [(shape.name, key) for key in keys]
        for layer in (module for module in self.modules() if isinstance(module, nn.Conv2d | nn.Linear)):
            nn.init.orthogonal_(layer.weight, gain=math.sqrt(2))
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)

    def forward(self, image: Tensor, *beside: Tensor) -> Tensor:
        """Encode images of any batch shape; append the observations beside them, if any."""
        image = image / 255 if image.dtype == torch.uint8 else image
        image = image.movedim(-1, -3) if self.channels_last else image
        features = self.features(self.convolutions(image)).relu()
        return torch.cat([features, *beside], -1) if beside else features


def make_cnn_actor(
    env: EnvBase | GroupSpec,
    *,
    group: str | None = None,
    num_channels: Sequence[int] = (32, 64, 64),
    kernel_sizes: Sequence[int] = (8, 4, 3),
    strides: Sequence[int] = (4, 2, 1),
    features: int = 256,
    hidden_sizes: Sequence[int] = (256,),
    activation: Activation = "tanh",
    agent_id: bool = True,
    device: torch.device | str | None = None,
) -> ProbabilisticActor:
    """Build a decentralised stochastic policy that observes images, with one network for all agents.

    Convolutional layers (:class:`torchrl.modules.ConvNet`, by default those of Mnih et al., 2015) and a linear layer
    encode each image. An observation beside the image (``(group, "image")``) is appended to the encoding. The layers
    after the encoding are those of :func:`~torchrl_marl.modules.make_actor`.

    Args:
        env: the environment, or the shape of a group; observations are ``[N, C, H, W]`` or ``[N, H, W, C]``.
        group: name of the group; optional if the environment has one group.
        num_channels: output channels of each convolutional layer.
        kernel_sizes: kernel size of each convolutional layer, in pixels.
        strides: stride of each convolutional layer, in pixels.
        features: length of the encoding of an image.
        hidden_sizes: widths of the hidden layers after the encoding.
        activation: activation of the hidden layers.
        agent_id: append a one-hot agent id to the encoding.
        device: device of the parameters.

    Raises:
        ValueError: if observations are not images, or the kernels are too large for them.

    Example:
        >>> from tensordict import TensorDict
        >>> spec = GroupSpec("agents", num_agents=2, observation_size=36 * 36 * 3, image=(36, 36, 3), num_actions=5)
        >>> images = torch.zeros(7, 2, 36, 36, 3, dtype=torch.uint8)
        >>> make_cnn_actor(spec)(TensorDict({"agents": {"observation": images}}, 7))["agents", "action"].shape
        torch.Size([7, 2])
    """
    shape = group_shape(env, group, images=True)
    encoder = _ImageEncoder(shape, num_channels, kernel_sizes, strides, features)
    networks = Networks(shape, hidden_sizes, activation, agent_id=agent_id)
    head = networks.each(encoder.num_outputs, num_outputs(shape))
    initialize(head, activation, output_gain=0.01)
    return make_policy(shape, encoder.in_keys, Chain(encoder, head), device=device)


def make_cnn_critic(
    env: EnvBase | GroupSpec,
    *,
    group: str | None = None,
    observes: Literal["joint_observation", "observation"] = "joint_observation",
    num_channels: Sequence[int] = (32, 64, 64),
    kernel_sizes: Sequence[int] = (8, 4, 3),
    strides: Sequence[int] = (4, 2, 1),
    features: int = 256,
    hidden_sizes: Sequence[int] = (256,),
    activation: Activation = "tanh",
    agent_id: bool = True,
    value_norm: ValueNorm | None = None,
    device: torch.device | str | None = None,
) -> TensorDictModule:
    """Build a critic that observes images, with one encoder for all agents.

    Args:
        env: the environment, or the shape of a group; observations are ``[N, C, H, W]`` or ``[N, H, W, C]``.
        group: name of the group; optional if the environment has one group.
        observes: ``"joint_observation"``, the concatenated encodings of all agents' images; ``"observation"``, the
            encoding of each agent's own image.
        num_channels: output channels of each convolutional layer.
        kernel_sizes: kernel size of each convolutional layer, in pixels.
        strides: stride of each convolutional layer, in pixels.
        features: length of the encoding of an image.
        hidden_sizes: widths of the hidden layers after the encoding.
        activation: activation of the hidden layers.
        agent_id: append a one-hot agent id to the encoding (``"observation"`` only).
        value_norm: running statistics of values; the network then predicts normalised values, see
            :class:`~torchrl_marl.modules.Denormalize`.
        device: device of the parameters.

    Returns:
        Critic that writes ``(group, "state_value")``, ``[*batch, agents, 1]``, in units of the return.

    Raises:
        ValueError: if observations are not images, the kernels are too large for them, or an option is unknown.
    """
    shape = group_shape(env, group, images=True)
    if observes not in ("joint_observation", "observation"):
        raise ValueError(f"observes must be joint_observation or observation; got {observes!r}.")
    encoder = _ImageEncoder(shape, num_channels, kernel_sizes, strides, features)
    networks, size = Networks(shape, hidden_sizes, activation, agent_id=agent_id), encoder.num_outputs
    if observes == "observation":
        head = networks.each(size, 1)
    else:
        head = nn.Sequential(nn.Flatten(-2, -1), *networks.values(shape.num_agents * size))
    initialize(head, activation, output_gain=1.0)
    layers = [encoder, head] if value_norm is None else [encoder, head, Denormalize(value_norm)]
    network = Chain(*layers).to(device)
    return TensorDictModule(network, in_keys=encoder.in_keys, out_keys=[(shape.name, "state_value")])
