"""The Triton provider: one code base for compute capability 8.0 and newer.

Plain Triton kernels serve every architecture. Kernels in Gluon, which ships with Triton, are asked first:
warp-specialised ones on Hopper; ones that place warps by hand for attention and prenorm on SM8x and SM12x. Shapes that
they do not take go to the plain one.
"""

from __future__ import annotations

import os
from collections.abc import Iterable

from dsv4_backends.provider import Implementation, ProviderSpec, Tier, hookimpl

from .configurations import sources
from .variants import OPS, kernels

BATCH_INVARIANT = tuple(name for name, op in OPS.items() if op.batch_invariant)
"""The ops of which no kernel, tile or split follows from the batch. The others have a function more, which is so."""

_CONFIGURATIONS = "configurations measured on compute capability 9.0; elsewhere derived, not run on hardware"


def _implementations() -> Iterable[Implementation]:
    # Triton's interpreter runs kernels on CPU tensors: for tests, far too slow for anything else.
    devices = ("cuda", "cpu") if os.environ.get("TRITON_INTERPRET", "0") == "1" else ("cuda",)
    for mode in (False, True):
        for name, op in OPS.items():
            if mode and op.batch_invariant:
                continue
            home, ahead = ("batch_invariant", "batch_invariant") if mode else (f"{op.folder}.op", "ahead")
            yield Implementation(
                op=name,
                target=f"dsv4_backend_triton.{home}:{name}",
                warmup=f"dsv4_backend_triton.{ahead}:warmup",
                workspace=f"dsv4_backend_triton.{ahead}:workspace",
                notices="dsv4_backend_triton.ahead:notices",
                devices=devices,
                capability=(">=8.0",),
                note=f"kernels: {kernels(name)}; {_CONFIGURATIONS}: {sources(name)}",
                batch_invariant=mode or op.batch_invariant,
                only_batch_invariant=mode,
            )


@hookimpl
def dsv4_providers() -> Iterable[ProviderSpec]:
    yield ProviderSpec(
        name="triton",
        summary="Triton kernels for SM80 to SM121; in Gluon for Hopper, and on SM8x and SM12x for attention, prenorm",
        tier=Tier.PORTABLE,
        requires=("triton>=3.6",),
        implementations=tuple(_implementations()),
    )
