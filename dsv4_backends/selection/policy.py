"""The user's settings: environment variables and the ``use_providers`` context manager."""

from __future__ import annotations

import contextlib
import difflib
import os
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field, fields, replace
from types import MappingProxyType
from typing import Any

from ..contract import OPS
from ..errors import PolicyError
from . import machine

ESSENTIAL = "torch"
"""The provider that cannot be disabled: it gives every op its meaning, on every machine."""

PREFIX = "DSV4_BACKENDS_"
VARIABLES: Mapping[str, str] = MappingProxyType(
    {
        "DSV4_BACKENDS_ORDER": "providers in the order of preference, before all others: triton,deep_gemm",
        "DSV4_BACKENDS_ALLOW": "only these providers (and torch) may serve: triton",
        "DSV4_BACKENDS_DENY": "these providers may not serve, and plugins of that name are not imported",
        "DSV4_BACKENDS_PIN": "op=provider pairs that must hold or raise: sparse_mla_decode=triton,fp8_einsum=torch; "
        "*=triton pins every op",
        "DSV4_BACKENDS_DEVICE": "choose as if the GPU were this one: sm_86, sm_120, cpu",
        "DSV4_BACKENDS_EXPERIMENTAL": "1: experimental providers take part in the automatic choice",
        "DSV4_BACKENDS_MEASURED": "0: the automatic choice does not depend on measurements by shape",
        "DSV4_BACKENDS_STRICT": "1: a broken plugin raises instead of being listed",
        "DSV4_BACKENDS_BATCH_INVARIANT": "1: implementations whose results for a row do not depend on its batch come "
        "first",
        "DSV4_BACKENDS_CHECK_VALUES": "1: for debugging, every call checks the values of its indices and lengths and "
        "raises if one is out of range; it waits for the device",
        "DSV4_BACKENDS_ENGINE": "1: the engine that starts with this variable runs on these ops; NAME,NAME: only these "
        "engines do; force: as 1, for any version of the engine, untested ones too",
        "DSV4_BACKENDS_ENGINE_OPTIONS": "options of engines' hooks that are off by default: wo_a_bf16,flashmla_sm120",
        "DSV4_BACKENDS_TORCH_DEVICE": "the torch device that the conformance suite runs on: cuda:1",
        "DSV4_BACKENDS_LEVEL": "cases that the conformance suite runs: smoke (without it), default or full",
    }
)
"""The whole family. A variable with the prefix that is not in this table is an error."""

_SERVICE = re.compile(
    PREFIX + r"(\w+_)?(SERVICE_HOST|SERVICE_PORT(_\w+)?|PORT_\d+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?)"
)
_SERVICE_PORT = re.compile(PREFIX + r"(\w+_)?PORT")
_ADDRESS = re.compile(r"(tcp|udp|sctp)://\S+")


@dataclass(frozen=True)
class Policy:
    """The user's settings, all optional.

    Attributes:
        order: Providers preferred in this order before all others.
        allow: Where not None, only these (and ``torch``) take part.
        deny: These do not take part.
        pins: Op name to provider. A pin that cannot be met is an error, never a fallback.
        experimental: Experimental providers take part in the automatic choice.
        measured: Measurements on a call's shapes may change the automatic choice.
        strict: A broken plugin raises.
        batch_invariant: Implementations that claim it serve first: a row's result does not depend on its batch.
        check_values: Every call checks the values of indices and lengths (``contract/values.py``).
    """

    order: tuple[str, ...] = ()
    allow: frozenset[str] | None = None
    deny: frozenset[str] = frozenset()
    pins: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}), hash=False)
    experimental: bool = False
    measured: bool = True
    strict: bool = False
    batch_invariant: bool = False
    check_values: bool = False

    def __reduce__(self) -> tuple[Any, ...]:
        """Another process can be given it: a proxy of a mapping cannot be pickled."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return _policy, (values | {"pins": dict(self.pins)},)

    def validate(self, known: Collection[str]) -> Policy:
        """Check every provider name against ``known`` and return self.

        Raises:
            PolicyError: an unknown provider, with the known ones, or an attempt to disable ``torch``.
        """
        for setting, named in (
            ("order", self.order),
            ("allow", self.allow or ()),
            ("deny", self.deny),
            ("pin", self.pins.values()),
        ):
            known_providers(setting, named, known)
        if ESSENTIAL in self.deny:
            raise PolicyError(f"the provider {ESSENTIAL!r} cannot be denied: it is the reference and the last resort")
        return self


def _policy(values: dict[str, Any]) -> Policy:
    return Policy(**values | {"pins": MappingProxyType(values["pins"])})


def from_environment(environ: Mapping[str, str] | None = None) -> Policy:
    """Read the ``DSV4_BACKENDS_*`` family.

    Raises:
        PolicyError: an unknown variable of the family, a malformed pin, a device that does not exist, or a switch that
            is neither 0 nor 1.
    """
    environ = os.environ if environ is None else environ
    if unknown := sorted({n for n in environ if n.startswith(PREFIX)} - VARIABLES.keys() - set(of_a_service(environ))):
        raise PolicyError(_unknown("environment variable", unknown[0], VARIABLES, len(PREFIX)))

    def names(key: str) -> tuple[str, ...]:
        return tuple(word.strip() for word in environ.get(PREFIX + key, "").split(",") if word.strip())

    engines(environ)
    if device := environ.get(PREFIX + "DEVICE", "").strip():
        machine.simulate(device, PREFIX + "DEVICE")  # a call on the CPU would not ask for it
    pairs: list[tuple[str, str]] = []
    for word in names("PIN"):
        op, equals, provider = (part.strip() for part in word.partition("="))
        if not equals or not op or not provider:
            raise PolicyError(f"{PREFIX}PIN: expected op=provider pairs, got {word!r}")
        if (twice := dict(pairs).get(op)) is not None:
            raise PolicyError(f"{PREFIX}PIN: {op} is pinned twice, to {twice} and to {provider}")
        if op != "*":
            known_op(op, f"{PREFIX}PIN: ")
        pairs.append((op, provider))
    return Policy(
        order=names("ORDER"),
        allow=frozenset(names("ALLOW")) or None,
        deny=frozenset(names("DENY")),
        pins=_pins(sorted(pairs, key=lambda pair: pair[0] != "*")),  # the pin of a named op counts, in any order
        experimental=switch("EXPERIMENTAL", environ),
        measured=switch("MEASURED", environ, default=True),
        strict=switch("STRICT", environ),
        batch_invariant=switch("BATCH_INVARIANT", environ),
        check_values=switch("CHECK_VALUES", environ),
    )


def of_a_service(environ: Mapping[str, str]) -> list[str]:
    """The variables that Kubernetes sets in every pod for services named ``dsv4-backends*``: no settings of ours."""
    return sorted(
        name
        for name, value in environ.items()
        if name not in VARIABLES
        and (_SERVICE.fullmatch(name) or (_SERVICE_PORT.fullmatch(name) and _ADDRESS.fullmatch(value)))
    )


def switch(key: str, environ: Mapping[str, str], *, default: bool = False) -> bool:
    """A variable of the family that is 0 or 1.

    Raises:
        PolicyError: it is something else.
    """
    text = environ.get(PREFIX + key, "").strip() or str(int(default))
    if text not in ("0", "1"):
        raise PolicyError(f"{PREFIX}{key}: expected 0 or 1, got {text!r}")
    return text == "1"


def engines(environ: Mapping[str, str] | None = None, known: Collection[str] | None = None) -> tuple[str, ...]:
    """What ``DSV4_BACKENDS_ENGINE`` asks for: nothing, ``("1",)``, ``("force",)``, or names of engines.

    Args:
        environ: Default: this process's environment.
        known: The engines that there are, for those who act on it; default: any name will do.

    Raises:
        PolicyError: it is something else, or an unknown name.
    """
    text = (os.environ if environ is None else environ).get(PREFIX + "ENGINE", "").strip().lower()
    words = tuple(word.strip() for word in text.split(",") if word.strip())
    if text in ("", "0"):
        return ()
    switches = {"0", "1", "force"} & set(words)
    if not words or (switches and len(words) > 1) or not all(w in switches or w.isidentifier() for w in words):
        raise PolicyError(f"{PREFIX}ENGINE: expected 1, force or names of engines, got {text!r}")
    if known is not None and (unknown := [w for w in words if w not in switches and w not in known]):
        raise PolicyError(f"{PREFIX}ENGINE: {_unknown('engine', unknown[0], {*known, '1', 'force'})}")
    return words


def engine_options(known: Collection[str]) -> frozenset[str]:
    """The words of ``DSV4_BACKENDS_ENGINE_OPTIONS``.

    Args:
        known: Those that there are.

    Raises:
        PolicyError: an unknown word.
    """
    words = [word.strip() for word in os.environ.get(PREFIX + "ENGINE_OPTIONS", "").split(",") if word.strip()]
    if unknown := [word for word in words if word not in known]:
        raise PolicyError(f"{PREFIX}ENGINE_OPTIONS: {_unknown('option', unknown[0], known)}")
    return frozenset(words)


_active: ContextVar[Policy | None] = ContextVar("dsv4_backends_policy", default=None)


active = _active.get
"""The policy of the innermost ``use_providers`` of this context, or None: then the environment decides."""


@contextlib.contextmanager
def use_providers(
    pins: Mapping[str, str] | str | None = None,
    *,
    order: Iterable[str] | None = None,
    allow: Iterable[str] | None = None,
    deny: Iterable[str] | None = None,
    experimental: bool | None = None,
    batch_invariant: bool | None = None,
) -> Iterator[Policy]:
    """Change the choice within a ``with`` block, for the current thread or task.

    Args:
        pins: ``{"sparse_mla_decode": "triton"}``, or one provider's name for every op. Pins add to the outer ones.
        order, allow, deny, experimental, batch_invariant: Replace the outer setting where given.

    Raises:
        PolicyError: an unknown op or provider, with the known ones; or an argument of another kind.

    A block binds its ops again on first use, so keep it around whole models rather than single calls.
    """
    from . import plugins

    base = _active.get() or from_environment()
    if pins is not None and not isinstance(pins, str | Mapping):
        raise PolicyError(f"pins: expected {{op: provider}} or one provider's name, got {pins!r}")
    pairs = [("*", pins)] if isinstance(pins, str) else list((pins or {}).items())
    for op, provider in pairs:
        if not isinstance(provider, str):
            raise PolicyError(f"pins: {op}: expected a provider's name, got {provider!r}")
    for name, switched in (("experimental", experimental), ("batch_invariant", batch_invariant)):
        if switched is not None and not isinstance(switched, bool):
            raise PolicyError(f"{name}: expected True or False, got {switched!r}")
    policy = replace(
        base,
        order=base.order if order is None else names("order", order),
        allow=base.allow if allow is None else frozenset(names("allow", allow)),
        deny=base.deny if deny is None else frozenset(names("deny", deny)),
        pins=_pins([*base.pins.items(), *pairs]),
        experimental=base.experimental if experimental is None else experimental,
        batch_invariant=base.batch_invariant if batch_invariant is None else batch_invariant,
    )
    policy.validate(plugins.load(from_environment().deny, base.strict).names)
    token = _active.set(policy)
    try:
        yield policy
    finally:
        _active.reset(token)


def _pins(pairs: Iterable[tuple[str, str]]) -> Mapping[str, str]:
    pins: dict[str, str] = {}
    for op, provider in pairs:
        if op == "*":
            pins.update(dict.fromkeys(OPS, provider))
        else:
            pins[known_op(op)] = provider
    return MappingProxyType(pins)


def known_providers(setting: str, named: Iterable[str], known: Collection[str]) -> None:
    """Check the providers that a setting or an argument names.

    Raises:
        PolicyError: one is unknown, with those that there are.
    """
    if unknown := sorted(set(named) - set(known)):
        raise PolicyError(f"{setting}: {_unknown('provider', unknown[0], known)}")


def known_op(name: object, where: str = "") -> str:
    """The name of an op, wherever a caller gives one. An error begins with ``where``.

    Raises:
        PolicyError: it is none, with those that there are.
    """
    if not isinstance(name, str) or name not in OPS:
        raise PolicyError(where + _unknown("op", name, OPS))
    return name


def names(argument: str, given: Iterable[str]) -> tuple[str, ...]:
    """The names that a caller gives as a list. A bare string would be taken for a list of its letters.

    Raises:
        PolicyError: it is something else.
    """
    listed = isinstance(given, Iterable) and not isinstance(given, str | bytes | Mapping)
    found = tuple(given) if listed else ()
    if not listed or not all(isinstance(name, str) for name in found):
        raise PolicyError(f"{argument}: expected a list of names, got {given!r}")
    return found


def _unknown(kind: str, name: object, known: Collection[str], common: int = 0) -> str:
    """An error's text, with the nearest known name. The first ``common`` characters, which all share, do not count."""
    near: list[str] = []
    if isinstance(name, str):
        near = difflib.get_close_matches(name[common:], [text[common:] for text in known], n=1, cutoff=0.7)
        near = [name[:common] + text for text in near]
    guess = f", did you mean {near[0]!r}?" if near else "."
    return f"unknown {kind} {name!r}{guess} Known: {', '.join(sorted(known))}"
