"""Rules of the receiver: signatures, templates, forms, places, rates."""

from __future__ import annotations

import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from standardwebhooks import Webhook

from holdfast.core.errors import SpecError
from holdfast.deployments.webhook.bodies import parse
from holdfast.deployments.webhook.cloud import cloud_of
from holdfast.deployments.webhook.config import Hook, Root, WebhookConfig
from holdfast.deployments.webhook.limiting import RateLimit, client_name
from holdfast.deployments.webhook.places import candidates, parts_below, spec_below
from holdfast.deployments.webhook.problems import Problem
from holdfast.deployments.webhook.requests import Form, Wanted
from holdfast.deployments.webhook.signatures import Proof, key_of, proof_in, sign, verified
from holdfast.deployments.webhook.templates import Template

SECRET = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"
NOW = 1_700_000_000


# Signatures


def proven(
    headers: dict[str, str], body: bytes, scheme: str = "standard", now: float = NOW, secrets: tuple[str, ...] = (SECRET,)
) -> Any:
    proof = proof_in(scheme, [(key.lower().encode(), value.encode()) for key, value in headers.items()])
    keys = [key_of(scheme, secret, "test") for secret in secrets]
    return verified(scheme, keys, proof, body, hook="h", now=now, tolerance=300)


def test_what_githubs_documentation_signs() -> None:
    digest = "sha256=757107ea0eb2509fc211221cce984b8a37570b6d7586c22c46f4379c8b043e17"
    headers = {"X-Hub-Signature-256": digest, "X-GitHub-Delivery": "72d3162e"}
    found = proven(headers, b"Hello, World!", "github", secrets=("It's a Secret to Everybody",))
    assert found.id == "72d3162e"
    assert found.signed == found.digest


def test_the_same_as_the_library_of_standard_webhooks() -> None:
    body = '{"test": 2432232314}'
    now = datetime.now(UTC).replace(microsecond=0)
    theirs = Webhook(SECRET).sign("msg_1", now, body)
    ours = sign("standard", key_of("standard", SECRET, "test"), body.encode(), id="msg_1", timestamp=int(now.timestamp()))
    assert ours["webhook-signature"] == theirs
    assert Webhook(SECRET).verify(body, ours) == {"test": 2432232314}
    assert proven(ours, body.encode(), now=time.time()).signed is None


@given(place=st.integers(0, 200), letter=st.sampled_from("Aa0=, "))
def test_no_changed_signature_is_taken(place: int, letter: str) -> None:
    headers = sign("standard", key_of("standard", SECRET, "test"), b"{}", id="msg_1", timestamp=NOW)
    signature = headers["webhook-signature"]
    changed = signature[: place % len(signature)] + letter + signature[place % len(signature) + 1 :]
    if changed in (signature, signature.rstrip()):
        return
    with pytest.raises(Problem) as caught:
        proven({**headers, "webhook-signature": changed}, b"{}")
    assert caught.value.status == 401


@pytest.mark.parametrize(("late", "words"), [(301, "too old"), (-301, "too far in the future"), (300, None), (-300, None)])
def test_timestamps_count_within_their_window(late: int, words: str | None) -> None:
    headers = sign("standard", key_of("standard", SECRET, "test"), b"{}", id="msg_1", timestamp=NOW)
    if words is None:
        assert proven(headers, b"{}", now=NOW + late).id == "msg_1"
        return
    with pytest.raises(Problem, match=words):
        proven(headers, b"{}", now=NOW + late)


def test_one_of_several_signatures_and_keys_is_enough() -> None:
    other = "whsec_c2Vjb25kIHNlY3JldCBvZiB0aGUgc2VuZGVyISEhISE="
    headers = sign("standard", key_of("standard", other, "test"), b"{}", id="msg_1", timestamp=NOW)
    headers["webhook-signature"] = f"v1a,xyz v1,AAAA {headers['webhook-signature']}"
    assert proven(headers, b"{}", secrets=(SECRET, other)).id == "msg_1"
    with pytest.raises(Problem):
        proven(headers, b"{}", secrets=(SECRET,))


def test_a_header_that_is_sent_twice_is_refused() -> None:
    with pytest.raises(Problem, match="sent 2 times"):
        proof_in("standard", [(b"webhook-id", b"a"), (b"webhook-id", b"a")])
    assert proof_in("github", []) == Proof(id=None, signature=None)


# Templates


def told(text: str, body: Any) -> str:
    return Template(text, "here").text({"body": body, "event": "push", "hook": "h"})


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{{ body.a.b }}", "x"),
        ("{{ body['a']['b'] | upper }}", "X"),
        ("{{ body.list[1] }}", "2"),
        ("{{ body.name[4:] }}", "digits"),
        ("{{ body.none | default('d') }}", "d"),
        ("{% if body.a.b == 'x' %}yes{% else %}no{% endif %}", "yes"),
        ("{{ event }}-{{ hook }}", "push-h"),
        ("{{ body.items }}", "9"),
    ],
)
def test_a_template_reads_the_body(text: str, expected: str) -> None:
    body = {"a": {"b": "x"}, "list": [1, 2], "name": "exp/digits", "items": 9}
    assert told(text, body) == expected


@pytest.mark.parametrize(
    "text",
    [
        "{{ body.__class__ }}",
        "{{ body['__class__'] }}",
        "{{ body.a.upper() }}",
        "{{ body | attr('x') }}",
        "{{ body | map(attribute='x') }}",
        "{{ range(10) }}",
        "{{ cycler }}",
        "{{ self }}",
        "{{ lipsum.__globals__ }}",
        "{{ 'a' * 1000000000 }}",
        "{{ 10 ** 1000000 }}",
        "{{ 'x'.join(body) }}",
        "{{ body.a | replace('', body.a) }}",
        "{{ '%1000000000d' | format(1) }}",
        "{{ 'a' | center(1000000000) }}",
        "{% for x in body %}{{ x }}{% endfor %}",
        "{% set x = 1 %}{{ x }}",
        "{% macro m() %}{% endmacro %}",
        "{% include '/etc/passwd' %}",
        "{% import 'os' as os %}",
        "{% extends 'x' %}",
        "{{ " + "(" * 2000 + "1" + ")" * 2000 + " }}",
        "{{ body",
        "x" * 5000,
    ],
)
def test_what_a_template_may_not_do_is_refused_when_it_is_read(text: str) -> None:
    with pytest.raises(SpecError, match=r"^here"):
        Template(text, "here")


@pytest.mark.parametrize(
    ("text", "body"),
    [
        ("{{ body.missing }}", {}),
        ("{{ body.a.b.c }}", {"a": 1}),
        ("{{ body.upper }}", "text"),
        ("{{ body.a }}", {"a": "x" * 5000}),
        ("{{ body.a > 1 }}", {"a": "x"}),
        ("{{ body[body.a] }}", {"a": "__class__"}),
        ("{{ body.a ~ body.a ~ body.a }}", {"a": "x" * 2000}),
    ],
)
def test_a_body_that_does_not_fit_is_a_problem(text: str, body: Any) -> None:
    with pytest.raises(Problem) as caught:
        told(text, body)
    assert caught.value.status == 422
    assert "x" * 100 not in caught.value.detail


# Forms


def form(**changes: Any) -> Form:
    hook = Hook.model_validate({"signature": "standard", "secrets": {"env": "A"}, **changes})
    return Form(hook, {key: Template(text, key) for key, text in hook.templates()})


def wanted(body: Any, **changes: Any) -> Wanted:
    return form(**changes).wanted({"body": body, "event": "", "hook": "h"})


def test_the_native_form_is_the_flows_own_words() -> None:
    body = {"experiment": "e", "policy": {"errored": "restart"}, "new_trials": False, "changes": {"search.num_trials": 3.0}}
    found = wanted(body, allow={"changes": {"search.num_trials": 10}})
    assert found.name == "e"
    assert found.flags == {"policy": {"errored": "restart"}, "new_trials": False, "changes": {"search.num_trials": 3}}


def test_defaults_stand_unless_the_delivery_says_otherwise() -> None:
    defaults = {"resume_errored": True, "new_trials": False}
    assert wanted({"experiment": "e"}, defaults=defaults).flags == defaults
    assert wanted({"experiment": "e", "resume_errored": False}, defaults=defaults).flags["resume_errored"] is False
    assert wanted({"experiment": "e", "policy": {"errored": "skip"}}, defaults=defaults).flags == {
        "policy": {"errored": "skip"},
        "new_trials": False,
    }
    assert wanted({}, defaults={"experiment": "always"}).name == "always"


def test_templates_make_what_a_person_could_have_written() -> None:
    parameters = {"experiment": "{{ body.n }}", "restart_errored": "{{ body.r }}", "changes.search.num_trials": "{{ body.t }}"}
    allow = {"changes": {"search.num_trials": 10}}
    found = wanted({"n": "e", "r": True, "t": 5}, parameters=parameters, allow=allow)
    assert (found.name, found.flags) == ("e", {"restart_errored": True, "changes": {"search.num_trials": 5}})
    for bad in ({"n": "", "r": True, "t": 5}, {"n": "e", "r": "perhaps", "t": 5}, {"n": "e", "r": True, "t": 11}):
        with pytest.raises(Problem) as caught:
            wanted(bad, parameters=parameters, allow=allow)
        assert caught.value.status == 422


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers(-5, 99) | st.text(max_size=5),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(
                st.sampled_from(["experiment", "trainable", "path", "force", "changes", "database", "policy"]), inner
            )
        ),
        max_leaves=8,
    )
)
def test_nothing_but_what_is_listed_passes(body: Any) -> None:
    try:
        found = wanted(body)
    except Problem:
        return  # every one is a 422: the form knows no other
    assert set(found.flags) <= {"resume_unfinished", "resume_errored", "restart_errored", "policy", "new_trials"}


# Places


@given(st.lists(st.sampled_from(["..", ".", "", "a", "b", "~", "\0", "link", "x:y"]), min_size=1, max_size=5).map("/".join))
def test_a_name_stays_below_its_root(name: str) -> None:
    for root in ("/srv/runs", "s3://bucket/lab"):
        parts = parts_below(name, root)
        assert parts is None or (".." not in parts and "" not in parts and "." not in parts)


def test_places(tmp_path: Path) -> None:
    roots = (Root(location=str(tmp_path)), Root(location="s3://b/p"))
    assert [place for _, place in candidates("team/digits", roots)] == [f"{tmp_path}/team/digits", "s3://b/p/team/digits"]
    assert [place for _, place in candidates("s3://b/p/digits", roots)] == ["s3://b/p/digits"]
    assert [place for _, place in candidates(f"{tmp_path}/digits", roots)] == [f"{tmp_path}/digits"]
    for bad in ("s3://b/private", "s3://b/p/../q", "s3://b/p/x?versionId=1", "s3://b/p/x::file:///etc", "/etc", "a\u202eb", ""):
        assert candidates(bad, roots) == []


def test_specs(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").touch()
    (tmp_path / "a.py").touch()
    assert spec_below("a.yaml", (str(tmp_path),)) == str(tmp_path / "a.yaml")
    assert spec_below("block:nightly", (str(tmp_path), "block:nightly")) == "block:nightly"
    assert spec_below("block:other", ("block:*",)) == "block:other"
    for bad in ("a.py", "b.yaml", "../a.yaml", "block:nightly", "block:../x"):
        assert spec_below(bad, (str(tmp_path),)) is None
    assert spec_below("block:a/b", ("block:*",)) is None


# Rates, bodies, Cloud


def test_a_rate_is_held_by_each_name_in_bounded_memory() -> None:
    now = [0.0]
    limit = RateLimit(2, 10.0, most=3, clock=lambda: now[0])
    assert [limit.take("a") for _ in range(3)] == [0.0, 0.0, 5.0]
    assert limit.take("b") == 0.0
    now[0] = 5.0
    assert [limit.take("a"), limit.take("a")] == [0.0, 5.0]
    for name in "cdefgh":
        limit.take(name)
    assert len(limit) == 3


def test_clients() -> None:
    assert client_name("2001:db8::1") == client_name("2001:db8::ffff:1") != client_name("2001:db8:0:1::1")
    assert client_name("::ffff:10.0.0.1") == client_name("10.0.0.1") == "10.0.0.1"
    assert client_name("evil\nline") == client_name(None) == "unknown"


def test_depth() -> None:
    assert parse(b'[[{"a": 1}]]', 3) == [[{"a": 1}]]
    with pytest.raises(Problem, match="more than 2 levels"):
        parse(b'[[{"a": 1}]]', 2)


def test_clouds_template_and_automation_do_the_same() -> None:
    """As Cloud renders them: what leads out of the root is not in the name."""
    import json

    from jinja2 import Environment

    hook = {
        "signature": "github",
        "secrets": {"env": "A"},
        "when": "{{ event == 'push' and body.ok }}",
        "parameters": {"experiment": "{{ body.name }}", "resume_errored": "true"},
    }
    found = cloud_of(WebhookConfig.model_validate({"roots": ["/srv/runs"], "hooks": {"gh": hook}}), "gh")["gh"]

    def event(**body: Any) -> Any:
        values = {"body": body, "headers": {"x-github-event": "push"}}
        return json.loads(Environment().from_string(found["webhook_template"]).render(**values))

    good = event(ok=True, name='../../etc/"x')
    assert good["event"] == found["automation"]["trigger"]["expect"][0] == "holdfast.webhook.gh"
    assert good["payload"] == {"experiment": '....etc"x', "resume_errored": True}
    assert event(ok=False, name="x")["event"] == "holdfast.webhook.gh.ignored"
    (action,) = found["automation"]["actions"]
    template = action["parameters"]["path"]["value"]["template"]
    rendered = Environment().from_string(template).render(event={"payload": {"experiment": "digits"}})
    assert json.loads(rendered) == "/srv/runs/digits"
