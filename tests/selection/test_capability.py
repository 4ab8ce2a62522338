from __future__ import annotations

import pytest
from packaging.version import Version

from dsv4_backends import PolicyError
from dsv4_backends.selection.capability import Support, describe, parse_capability, sm, support


@pytest.mark.parametrize(
    ("text", "version"),
    [
        ("sm_80", "8.0"),
        ("sm_86", "8.6"),
        ("SM_90a", "9.0"),
        ("sm_120a", "12.0"),
        ("sm_103f", "10.3"),
        ("sm_88", "8.8"),
        ("sm_123", "12.3"),  # of a GPU to come
        ("13.0", "13.0"),
        ("sm100", "10.0"),
        ("sm_121", "12.1"),
        (" 8.9 ", "8.9"),
    ],
)
def test_parse(text: str, version: str) -> None:
    assert parse_capability(text) == Version(version)
    assert sm(parse_capability(text)) == "sm_" + version.replace(".", "")


@pytest.mark.parametrize(
    "text", ["", "h100", "sm_9", "90", "sm_x0", "8", "8.6.1", "sm_1000", "sm_1234", "sm_٩٣", "٩.٣"]
)
def test_parse_refuses(text: str) -> None:
    with pytest.raises(PolicyError, match=r"expected the form sm_86 or 8\.6, got"):
        parse_capability(text)


@pytest.mark.parametrize(
    ("text", "there_is"),
    [
        ("sm_99", "9.9, only 9.0"),
        ("9.1", "9.1, only 9.0"),
        ("sm_85", "8.5, only 8.0, 8.6, 8.7, 8.8, 8.9"),
        ("0.1", "0.1"),
    ],
)
def test_parse_refuses_what_no_gpu_has(text: str, there_is: str) -> None:
    expected = (
        f"here: expected the form sm_86 or 8.6, got {text!r}: CUDA 12 and 13 have no compute capability {there_is}"
    )
    with pytest.raises(PolicyError) as caught:
        parse_capability(text, "here")
    assert str(caught.value) == expected


@pytest.mark.parametrize(
    ("claim", "capability", "expected"),
    [
        ((">=8.0",), "8.0", Support.SUPPORTED),
        ((">=8.0",), "12.1", Support.SUPPORTED),
        ((">=8.0",), "7.5", Support.UNSUPPORTED),
        (("==9.0",), "9.0", Support.SUPPORTED),
        (("==9.0",), "8.9", Support.UNSUPPORTED),
        (("==9.0",), "10.0", Support.UNSUPPORTED),
        (("==9.0", "==10.0"), "10.0", Support.SUPPORTED),
        (("==9.0", "==10.0"), "10.3", Support.UNTESTED),
        (("==9.0", "==10.3"), "10.0", Support.UNSUPPORTED),
        (("==10.*",), "10.3", Support.SUPPORTED),
        (("==12.0", "==12.1"), "12.0", Support.SUPPORTED),
        ((">=8.0,<9.0",), "8.9", Support.SUPPORTED),
        ((">=8.0,<9.0",), "9.0", Support.UNSUPPORTED),
    ],
)
def test_support(claim: tuple[str, ...], capability: str, expected: Support) -> None:
    assert support(claim, Version(capability)) is expected


def test_ten_is_more_than_nine() -> None:
    # As text, or as major * 10 + minor with a two-digit minor, this goes wrong.
    assert support((">=9.0",), Version("10.0")) is Support.SUPPORTED


def test_describe() -> None:
    assert describe(("==9.0", "==10.*")) == "9.0 or 10.x"
    assert describe((">=8.0",)) == "8.0 and newer"
    assert describe(("==9.0", "==10.0", "==12.0")) == "9.0, 10.0 or 12.0"
