"""Draw a row's arguments on the device that is timed."""

from __future__ import annotations

import zlib
from typing import TYPE_CHECKING, Any

from ..contract import CONTRACTS
from ..contract.inputs import Draw
from ..contract.settings import without_autocast
from ..contract.traffic import Row

if TYPE_CHECKING:
    import torch


def draw(row: Row, device: torch.device) -> dict[str, Any]:
    """The arguments of a row's call on ``device``."""
    import torch

    generator = torch.Generator(device).manual_seed(zlib.crc32(f"{row.op}/{row.name}".encode()))
    with without_autocast():
        return CONTRACTS[row.op].traffic.draw(Draw(generator, device), **row.params)
