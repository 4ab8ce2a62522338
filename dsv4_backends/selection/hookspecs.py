"""The pluggy hook that returns a plugin's providers (entry-point group ``dsv4_backends``)."""

from __future__ import annotations

from collections.abc import Iterable

import pluggy

from .provider import ProviderSpec

PROJECT = "dsv4_backends"
hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


class Hookspecs:
    """What a plugin may implement."""

    @hookspec
    def dsv4_providers(self) -> Iterable[ProviderSpec]:
        """Return or yield the plugin's providers.

        The hook returns data: it must not import torch, touch a GPU, or probe a library. Example::

            @dsv4_backends.hookimpl
            def dsv4_providers():
                yield ProviderSpec(name="acme", ...)
        """
        return ()
