"""The provider over FlashMLA, any supported build: sparse attention on Hopper and Blackwell."""

from __future__ import annotations

from collections.abc import Iterable

from dsv4_backends.provider import Implementation, ProviderSpec, Tier, hookimpl


@hookimpl
def dsv4_providers() -> Iterable[ProviderSpec]:
    yield ProviderSpec(
        name="flash_mla",
        summary="DeepSeek's FlashMLA, from any of the distributions that carry it",
        tier=Tier.NATIVE,
        probe="dsv4_backend_flash_mla.probe:probe",
        implementations=tuple(
            Implementation(
                op=op,
                target=f"dsv4_backend_flash_mla.{module}:{op}",
                refuses=refuses,
                # The architectures that the adapter supports; the probe narrows them to those of the installed build.
                capability=(">=9.0",),
                note="passed on compute capability 9.0; other architectures not run on hardware",
            )
            for op, module, refuses in (
                ("sparse_mla_prefill", "prefill", None),
                ("sparse_mla_decode", "decode", "dsv4_backend_flash_mla.decode:refuses"),
            )
        ),
    )
