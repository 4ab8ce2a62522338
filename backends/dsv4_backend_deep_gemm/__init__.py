"""The provider over DeepGEMM, any supported release line: the indexer's logits and two GEMMs."""

from __future__ import annotations

from collections.abc import Iterable

from dsv4_backends.provider import Implementation, ProviderSpec, Tier, hookimpl

_HOMES = {
    "mqa_logits": "indexer",
    "paged_mqa_logits": "indexer",
    "fp8_einsum": "projection",
    "hc_prenorm_gemm": "hyper_connection",
}


@hookimpl
def dsv4_providers() -> Iterable[ProviderSpec]:
    yield ProviderSpec(
        name="deep_gemm",
        summary="DeepSeek's DeepGEMM, from any of the distributions that carry it",
        tier=Tier.NATIVE,
        requires=("triton>=3.6",),
        probe="dsv4_backend_deep_gemm.probe:probe",
        implementations=tuple(
            Implementation(
                op=op,
                target=f"dsv4_backend_deep_gemm.{module}:{op}",
                refuses=f"dsv4_backend_deep_gemm.{module}:{op}_refuses",
                # The architectures that the adapter supports; the probe narrows them to those of the installed build.
                capability=(">=9.0",),
                note="passed on compute capability 9.0; other architectures not run on hardware",
            )
            for op, module in _HOMES.items()
        ),
    )
