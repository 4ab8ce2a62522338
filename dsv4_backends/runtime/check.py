"""The ops that serving a model needs on one rank, and their providers.

No weights and no GPU are needed: the shapes follow from the model's ``config.json``, and a provider that looks at
shapes is asked with tensors that have no storage.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..contract import CONTRACTS
from ..contract.config import Configuration, read
from ..contract.models import Model, Rank
from ..contract.traffic import Deployment, Limits, Need, packed_scales
from ..selection.foreign import shown
from ..selection.machine import Device, Machine
from ..selection.provider import Tier
from ..selection.resolve import Resolution
from ..selection.survey import survey
from . import memory as memories
from .memory import Memory

STEP_TOKENS = 8192
"""Tokens of one step; engines cut longer prompts into chunks of about this size."""


def needs(rank: Rank, limits: Limits, device: Device) -> tuple[Need, ...]:
    """The largest calls of every op that serving makes on one rank.

    Args:
        rank: The model and its tensor parallelism.
        limits: How far the server goes.
        device: Engines pack scales for compute capability 10 and newer.

    A model of layers of one kind asks for that kind only. With ``limits.next_n`` above 1 the speculative layers, which
    see the window only, ask too.
    """
    server = Deployment(rank, limits, packed_scales(device.capability))
    return tuple(need for contract in CONTRACTS.values() for need in contract.traffic.needs(server))


@dataclass(frozen=True)
class Check:
    """Whether a model will run on one device, and who serves each need.

    Attributes:
        rank: The model and its tensor parallelism.
        limits: How far the server goes.
        machine, device: Where.
        served: Each need with the choice for its shapes; without candidates where the contract refuses the call.
        broken: The needs that the contract refuses, with its errors.
        unsupported: Fields of the configuration that the ops are not defined for.
        notes: What was not looked at, and what is assumed.
        memory: What serving takes of a rank's memory; None where the model cannot be served at all.
    """

    rank: Rank
    limits: Limits
    machine: Machine
    device: Device
    served: tuple[tuple[Need, Resolution], ...]
    broken: tuple[tuple[Need, str], ...]
    unsupported: tuple[str, ...]
    notes: tuple[str, ...]
    memory: Memory | None

    @property
    def uncovered(self) -> tuple[Need, ...]:
        return tuple(need for need, resolution in self.served if resolution.selected is None)

    @property
    def slow(self) -> tuple[Need, ...]:
        """What only the reference serves."""
        return tuple(
            need
            for need, resolution in self.served
            if resolution.selected is not None and resolution.selected.provider.tier is Tier.REFERENCE
        )

    @property
    def fits(self) -> bool | None:
        """Whether the device's memory is enough for one sequence of the longest context; None: unknown."""
        return None if self.memory is None else self.memory.fits

    @property
    def ok(self) -> bool:
        """Every call that serving makes has a provider, and nothing says that memory is short."""
        return not self.unsupported and not self.uncovered and self.fits is not False


def check(
    model: str | Path | Mapping[str, Any] | Model,
    *,
    tp: int = 1,
    max_model_len: int | None = None,
    max_num_seqs: int = 256,
    max_num_batched_tokens: int = STEP_TOKENS,
    next_n: int = 1,
    memory: int | None = None,
    device: str | None = None,
) -> list[Check]:
    """Whether a model will run here and who serves each op of one rank, before it is loaded.

    Args:
        model: ``"flash"``, ``"pro"``, a ``config.json`` or its folder, the id of a model in the hub's cache, the
            contents of a ``config.json``, or a ``contract.models.Model``.
        tp: Tensor parallel size.
        max_model_len: Tokens of the longest context; None: the model's.
        max_num_seqs: Sequences of a decode step.
        max_num_batched_tokens: Tokens of one step: an engine's chunk of prefill, or of the indexer's logits if it
            splits them further.
        next_n: Tokens of one sequence in a decode step: more than 1 with speculative decoding.
        memory: Bytes of a GPU's memory; None: what the device has, where it is known.
        device: Judge as if the GPU were this one, such as ``"sm_86"``; None: this machine's devices.

    Where a provider states the workspace of its calls, its function for that is called, which may create a CUDA context
    in this process.

    Returns:
        One ``Check`` for each kind of device; ``Check.ok`` is the verdict.

    Raises:
        ValueError: not a DeepSeek V4 model, it cannot be divided by ``tp``, or a limit is out of range.
        OSError: the configuration cannot be read.
        PolicyError: the settings or the device cannot be understood.
    """
    if not isinstance(model, str | Path | Mapping | Model):
        raise ValueError(f"model: expected flash, pro, a path, or a Model, got {shown(model)}")
    _require_int("tp", tp, most=None)
    if memory is not None:
        _require_int("memory", memory, "an int of bytes", most=2**63 - 1)
    limits_given = {"max-num-seqs": max_num_seqs, "max-num-batched-tokens": max_num_batched_tokens, "next-n": next_n}
    if max_model_len is not None:
        limits_given["max-model-len"] = max_model_len
    for name, value in limits_given.items():
        _require_int(name, value)
    configuration = Configuration(model, model.unsupported) if isinstance(model, Model) else read(model)
    if tp > (heads := configuration.model.heads):
        raise ValueError(f"tp: {heads} attention heads cannot be divided over tensor parallel size {shown(tp)}")
    rank = configuration.model.rank(tp)
    most = rank.model.max_positions
    length = most if max_model_len is None else max_model_len
    if length > most:
        raise ValueError(f"max-model-len: {rank.model.name} has {most} positions, got {length}")
    tokens = max(min(max_num_batched_tokens, length), max_num_seqs * next_n)
    limits = Limits(tokens, max_num_seqs, length, next_n)
    notes = (*_assumed(rank, limits), *configuration.notes)
    found = survey(device)
    checks = []
    for where, choices in found.resolutions:
        by_op = {resolution.op: resolution for resolution in choices}
        served: list[tuple[Need, Resolution]] = []
        broken: list[tuple[Need, str]] = []
        for need in needs(rank, limits, where):
            try:
                CONTRACTS[need.op].check(**need.arguments())
            except Exception as error:  # sizes of which there can be no tensor raise torch's own errors
                broken.append((need, " ".join(str(error).split())))
                served.append((need, replace(by_op[need.op], candidates=())))
            else:
                served.append((need, _judge(need, by_op[need.op])))
        takes = None
        if not configuration.unsupported and not broken:
            takes = _memory(rank, limits, served, where, where.memory if memory is None else memory)
        unsupported = configuration.unsupported
        checks.append(
            Check(rank, limits, found.machine, where, tuple(served), tuple(broken), unsupported, notes, takes)
        )
    return checks


def _require_int(name: str, value: object, what: str = "an int", most: int | None = 2**31 - 1) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise ValueError(f"{name}: expected {what}, got {shown(value)}")
    if value < 1:
        raise ValueError(f"{name}: expected at least 1, got {shown(value)}")
    if most is not None and value > most:
        raise ValueError(f"{name}: expected at most {most}, got {shown(value)}")


def _assumed(rank: Rank, limits: Limits) -> list[str]:
    """Facts that the table does not show."""
    model, notes = rank.model, []
    if rank.replicas > 1:
        heads = f"{rank.heads} head{'s' * (rank.heads != 1)}"
        notes.append(
            f"{model.o_groups} output groups on {rank.tp} ranks: each rank has 1 group and its {heads}, and "
            f"{rank.replicas} ranks have the same (replicated)"
        )
    if model.speculative_layers and limits.next_n == 1:
        layers = f"{model.speculative_layers} speculative (MTP) layer{'s' * (model.speculative_layers != 1)}"
        notes.append(
            f"the model has {layers}, not counted here: with speculative decoding check with "
            f"--next-n {1 + model.speculative_layers}"
        )
    return notes


def _memory(
    rank: Rank, limits: Limits, served: list[tuple[Need, Resolution]], device: Device, available: int
) -> Memory:
    sizes = []
    for need, resolution in served:
        workspace = _workspace(need, resolution, device)
        sizes.append((memories.call(need.op, need.arguments()) + (workspace or 0), workspace is not None, need))
    call, workspace_known, need = max(sizes, key=lambda one: one[0])
    token, sequence, sequences = memories.of_sequences(rank, limits)
    return Memory(
        weights=memories.weights(rank, speculative=limits.next_n > 1),
        call=call,
        call_of=f"{need.op}, {need.role}",
        workspace=workspace_known,
        token=token,
        sequence=sequence,
        sequences=sequences,
        device=available,
    )


def _workspace(need: Need, resolution: Resolution, device: Device) -> int | None:
    """Bytes that the chosen provider allocates beyond the results; None where it cannot state it."""
    import torch

    from ..runtime.bind import load_target

    selected = resolution.selected
    target = None if selected is None else selected.implementation.workspace
    if target is None or device.index is None or not torch.cuda.is_available():
        return None
    try:
        return int(load_target(target)(need.op, need.arguments(), torch.device(device.type, device.index)))
    except KeyboardInterrupt:
        raise
    except BaseException:  # a provider's code: the call itself will say what is wrong
        return None


def _judge(need: Need, resolution: Resolution) -> Resolution:
    """A choice by capability as one for these shapes: in the order of a call, with who refuses them."""
    from ..runtime.bind import ask, deciding_shapes

    contract, made = CONTRACTS[need.op], need.arguments()
    shapes = deciding_shapes(contract, (), made)
    return resolution.serves(shapes, lambda candidate: ask(contract, candidate, made)).resolution
