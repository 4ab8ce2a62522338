"""The choice is a pure function, so the choice for every machine is tested on this one."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from installed import distribution
from packaging.version import Version
from paths import ROOT

from dsv4_backends import Implementation, ProviderSpec, Reason, Tier
from dsv4_backends.selection import requirements
from dsv4_backends.selection.capability import Support, support
from dsv4_backends.selection.machine import CPU, Device, Installed
from dsv4_backends.selection.policy import Policy
from dsv4_backends.selection.resolve import Resolution, resolve

OP = "mqa_logits"
INSTALLED = {"triton": "3.6.0", "torch": "2.13.0", "deep-gemm": "2.5.0.post20260424"}


def gpu(capability: str) -> Device:
    return Device("cuda", 0, "Fake GPU", Version(capability))


def provider(name: str, tier: Tier, *, requires: tuple[str, ...] = (), hint: str = "", **claims: Any) -> ProviderSpec:
    implementation = Implementation(op=OP, target=f"json:{name}", **claims)
    return ProviderSpec(
        name=name, summary="fake", tier=tier, implementations=(implementation,), requires=requires, hint=hint
    )


NATIVE = provider("native", Tier.NATIVE, capability=("==9.0", "==10.0"), requires=("deep-gemm>=2.5",))
PORTABLE = provider("portable", Tier.PORTABLE, capability=(">=8.0",), requires=("triton>=3.6",))
TORCH = provider("torch", Tier.REFERENCE, devices=("cuda", "cpu"))
LAB = provider("lab", Tier.EXPERIMENTAL)
ALL = (TORCH, LAB, PORTABLE, NATIVE)  # not in order of preference


def choose(device: Device, policy: Policy | None = None, providers: tuple[ProviderSpec, ...] = ALL) -> Resolution:
    return resolve(OP, device, INSTALLED, providers, policy or Policy())


def order(resolution: Resolution) -> list[str]:
    return [c.name for c in resolution.candidates]


def codes(resolution: Resolution, name: str) -> list[str]:
    return [r.code for c in resolution.candidates if c.name == name for r in c.reasons]


def selected(resolution: Resolution) -> str | None:
    return None if resolution.selected is None else resolution.selected.name


@pytest.mark.parametrize(
    ("capability", "expected"),
    [
        ("7.5", "torch"),
        ("8.0", "portable"),
        ("8.6", "portable"),
        ("8.9", "portable"),
        ("9.0", "native"),
        ("10.0", "native"),
        ("10.3", "portable"),  # native is untested there: last, not gone
        ("12.0", "portable"),
        ("12.1", "portable"),
    ],
)
def test_by_capability(capability: str, expected: str) -> None:
    assert selected(choose(gpu(capability))) == expected


def test_on_cpu() -> None:
    resolution = choose(CPU)
    assert selected(resolution) == "torch"
    assert codes(resolution, "native") == ["device-type"]
    assert codes(resolution, "portable") == ["device-type"]


def test_reason_has_rule_value_and_no_doubt() -> None:
    reason = choose(gpu("8.6")).passed_over[0].reasons[0]
    assert reason.code == "capability"
    assert reason.message == "needs compute capability 9.0 or 10.0, not 8.6"


def test_untested_comes_last_and_warns() -> None:
    resolution = choose(gpu("10.3"))
    assert order(resolution)[-1] == "native"
    candidate = resolution.candidates[-1]
    assert candidate.accepted
    assert candidate.warning is not None
    assert candidate.warning.code == "untested"
    assert "9.0 or 10.0, this GPU is the newer 10.3" in candidate.warning.message
    # It can still be had, and a user's order is a wish too.
    assert selected(choose(gpu("10.3"), Policy(order=("native",)))) == "native"
    assert selected(choose(gpu("10.3"), Policy(pins={OP: "native"}))) == "native"


def test_order_is_tier_then_priority_then_name() -> None:
    low = provider("aaa", Tier.PORTABLE)
    high = provider("zzz", Tier.PORTABLE, priority=1)
    same = provider("bbb", Tier.PORTABLE)
    assert order(choose(gpu("8.0"), providers=(same, high, TORCH, low))) == ["zzz", "aaa", "bbb", "torch"]


def test_order_comes_before_tier() -> None:
    resolution = choose(gpu("9.0"), Policy(order=("torch", "portable")))
    assert order(resolution)[:3] == ["torch", "portable", "native"]


def test_missing_distribution() -> None:
    needs = provider("needs", Tier.NATIVE, requires=("absent-kernels>=1",))
    resolution = choose(gpu("9.0"), providers=(needs, TORCH))
    reason = resolution.passed_over[0].reasons[0]
    assert (reason.code, reason.hint) == ("distribution-missing", "pip install 'absent-kernels>=1'")


def test_own_hint_wins() -> None:
    needs = provider("needs", Tier.NATIVE, requires=("absent-kernels",), hint="ask for it")
    assert choose(gpu("9.0"), providers=(needs,)).candidates[0].reasons[0].hint == "ask for it"


def test_wrong_version() -> None:
    needs = provider("needs", Tier.NATIVE, requires=("deep-gemm>=2.6",))
    reason = choose(gpu("9.0"), providers=(needs, TORCH)).passed_over[0].reasons[0]
    assert reason.code == "distribution-version"
    assert reason.message == "deep-gemm 2.5.0.post20260424 is installed, needs >=2.6"


def test_requirement_of_another_platform_does_not_count() -> None:
    needs = provider("needs", Tier.NATIVE, requires=("absent; sys_platform == 'nowhere'",))
    assert selected(choose(gpu("9.0"), providers=(needs,))) == "needs"


def test_module_missing() -> None:
    implementation = Implementation(op=OP, target="no_such_package_here.inner:function")
    gone = ProviderSpec(name="gone", summary="", tier=Tier.NATIVE, implementations=(implementation,))
    reason = choose(gpu("9.0"), providers=(gone, TORCH)).passed_over[0].reasons[0]
    assert (reason.code, reason.message) == (
        "module-missing",
        "the package no_such_package_here cannot be found",
    )


def test_experimental_only_when_asked_for() -> None:
    assert codes(choose(gpu("8.0")), "lab") == ["experimental"]
    for policy in (Policy(experimental=True), Policy(order=("lab",)), Policy(pins={OP: "lab"})):
        assert codes(choose(gpu("8.0"), policy), "lab") == []


def test_deny_and_allow() -> None:
    resolution = choose(gpu("9.0"), Policy(deny=frozenset({"native"})))
    assert codes(resolution, "native") == ["denied"]
    assert selected(resolution) == "portable"
    resolution = choose(gpu("9.0"), Policy(allow=frozenset({"portable"})))
    assert codes(resolution, "native") == ["not-allowed"]
    assert selected(resolution) == "portable"
    # torch stays: it cannot be disabled.
    assert "torch" in {c.name for c in resolution.accepted}


def test_pin_removes_all_others() -> None:
    resolution = choose(gpu("9.0"), Policy(pins={OP: "portable"}))
    assert [c.name for c in resolution.accepted] == ["portable"]
    assert codes(resolution, "native") == ["not-pinned"]


def test_pin_that_cannot_be_met_falls_back_to_nobody() -> None:
    resolution = choose(gpu("8.6"), Policy(pins={OP: "native"}))
    assert resolution.selected is None
    text = resolution.explain()
    assert "pinned to native" in text
    assert "native: needs compute capability 9.0 or 10.0, not 8.6" in text
    assert "torch: the op is pinned to native" in text


def test_all_reasons_are_given_at_once() -> None:
    policy = Policy(deny=frozenset({"native"}))
    assert codes(choose(gpu("8.6"), policy), "native") == ["denied", "capability"]


def test_upgrading_a_library_changes_the_choice() -> None:
    old = provider("native", Tier.NATIVE, capability=("==9.0",))
    new = provider("native", Tier.NATIVE, capability=("==9.0", "==12.0"))
    assert selected(choose(gpu("12.0"), providers=(old, PORTABLE))) == "portable"
    assert selected(choose(gpu("12.0"), providers=(new, PORTABLE))) == "native"


def test_nobody() -> None:
    resolution = choose(gpu("9.0"), providers=())
    assert resolution.selected is None
    assert "no installed provider implements it" in resolution.explain()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Implementation(op="x", target="nothing"), "target must be 'package.module:function'"),
        (lambda: Implementation(op="x", target="a:b", capability=">=8.0"), "capability must be a tuple"),  # type: ignore[arg-type]
        (lambda: Implementation(op="x", target="a:b", capability=("eight",)), "eight"),
        (lambda: Implementation(op="x", target="a:b", devices=("tpu",)), "devices must be"),
        (lambda: Implementation(op="X y", target="a:b"), "op must be"),
        (lambda: ProviderSpec(name="A-b", summary="", tier=Tier.NATIVE, implementations=()), "name must be"),
        (lambda: ProviderSpec(name="a", summary="", tier=0, implementations=()), "tier must be"),  # type: ignore[arg-type]
        (lambda: provider("a", Tier.NATIVE, requires="triton"), "requires must be"),  # type: ignore[arg-type]
        (lambda: provider("a", Tier.NATIVE, requires=("!!",)), "!!"),
    ],
)
def test_bad_claims_are_refused_when_made(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


# ------------------------------------------------------------------------------------- every reason is true

NAMES = st.sampled_from(["native", "portable", "torch", "lab"])
SOME = st.frozensets(NAMES, max_size=3)
POLICIES = st.builds(
    lambda pin, order, allow, deny, experimental: Policy(
        order=tuple(order),
        allow=allow,
        deny=deny - {"torch"},
        pins={} if pin is None else {OP: pin},
        experimental=experimental,
    ),
    st.none() | NAMES,
    st.lists(NAMES, max_size=3, unique=True),
    st.none() | SOME,
    SOME,
    st.booleans(),
)
DEVICES = st.sampled_from([CPU, gpu("7.5"), gpu("8.6"), gpu("9.0"), gpu("10.3")])
LAPTOP = {"torch": "2.13.0"}


@given(POLICIES, DEVICES, st.sampled_from([INSTALLED, LAPTOP]), st.frozensets(NAMES, max_size=2))
def test_every_reason_is_true(policy: Policy, device: Device, installed: dict[str, str], gone: frozenset[str]) -> None:
    """In every combination of settings, devices, packages and denied plugins."""
    plugins = {name: (Reason("denied", "denied by DSV4_BACKENDS_DENY; it was not imported"),) for name in gone}
    present = tuple(spec for spec in ALL if spec.name not in gone)
    resolution = resolve(OP, device, installed, present, policy, absent=plugins)
    pinned = policy.pins.get(OP)
    for candidate in resolution.candidates:
        name, found = candidate.name, {reason.code: str(reason) for reason in candidate.reasons}
        (claim,) = candidate.provider.implementations
        asked = name == pinned or name in policy.order or name in (policy.allow or ())
        runs = device.type in claim.devices
        here = device.capability is None or support(claim.capability, device.capability) is not Support.UNSUPPORTED
        lacks = [text for text in candidate.provider.requires if text.partition(">")[0] not in installed]
        assert found.keys() == {
            code
            for code, holds in {
                "not-pinned": pinned is not None and name != pinned,
                "denied": name in policy.deny,
                "not-allowed": policy.allow is not None and name not in policy.allow and name != "torch",
                "experimental": name == "lab" and not policy.experimental and not asked,
                "device-type": not runs,
                "capability": runs and not here,
                "distribution-missing": runs and here and bool(lacks),  # to install it would change something
            }.items()
            if holds
        }
        if "not-pinned" in found:
            assert found["not-pinned"] == f"the op is pinned to {pinned}"
        if "not-allowed" in found:
            words = found["not-allowed"].removeprefix("the user's settings allow only ").split(", ")
            assert set(words) == {*(policy.allow or ()), "torch"}
    served = resolution.serves()
    assert served.by == ("" if served.candidate is None else resolution.origin_of(served.candidate))
    assert (served.by == "pin") == (pinned is not None and served.candidate is not None)
    assert all(not c.accepted for c in served.passed_over)
    text = resolution.explain()
    for name in gone:
        assert f"plugin {name}: denied by DSV4_BACKENDS_DENY; it was not imported" in text
    if pinned is None:
        assert resolution.pin_text == ""
    elif pinned in gone:
        assert "whose plugin gives no provider: denied by DSV4_BACKENDS_DENY" in resolution.pin_text
    else:
        assert resolution.pin_text == f"pinned to {pinned}, so no other provider may serve it"


def test_a_pin_to_what_is_denied_does_not_say_that_it_lacks_the_op() -> None:
    resolution = choose(gpu("9.0"), Policy(pins={OP: "portable"}, deny=frozenset({"portable"})))
    assert "which does not implement it" not in resolution.explain()
    assert codes(resolution, "portable") == ["denied"]
    assert "which does not implement it" in choose(gpu("9.0"), Policy(pins={OP: "acme"})).explain()


def test_what_would_change_nothing_is_not_to_be_installed() -> None:
    for device in (CPU, gpu("7.5")):
        found = resolve(OP, device, LAPTOP, ALL, Policy(), findable=lambda _: True)
        assert "install" not in found.explain()
    assert "install" in resolve(OP, gpu("8.0"), LAPTOP, ALL, Policy(), findable=lambda _: True).explain()


# --------------------------------------------------------------------------------------------- requirements


@pytest.mark.parametrize(
    ("version", "met"),
    [
        ("3.6.0", True),
        ("3.6.0rc1", True),
        ("3.6.0.dev20260101+git1234", True),
        ("3.6.0+fb", True),
        ("3.6.0-vendor-build_7", True),  # not PEP 440: what it begins with counts
        ("v3.7-nightly", True),
        ("3.5.1", False),
        ("3.5.0-vendor-build_7", False),
        ("4.0.0rc1", False),  # what it leads to is out of the range
        ("unknown", False),
    ],
)
def test_versions_that_meet_a_requirement(version: str, met: bool) -> None:
    reason = requirements.unmet("triton>=3.6,<4", {"triton": version})
    assert (reason is None) == met
    if reason is not None:
        assert reason.code == "distribution-version"
        assert version in reason.message
        assert reason.hint == "pip install -U 'triton>=3.6,<4'"


@pytest.mark.parametrize("owner", ["triton", "pytorch-triton", "triton-windows", "fbtriton", "triton-nightly"])
@pytest.mark.parametrize("literal", [True, False])
def test_triton_under_another_name(owner: str, literal: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The module that would be imported is asked, without importing it; if it does not say, whoever owns it."""
    text = '"""isort:skip_file"""\n__version__ = \'3.6.0rc1\'\n' if literal else ""
    files = {"triton/__init__.py": text + "raise RuntimeError('imported')\n"}
    distribution(tmp_path, owner, "3.6.0rc1", files=files, metadata={"top_level.txt": "triton\n"})
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in [name for name in sys.modules if name.partition(".")[0] == "triton"]:
        monkeypatch.delitem(sys.modules, name)
    paths = [str(tmp_path), *(p for p in sys.path if not list(Path(p or ".").glob("triton-*.dist-info")))]
    if owner != "triton":
        monkeypatch.setattr(sys, "path", paths)
    assert Installed().get("triton") == "3.6.0rc1"
    assert requirements.unmet("triton>=3.6", Installed()) is None
    assert "triton" not in sys.modules


def test_the_files_that_an_import_finds_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two distributions own the module, and the older one's files are there."""
    distribution(tmp_path, "acme-kernels", "2.0", files={"acme_kernels/__init__.py": "__version__: str = '1.0'\n"})
    monkeypatch.syspath_prepend(str(tmp_path))
    reason = requirements.unmet("acme-kernels>=2", Installed())
    assert reason is not None
    assert reason.message == "acme-kernels 1.0 is installed, needs >=2"


def test_no_hint_names_what_is_on_no_registry() -> None:
    """Whoever takes the name there would be installed."""
    sources = [*ROOT.glob("dsv4_backends/**/*.py"), *ROOT.glob("backends/**/*.py"), ROOT / "README.md"]
    assert len(sources) > 50
    for path in (*sources, *ROOT.glob("docs/**/*.md")):
        for line in path.read_text(encoding="utf-8").splitlines():
            assert not re.search(r"pip install [^.]*\bdsv4-backends", line), f"{path.name}: {line}"
