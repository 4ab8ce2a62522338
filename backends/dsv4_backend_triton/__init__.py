"""The Triton provider: one code base for compute capability 8.0 and newer.

Plain Triton kernels serve every architecture and shape. Before them come kernels in Gluon, which ships with Triton, for
the shapes that they take: warp-specialised ones on Hopper; ones that place warps by hand on SM8x and SM12x, for
attention and the prenorm GEMM, and on SM80 to SM87, for ``mqa_logits`` and ``fp8_einsum``.
"""

from __future__ import annotations

import os
from collections.abc import Iterable

from dsv4_backends.provider import Implementation, ProviderSpec, Tier, hookimpl

from .configurations import sources
from .variants import OPS, kernels

BATCH_INVARIANT = tuple(name for name, op in OPS.items() if op.batch_invariant)
"""The ops whose kernel, tile and splits do not depend on the batch. The others have a second function for that."""

_CONFIGURATIONS = "configurations measured on compute capability 9.0; elsewhere derived, not run on hardware"


def _implementations() -> Iterable[Implementation]:
    # Triton's interpreter runs kernels on CPU tensors, for tests only, since it is very slow.
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
        summary="Triton kernels for SM80 to SM121; in Gluon for Hopper, and on SM8x and SM12x for some ops",
        tier=Tier.PORTABLE,
        requires=("triton>=3.6",),
        implementations=tuple(_implementations()),
    )
