"""A broken plugin is a row with its distribution, version and cause, and does not disturb the others."""

from __future__ import annotations

import json
import re
from collections.abc import Callable

import pytest
from installed import provider

from dsv4_backends import PluginError
from dsv4_backends.commands import cli
from dsv4_backends.selection import plugins


def good(name: str = "acme", api: int = 1) -> str:
    ops = {"mqa_logits": {"target": "json:dumps", "devices": ("cpu", "cuda")}}
    return provider(ops, name=name, tier="PORTABLE", api=api)


def row(name: str) -> plugins.Plugin:
    (found,) = [plugin for plugin in plugins.load().plugins if plugin.name == name]
    return found


def test_in_tree_providers_come_by_entry_point() -> None:
    torch = row("torch")
    assert torch.distribution == "dsv4-backends"
    assert [spec.name for spec in torch.providers] == ["torch"]
    assert not torch.problems


def test_a_good_stranger(fake_plugin: Callable[..., None]) -> None:
    fake_plugin("acme", good(), version="2.3")
    acme = row("acme")
    assert acme.origin == "acme-kernels 2.3"
    assert [spec.name for spec in acme.providers] == ["acme"]
    assert not acme.problems


@pytest.mark.parametrize(
    ("source", "code", "words"),
    [
        (
            "raise ImportError('libacme.so.1 is missing')",
            "plugin-import",
            "ImportError: libacme.so.1 is missing",
        ),
        ("raise SystemExit(3)", "plugin-import", "SystemExit: 3"),
        ("def broken(:", "plugin-import", "SyntaxError"),
        ("x = 1", "plugin-hook", "has no function dsv4_providers"),
        (
            "import dsv4_backends as d\n@d.hookimpl\ndef dsv4_provider(): return []",
            "plugin-hook",
            "unknown hook 'dsv4_provider'",
        ),
        (
            "import dsv4_backends as d\n@d.hookimpl\ndef dsv4_providers(registry): return []",
            "plugin-hook",
            "registry",
        ),
        (
            "import dsv4_backends as d\n@d.hookimpl\ndef dsv4_providers(): return 1 / 0",
            "plugin-failed",
            "ZeroDivisionError: division by zero",
        ),
        (
            "import dsv4_backends as d\n@d.hookimpl\ndef dsv4_providers():\n    yield 1\n    raise OSError('late')",
            "plugin-failed",
            "OSError: late",
        ),
        (
            "import dsv4_backends as d\n@d.hookimpl\ndef dsv4_providers(): return ['acme']",
            "plugin-type",
            "returned str 'acme', expected ProviderSpec",
        ),
        (
            "import dsv4_backends as d\n@d.hookimpl\ndef dsv4_providers(): return d.ProviderSpec(name='Acme')",
            "plugin-failed",
            "TypeError",
        ),
        (good(api=99), "plugin-api", "written for interface 99"),
        (good("torch"), "plugin-duplicate", "dsv4-backends"),
    ],
)
def test_broken(
    fake_plugin: Callable[..., None], capsys: pytest.CaptureFixture[str], source: str, code: str, words: str
) -> None:
    fake_plugin("acme", source, version="0.9")
    acme = row("acme")
    assert [reason.code for reason in acme.problems] == [code]
    assert words in acme.problems[0].message
    assert not acme.providers
    assert row("torch").providers, "the good plugins still serve"

    assert cli.main(["plugins", "--json"]) == 1
    (shown,) = [p for p in json.loads(capsys.readouterr().out)["plugins"] if p["name"] == "acme"]
    assert (shown["distribution"], shown["version"]) == ("acme-kernels", "0.9")
    assert shown["problems"][0]["code"] == code
    assert cli.main(["list"]) == 1
    out = capsys.readouterr().out
    assert "plugin acme of acme-kernels 0.9 is broken" in out
    assert re.search(r"^mqa_logits +torch", out, re.MULTILINE)


def test_one_bad_item_does_not_hide_the_good_one(fake_plugin: Callable[..., None]) -> None:
    source = good().replace("    yield", "    yield 'junk'\n    yield")
    fake_plugin("acme", source)
    assert [reason.code for reason in row("acme").problems] == ["plugin-type"]
    assert [spec.name for spec in row("acme").providers] == ["acme"]


def test_name_of_a_stranger_goes_to_the_first_by_distribution(fake_plugin: Callable[..., None]) -> None:
    fake_plugin("two", good(), dist="b-kernels")
    fake_plugin("one", good(), dist="a-kernels")
    assert row("one").providers
    assert "a-kernels 1.0 provides that name" in row("two").problems[0].message


def test_strict_raises(fake_plugin: Callable[..., None]) -> None:
    fake_plugin("acme", "raise ImportError('no')")
    with pytest.raises(PluginError, match=r"plugin 'acme' of acme-kernels 1\.0: .*ImportError: no"):
        plugins.load(strict=True)


def test_denied_is_not_even_imported(
    fake_plugin: Callable[..., None], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fake_plugin("acme", "raise SystemExit('imported')")
    monkeypatch.setenv("DSV4_BACKENDS_DENY", "acme")
    assert cli.main(["plugins"]) == 0
    assert "denied" in capsys.readouterr().out
    assert cli.main(["list"]) == 0
