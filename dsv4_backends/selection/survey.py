"""The provider of every op on each kind of device of a machine, chosen once for all commands."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from ..contract import OPS
from ..errors import PolicyError
from . import builds, machine, plugins, policy, preferences
from .builds import Builds
from .machine import Device, Machine
from .plugins import Plugins
from .policy import Policy
from .provider import ProviderSpec, Reason
from .resolve import Resolution, resolve


@dataclass(frozen=True)
class Survey:
    """The choice for every op on each kind of device, and what it was made from.

    Attributes:
        machine: This machine, or a simulated one.
        plugins: All plugins, the broken ones too.
        resolutions: For each kind of device, a resolution of every op.
    """

    machine: Machine
    plugins: Plugins
    resolutions: tuple[tuple[Device, tuple[Resolution, ...]], ...]

    @property
    def uncovered(self) -> list[str]:
        """The ops that no provider serves."""
        return [r.op for _, resolutions in self.resolutions for r in resolutions if r.serves().candidate is None]


def survey(device: str | None = None, problem: list[PolicyError] | None = None, *, load: bool = True) -> Survey:
    """Make the choice for every op.

    Args:
        device: Choose as if the GPU were this one; None: this machine's devices.
        problem: Settings that cannot be understood are put there and left out. None: they raise.
        load: Native libraries are imported in a child process. Otherwise their metadata and files decide.

    Raises:
        PolicyError: the settings or the device cannot be understood.
    """
    here = machine.simulate(device) if device is not None else machine.probe()
    try:
        user_policy = policy.from_environment()
        loaded = plugins.load(user_policy.deny, user_policy.strict)
        user_policy.validate(loaded.names)
    except PolicyError as error:
        if problem is None:
            raise
        problem.append(error)
        user_policy = policy.Policy()
        loaded = plugins.load()
    ask = builds.load_apart if load else None

    def chosen(op: str, where: Device) -> Resolution:
        return choose(op, where, here.installed, loaded.providers, user_policy, ask, loaded.absent)

    return Survey(
        here,
        loaded,
        tuple((where, tuple(chosen(op, where) for op in OPS)) for where in here.devices),
    )


def choose(
    op: str,
    device: Device,
    installed: Mapping[str, str],
    providers: Iterable[ProviderSpec],
    user_policy: Policy,
    ask: Callable[[ProviderSpec], Builds] | None = None,
    absent: Mapping[str, tuple[Reason, ...]] | None = None,
) -> Resolution:
    """``resolve`` with what probes find out and what was measured on the architecture.

    Args:
        ask: ``builds.load`` or ``builds.load_apart``, for every provider that nothing cheaper refuses; None: import no
            library.
        absent: The plugins that gave no provider, with the reasons.
    """
    providers = tuple(providers)
    found = {provider.name: builds.look(provider) for provider in providers if provider.probe}
    known = preferences.preferences(device)
    resolution = resolve(op, device, installed, providers, user_policy, builds=found, preferences=known, absent=absent)
    if ask is None:
        return resolution
    asked = {c.name: ask(c.provider) for c in resolution.accepted if c.provider.probe}
    if not asked:
        return resolution
    return resolve(
        op, device, installed, providers, user_policy, builds=found | asked, preferences=known, absent=absent
    )
