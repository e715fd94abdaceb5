"""Export of trained policies to files that run without this library: ONNX, or a ``torch.export`` program."""

from __future__ import annotations

import copy
import json
import logging
import math
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

import torch
from tensordict import TensorDict
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torchrl.data import Composite
from torchrl.envs import ExplorationType, set_exploration_type
from torchrl.modules import ProbabilisticActor

from torchrl_marl.extras import import_extra
from torchrl_marl.files import replacing
from torchrl_marl.modules import AutoregressiveActor, GroupSpec
from torchrl_marl.modules.protocols import Exportable, Priming, named_parts
from torchrl_marl.run.checkpoints import best_checkpoint, load_policy, read_metadata

__all__ = ["export_policy"]

_TOLERANCE = 1e-5
Tensors = Mapping[str, Tensor]


def export_policy(
    run: str | Path,
    *,
    format: Literal["onnx", "torch_export"] = "onnx",
    path: str | Path | None = None,
    group: str | None = None,
    agent: int | None = None,
    num_observations: int = 1000,
    build: Callable[..., Any] | None = None,
) -> Path:
    """Write the decentralised policy of a run as one file, and print its difference from the original.

    For any batch size ``B``, the program returns each agent's most likely action (for a squashed Gaussian, the squashed
    location) and the parameters of its distribution. Each agent's outputs depend on its own inputs only.

    =======================================  ===============  ==========================================================
    input or output                          shape            where
    =======================================  ===============  ==========================================================
    ``observation``                          ``[B, N, O]``    always
    ``image``                                ``[B, N, ...]``  where an image is beside the observation; ``uint8``
    ``action_mask``                          ``[B, N, C]``    in masked groups; bool, legal actions
    ``recurrent_state``                      ``[B, N, H]``    with a memory; state after the previous step
    ``is_init``                              ``[B, 1]``       with a memory; bool, start of an episode: resets the state
    ``action``                               ``[B, N, A]``    always; an index ``[B, N]`` for discrete actions
    ``loc`` and ``scale``, or ``logits``     ``[B, N, A|C]``  always; before squashing, or before the mask
    ``next_recurrent_state``                 ``[B, N, H]``    with a memory; for the next step
    =======================================  ===============  ==========================================================

    With ``agent`` the file holds the policy of this agent, and all shapes are without ``N``. The file also stores
    agents, sizes, action bounds, environment and training frames, as JSON under the name ``torchrl_marl``. Read it with
    ``onnxruntime.InferenceSession(path).get_modelmeta().custom_metadata_map["torchrl_marl"]``, or with
    ``torch.export.load(..., extra_files={"torchrl_marl": ""})``.

    Args:
        run: folder of a run (uses its best checkpoint) or a checkpoint file.
        format: ``"onnx"`` for ONNX runtimes, ``"torch_export"`` for ``torch.export.load(path).module()``.
        path: file to write, or to replace after the comparison; ``None`` for ``policy[_group][_agent].onnx`` or
            ``.pt2`` in the run's folder, or beside the checkpoint; of the zoo, in the current folder.
        group: name of the group, if the run has several.
        agent: index of one agent; ``None`` for the whole group.
        num_observations: number of random inputs for the comparison of the written file with the original.
        build: builder of a custom actor; see :func:`~torchrl_marl.load_policy`.

    Returns:
        The path of the file.

    Raises:
        FileNotFoundError: if there is no checkpoint.
        ImportError: if the packages for ONNX are not installed.
        RuntimeError: if outputs differ from the original's by more than 1e-5 (relative above 1) or in an action;
            nothing is written then.
        ValueError: if the checkpoint is damaged, its policy is not decentralised, or an argument is out of range.
    """
    if format not in _FORMATS:
        raise ValueError(f"format must be one of {', '.join(_FORMATS)}; got {format!r}")
    if num_observations < 1:
        raise ValueError(f"num_observations must be at least 1, got {num_observations}")
    checkpoint = best_checkpoint(run)
    recorded = read_metadata(checkpoint)
    actor, shape = _policy_of(checkpoint, recorded["actor"], group, build)
    if agent is not None and not 0 <= agent < shape.num_agents:
        raise ValueError(f"there is no agent {agent}: {shape.name!r} has agents 0 to {shape.num_agents - 1}")
    for package in _FORMATS[format].packages:
        import_extra(package, "export")
    folder = Path(run).expanduser() if Path(run).expanduser().is_dir() else checkpoint.parent
    folder = Path() if str(run).startswith("zoo:") else folder
    name = "_".join(str(part) for part in ("policy", group, agent) if part is not None)
    path = folder / f"{name}{_FORMATS[format].suffix}" if path is None else Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)

    example = dict(_of_agent(_random_inputs(actor, shape, 2), agent))
    program = _trace(actor, shape, agent, example)
    metadata = _describe(recorded, shape, agent, example)
    inputs = _random_inputs(actor, shape, num_observations)
    expected = _of_agent(_original(actor, shape, inputs), agent)
    with replacing(path) as written:
        _FORMATS[format].write(program, written, json.dumps(metadata))
        difference, wrong = _compare(_FORMATS[format].run(written, _of_agent(inputs, agent)), expected)
        if difference > _TOLERANCE or wrong:
            raise RuntimeError(
                f"The {format} program differs from the policy of {checkpoint}: over {num_observations:,} "
                f"observations it is off by {difference:.1e} and {wrong:,} discrete actions differ; nothing was written"
            )
    print(f"{path}: largest difference from the original over {num_observations:,} observations {difference:.1e}")
    return path


def _policy_of(
    checkpoint: Path, recorded: Any, group: str | None, build: Callable[..., Any] | None
) -> tuple[ProbabilisticActor, GroupSpec]:
    """Return the policy of a group and its shape."""
    records = recorded if isinstance(recorded, list) else [recorded]
    names = [record["shape"]["name"] for record in records]
    if group not in names and not (group is None and len(names) == 1):
        raise ValueError(f"group must be one of {', '.join(names)}; got {group!r}")
    index = 0 if group is None else names.index(group)
    loaded: Any = load_policy(checkpoint, build=build)
    policy = loaded[index] if isinstance(recorded, list) else loaded
    if isinstance(policy, AutoregressiveActor) or not isinstance(policy, ProbabilisticActor):
        why = "its agents act one after the other" if isinstance(policy, AutoregressiveActor) else "this is none"
        raise ValueError(
            f"{checkpoint} holds a policy built by {records[index]['builder']}; what can be exported are decentralised "
            f"policies, TorchRL's ProbabilisticActor for each agent: {why}"
        )
    return policy, GroupSpec(**records[index]["shape"])


class _Policy(nn.Module):
    """The deterministic policy as a function of named tensors instead of a TensorDict."""

    def __init__(self, actor: ProbabilisticActor, shape: GroupSpec, *, alone: bool) -> None:
        super().__init__()
        self.actor, self._shape, self._alone = actor, shape, alone

    def forward(
        self,
        observation: Tensor,
        action_mask: Tensor | None = None,
        recurrent_state: Tensor | None = None,
        is_init: Tensor | None = None,
        image: Tensor | None = None,
    ) -> dict[str, Tensor]:
        inputs = {"observation": observation, "action_mask": action_mask, "image": image}
        if recurrent_state is not None and is_init is not None:
            fresh = is_init if self._alone else is_init.unsqueeze(-1)
            inputs["recurrent_state"] = torch.where(fresh, 0.0, recurrent_state)
        present = {name: value for name, value in inputs.items() if value is not None}
        agents = {name: value.unsqueeze(1) if self._alone else value for name, value in present.items()}
        data = TensorDict({self._shape.name: agents}, batch_size=observation.shape[:1])
        distribution = self.actor.get_dist(data)
        discrete = self._shape.num_actions is not None
        action = distribution.mode if discrete else distribution.deterministic_sample
        results = _results(data.set((self._shape.name, "action"), action), self._shape, "recurrent_state" in inputs)
        return {name: value.squeeze(1) if self._alone else value for name, value in results.items()}


def _trace(
    actor: ProbabilisticActor, shape: GroupSpec, agent: int | None, example: dict[str, Tensor]
) -> ExportedProgram:
    """Trace the policy of the group or of one agent as a program over tensors, for any batch size."""
    actor = copy.deepcopy(actor).requires_grad_(False)
    for name, module in named_parts(actor, Exportable):
        actor.set_submodule(name, module.for_export(agent))
    policy = _Policy(actor, shape, alone=agent is not None)
    return torch.export.export(policy, (), example, dynamic_shapes={name: {0: Dim("batch")} for name in example})


def _original(actor: ProbabilisticActor, shape: GroupSpec, inputs: Tensors) -> dict[str, Tensor]:
    """Outputs of the original policy for given inputs, with deterministic actions."""
    agents = {name: value for name, value in inputs.items() if name != "is_init"}
    if "is_init" in inputs:
        agents["recurrent_state"] = agents["recurrent_state"] * ~inputs["is_init"].unsqueeze(-1)
    data = TensorDict({shape.name: agents}, batch_size=inputs["observation"].shape[:1])
    with torch.no_grad(), set_exploration_type(ExplorationType.DETERMINISTIC):
        return _results(actor(data), shape, "is_init" in inputs)


def _results(data: TensorDict, shape: GroupSpec, recurrent: bool) -> dict[str, Tensor]:
    names = ("action", "loc", "scale") if shape.num_actions is None else ("action", "logits")
    results = {name: data[shape.name, name] for name in names}
    return {**results, "next_recurrent_state": data["next", shape.name, "recurrent_state"]} if recurrent else results


def _random_inputs(actor: ProbabilisticActor, shape: GroupSpec, number: int) -> dict[str, Tensor]:
    """Observations, masks with a legal action, memories and episode starts, with a fixed seed."""
    generator = torch.Generator().manual_seed(0)
    rows = (number, shape.num_agents)
    inputs = {}
    if shape.image is None or shape.image_key == "image":
        inputs["observation"] = torch.randn(*rows, shape.observation_size, generator=generator)
    if shape.image is not None:
        inputs[shape.image_key] = torch.randint(256, (*rows, *shape.image), dtype=torch.uint8, generator=generator)
    if shape.masked and shape.num_actions is not None:
        chance = torch.rand(*rows, shape.num_actions, generator=generator)
        inputs["action_mask"] = (chance < 0.5) | (chance == chance.amin(-1, keepdim=True))
    for _, memory in named_parts(actor, Priming):
        spec = cast("Composite", memory.make_tensordict_primer().primers)[shape.name, "recurrent_state"]
        inputs["recurrent_state"] = 2 * torch.rand(number, *spec.shape, generator=generator) - 1
        inputs["is_init"] = torch.rand(number, 1, generator=generator) < 0.5
    return inputs


def _of_agent(tensors: Tensors, agent: int | None) -> Tensors:
    if agent is None:
        return tensors
    return {name: value if name == "is_init" else value[:, agent] for name, value in tensors.items()}


def _compare(actual: Tensors, expected: Tensors) -> tuple[float, int]:
    """Largest difference, relative where values exceed 1, and the number of discrete actions that differ."""
    if {name: value.shape for name, value in actual.items()} != {name: value.shape for name, value in expected.items()}:
        return math.inf, 0
    numbers = [name for name, value in expected.items() if value.is_floating_point()]
    differences = [(actual[name] - expected[name]).abs() / expected[name].abs().clamp(min=1) for name in numbers]
    wrong = [(actual[name] != expected[name]).sum().item() for name in expected if name not in numbers]
    return max(difference.max().item() for difference in differences), int(sum(wrong))


def _describe(recorded: Mapping[str, Any], shape: GroupSpec, agent: int | None, inputs: Tensors) -> dict[str, Any]:
    return {
        **{name: recorded["config"].get(name) for name in ("environment", "env")},
        "frames": recorded["frames"],
        "group": shape.name,
        "agent": agent,
        "inputs": {name: ["B", *value.shape[1:]] for name, value in inputs.items()},
        **{name: getattr(shape, name) for name in ("num_agents", "num_actions", "action_low", "action_high")},
    }


def _write_onnx(program: ExportedProgram, path: Path, metadata: str) -> None:
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)  # reports packages that a policy does not need
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # torch's own
            names = [str(spec) for spec in program.module()(**program.example_inputs[1])]
            converted = torch.onnx.export(program, output_names=names, external_data=False, verbose=False)
    finally:
        logger.setLevel(level)
    converted.model.metadata_props["torchrl_marl"] = metadata
    converted.save(path)


def _run_onnx(path: Path, inputs: Tensors) -> dict[str, Tensor]:
    session = import_extra("onnxruntime", "export").InferenceSession(path, providers=["CPUExecutionProvider"])
    results = session.run(None, {name: value.numpy() for name, value in inputs.items()})
    return {output.name: torch.from_numpy(array) for output, array in zip(session.get_outputs(), results, strict=True)}


class _Format(NamedTuple):
    suffix: str
    packages: tuple[str, ...]
    write: Callable[[ExportedProgram, Path, str], None]
    run: Callable[[Path, Tensors], dict[str, Tensor]]


_FORMATS = {
    "onnx": _Format(".onnx", ("onnx", "onnxscript", "onnxruntime"), _write_onnx, _run_onnx),
    "torch_export": _Format(
        ".pt2",
        (),
        write=lambda program, path, metadata: torch.export.save(program, path, extra_files={"torchrl_marl": metadata}),
        run=lambda path, inputs: torch.export.load(path).module()(**inputs),
    ),
}
