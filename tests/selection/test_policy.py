from __future__ import annotations

import pytest

from dsv4_backends import OPS, PolicyError, use_providers
from dsv4_backends.selection import policy


def read(**variables: str) -> policy.Policy:
    return policy.from_environment({f"DSV4_BACKENDS_{key}": value for key, value in variables.items()})


def test_nothing_set() -> None:
    assert read() == policy.Policy()


def test_everything_set() -> None:
    wishes = read(
        ORDER="a, b",
        ALLOW="a,b",
        DENY="c",
        PIN="mqa_logits=a, fp8_einsum = b",
        EXPERIMENTAL="1",
        STRICT="1",
        BATCH_INVARIANT="1",
        CHECK_VALUES="1",
    )
    assert wishes.order == ("a", "b")
    assert wishes.allow == {"a", "b"}
    assert wishes.deny == {"c"}
    assert dict(wishes.pins) == {"mqa_logits": "a", "fp8_einsum": "b"}
    assert wishes.experimental
    assert wishes.strict
    assert wishes.batch_invariant
    assert wishes.check_values


def test_pin_for_every_op() -> None:
    assert dict(read(PIN="*=a").pins) == dict.fromkeys(OPS, "a")
    assert read(PIN="*=a,mqa_logits=b").pins["mqa_logits"] == "b"


def test_empty_values_are_not_set() -> None:
    assert read(ORDER="", ALLOW=" ", DENY=",", PIN="", EXPERIMENTAL="") == policy.Policy()


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        (
            {"PINN": "x"},
            "unknown environment variable 'DSV4_BACKENDS_PINN', did you mean 'DSV4_BACKENDS_PIN'?",
        ),
        ({"PIN": "mqa_logits"}, "expected op=provider pairs, got 'mqa_logits'"),
        ({"PIN": "mqa_logit=torch"}, "DSV4_BACKENDS_PIN: unknown op 'mqa_logit', did you mean 'mqa_logits'?"),
        ({"EXPERIMENTAL": "yes"}, "expected 0 or 1, got 'yes'"),
        ({"DEVICE": "sm_99"}, "DSV4_BACKENDS_DEVICE: expected cpu or a GPU such as sm_86 or 8.6, got 'sm_99'"),
        ({"BATCH_INVARIANT": "true"}, "DSV4_BACKENDS_BATCH_INVARIANT: expected 0 or 1, got 'true'"),
    ],
)
def test_mistakes(variables: dict[str, str], message: str) -> None:
    with pytest.raises(PolicyError) as caught:
        read(**variables)
    assert message in str(caught.value)


KUBERNETES = {
    "DSV4_BACKENDS_SERVICE_HOST": "10.0.0.7",
    "DSV4_BACKENDS_SERVICE_PORT": "80",
    "DSV4_BACKENDS_SERVICE_PORT_HTTP": "80",
    "DSV4_BACKENDS_PORT": "tcp://10.0.0.7:80",
    "DSV4_BACKENDS_PORT_80_TCP": "tcp://10.0.0.7:80",
    "DSV4_BACKENDS_PORT_80_TCP_PROTO": "tcp",
    "DSV4_BACKENDS_PORT_80_TCP_PORT": "80",
    "DSV4_BACKENDS_PORT_80_TCP_ADDR": "10.0.0.7",
    "DSV4_BACKENDS_PORT_53_UDP": "udp://10.0.0.7:53",
    "DSV4_BACKENDS_METRICS_SERVICE_HOST": "10.0.0.7",
    "DSV4_BACKENDS_METRICS_SERVICE_PORT_HTTP": "80",
    "DSV4_BACKENDS_0_PORT": "tcp://1:2",
    "DSV4_BACKENDS_0_PORT_80_SCTP_ADDR": "10.0.0.7",
    "DSV4_BACKENDS_DEVICE_SERVICE_HOST": "1",
    "DSV4_BACKENDS_DEVICE_PORT": "tcp://10.0.0.7:80",
}


def test_a_service_of_kubernetes_is_no_setting() -> None:
    assert policy.from_environment(KUBERNETES) == policy.Policy()
    assert policy.of_a_service(KUBERNETES) == sorted(KUBERNETES)
    assert policy.from_environment(KUBERNETES | {"DSV4_BACKENDS_ORDER": "torch"}).order == ("torch",)
    assert policy.of_a_service(dict.fromkeys(policy.VARIABLES, "tcp://10.0.0.7:80")) == []


@pytest.mark.parametrize("name", ["PORT", "SERVICE", "PORTS", "PORT_80", "SERVICE_HOSTS", "PORT_X_TCP", "DEVICE_PORT"])
def test_only_what_kubernetes_sets(name: str) -> None:
    with pytest.raises(PolicyError, match=f"unknown environment variable 'DSV4_BACKENDS_{name}'"):
        read(**{name: "80"})


@pytest.mark.parametrize("name", ["FOO", "X", "SERVE", "GPU", "BACKEND", ""])
def test_nothing_is_guessed_that_is_not_near(name: str) -> None:
    with pytest.raises(PolicyError) as caught:
        read(**{name: "1"})
    assert "did you mean" not in str(caught.value)


def test_unknown_provider_lists_the_known() -> None:
    with pytest.raises(PolicyError, match=r"unknown provider 'tritn', did you mean 'triton'\? Known: torch, triton"):
        read(ORDER="tritn").validate({"triton", "torch"})


@pytest.mark.parametrize("setting", ["order", "allow", "deny", "pin"])
def test_unknown_provider_names_the_setting(setting: str) -> None:
    value = "mqa_logits=tritn" if setting == "pin" else "torch,tritn"
    with pytest.raises(PolicyError, match=f"^{setting}: unknown provider 'tritn'"):
        read(**{setting.upper(): value}).validate({"triton", "torch"})


def test_torch_cannot_be_denied() -> None:
    with pytest.raises(PolicyError, match="'torch' cannot be denied"):
        read(DENY="torch").validate({"torch"})


def test_use_providers_nests_and_restores() -> None:
    assert policy.active() is None
    with use_providers({"mqa_logits": "torch"}) as outer:
        assert dict(outer.pins) == {"mqa_logits": "torch"}
        with use_providers(order=["torch"]) as inner:
            assert dict(inner.pins) == {"mqa_logits": "torch"}
            assert inner.order == ("torch",)
        assert policy.active() is outer
        with pytest.raises(ZeroDivisionError), use_providers("torch"):
            _ = 1 / 0
        assert policy.active() is outer
    assert policy.active() is None


@pytest.mark.parametrize(
    "call",
    [
        lambda: use_providers({"mqa_logits": "nobody"}),
        lambda: use_providers("nobody"),
        lambda: use_providers({"nothing": "torch"}),
        lambda: use_providers(deny=["torch"]),
        lambda: use_providers(order=["nobody"]),
    ],
)
def test_use_providers_refuses(call: object) -> None:
    assert callable(call)
    with pytest.raises(PolicyError), call():
        pass
    assert policy.active() is None
