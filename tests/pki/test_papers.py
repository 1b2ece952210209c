"""Invitation, request and grant as files: nobody on their way changes a bit of them, or makes one of another kind."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import rfc8785
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st

from fedtune.errors import EnrolmentError, FedtuneError
from fedtune.journal.chain import public_hex
from fedtune.pki.authority import Authority
from fedtune.pki.certificates import pem
from fedtune.pki.documents import MOST_BYTES, Document, read, write
from fedtune.pki.grants import Grant, read_grant
from fedtune.pki.invitations import Invitation, read_invitation
from fedtune.pki.keys import new_tls_key
from fedtune.pki.requests import Request, check_request, read_request
from tests.support.enrolments import HOSTS, START, Coordinator, Site

REFUSALS = {"enrolment.malformed", "enrolment.forged", "enrolment.unknown-version", "enrolment.bad-lineage"}


@dataclass(frozen=True, slots=True)
class Paper:
    """A good file, how it is read, and the signing key behind it."""

    raw: bytes
    model: type[Document]
    read: Callable[[bytes], object]

    @property
    def content(self) -> Any:
        return json.loads(self.raw)


@pytest.fixture(scope="module")
def papers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Paper]:
    folder = tmp_path_factory.mktemp("papers")
    coordinator = Coordinator(folder / "coordinator")
    site = Site.make(folder / "site", "hospital-a", coordinator.now)
    site.rotate()
    invitation = coordinator.invite("hospital-a")
    request = site.answer(invitation)
    grant, key = coordinator.approve(request), public_hex(coordinator.key)
    return {
        "invitation": Paper(invitation, Invitation, lambda raw: read_invitation(raw, START)),
        "request": Paper(request, Request, read_and_check),
        "grant": Paper(grant, Grant, lambda raw: read_grant(raw, key)),
    }


def read_and_check(raw: bytes) -> object:
    request, lineage = read_request(raw)
    return check_request(request, lineage)


KINDS = ["invitation", "request", "grant"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_paper_is_canonical_json_and_is_read(papers: dict[str, Paper], kind: str) -> None:
    paper = papers[kind]
    assert rfc8785.dumps(paper.content) + b"\n" == paper.raw
    assert paper.read(paper.raw)


@pytest.mark.parametrize("kind", KINDS)
def test_a_bit_flipped_in_any_byte_is_refused(papers: dict[str, Paper], kind: str) -> None:
    paper, generator = papers[kind], random.Random(5)
    for place in range(len(paper.raw)):
        changed = bytearray(paper.raw)
        changed[place] ^= 1 << generator.randrange(8)
        with pytest.raises(FedtuneError) as refused:
            paper.read(bytes(changed))
        assert refused.value.code in REFUSALS


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
def test_bytes_taken_out_put_in_moved_or_repeated_are_refused(
    papers: dict[str, Paper], kind: str, data: st.DataObject
) -> None:
    raw = papers[kind].raw
    first, second = sorted(data.draw(st.tuples(*[st.integers(0, len(raw))] * 2)))
    inserted = data.draw(st.binary(max_size=8) | st.sampled_from([b"\n", b" ", b"\t", b"{}", raw[first:second] * 2]))
    changed = raw[:first] + inserted + raw[second:]
    if changed != raw:
        with pytest.raises(FedtuneError):
            papers[kind].read(changed)


@pytest.mark.parametrize("kind", KINDS)
def test_another_spelling_of_the_same_content_is_refused(papers: dict[str, Paper], kind: str) -> None:
    paper = papers[kind]
    spellings = [
        json.dumps(paper.content).encode() + b"\n",
        paper.raw[:-1],
        paper.raw + b"\n",
        b"\xef\xbb\xbf" + paper.raw,
        paper.raw[:-1] + b"\r\n",
        paper.raw.replace(b"/", b"\\/", 1),
        paper.raw.replace(b'"version":1', b'"version":1.0'),
    ]
    for spelling in spellings:
        with pytest.raises(EnrolmentError) as refused:
            paper.read(spelling)
        assert refused.value.code == "enrolment.malformed"


@pytest.mark.parametrize("kind", KINDS)
def test_a_signature_has_one_spelling(papers: dict[str, Paper], kind: str) -> None:
    paper = papers[kind]
    good = paper.content["signature"]
    for spelled in (
        good.upper(),
        f" {good}",
        f"{good} ",
        f"{good[:2]} {good[2:]}",
        f"0x{good}",
        good[:-2],
        good + "00",
        7,
    ):
        with pytest.raises(EnrolmentError) as refused:
            paper.read(rfc8785.dumps({**paper.content, "signature": spelled}) + b"\n")
        assert refused.value.code == "enrolment.forged"


@pytest.mark.parametrize("kind", KINDS)
def test_a_paper_is_not_taken_for_one_of_another_kind(papers: dict[str, Paper], kind: str) -> None:
    for other in KINDS:
        if other != kind:
            with pytest.raises(FedtuneError):
                papers[kind].read(papers[other].raw)
            relabelled = {**papers[other].content, "kind": kind}
            with pytest.raises(FedtuneError):
                papers[kind].read(rfc8785.dumps(relabelled) + b"\n")


@pytest.mark.parametrize("kind", KINDS)
def test_a_field_more_or_less_is_refused_even_when_it_is_signed(papers: dict[str, Paper], kind: str) -> None:
    key, content = Ed25519PrivateKey.generate(), papers[kind].content
    body = content["body"]
    bodies = [{**body, "more": 1}, *({k: v for k, v in body.items() if k != name} for name in body)]
    for changed in bodies:
        statement = b"fedtune " + kind.encode() + b" v1\n" + rfc8785.dumps(changed)
        signed = {**content, "body": changed, "signature": key.sign(statement).hex()}
        with pytest.raises(EnrolmentError) as refused:
            read(papers[kind].model, rfc8785.dumps(signed) + b"\n", public_hex(key))
        assert refused.value.code == "enrolment.malformed"


@pytest.mark.parametrize("kind", KINDS)
def test_a_huge_or_deep_file_is_refused_cheaply(papers: dict[str, Paper], kind: str) -> None:
    deep, long = "enrolment.malformed", "enrolment.too-large"
    for raw, code in (
        (b"[" * (MOST_BYTES - 1) + b"\n", deep),
        (b'{"a":' * 20_000 + b"\n", deep),
        (b" " * (MOST_BYTES + 1), long),
    ):
        with pytest.raises(EnrolmentError) as refused:
            papers[kind].read(raw)
        assert refused.value.code == code


def test_whoever_replaces_the_coordinators_key_in_an_invitation_changes_its_fingerprint(
    papers: dict[str, Paper],
) -> None:
    attacker, body = Ed25519PrivateKey.generate(), papers["invitation"].content["body"]
    body["offer"]["coordinator"] = public_hex(attacker)
    statement = b"fedtune invitation v1\n" + rfc8785.dumps(body)
    forged = {**papers["invitation"].content, "body": body, "signature": attacker.sign(statement).hex()}
    read_back = read_invitation(rfc8785.dumps(forged) + b"\n", START)
    assert read_back.fingerprint != read_invitation(papers["invitation"].raw, START).fingerprint


@pytest.mark.parametrize("wrong", ["site", "coordinator", "federation", "expired"])
def test_an_invitation_comes_with_the_authority_of_its_federation(tmp_path: Path, wrong: str) -> None:
    coordinator = Coordinator(tmp_path / "coordinator")
    good = read_invitation(coordinator.invite("hospital-a"), START)
    authority, key, old = coordinator.authority, new_tls_key().public_key(), START - timedelta(days=4000)
    certificate = {
        "site": lambda: authority.certify_site("hospital-a", key, START),
        "coordinator": lambda: authority.certify_coordinator(HOSTS, key, START),
        "federation": lambda: Authority.create("banks-0011223344556677", HOSTS, START).certificate,
        "expired": lambda: Authority.create(coordinator.federation, HOSTS, old).certificate,
    }[wrong]()
    offer = good.offer.model_copy(update={"authority": pem(certificate)})
    raw = write(good.model_copy(update={"offer": offer}), lambda statement: coordinator.key.sign(statement).hex())
    with pytest.raises(EnrolmentError) as refused:
        read_invitation(raw, START)
    assert refused.value.code == f"enrolment.{'certificate-expired' if wrong == 'expired' else 'bad-certificate'}"


def test_an_invitation_is_read_in_its_time_and_an_hour_longer(papers: dict[str, Paper]) -> None:
    raw = papers["invitation"].raw
    read_invitation(raw, START + timedelta(days=14, minutes=59))
    with pytest.raises(EnrolmentError) as refused:
        read_invitation(raw, START + timedelta(days=14, minutes=61))
    assert refused.value.code == "enrolment.expired-invitation"


def test_no_paper_but_the_invitation_holds_the_token_and_none_a_private_key(
    papers: dict[str, Paper], tmp_path: Path
) -> None:
    token = papers["invitation"].content["body"]["token"]
    for kind in ("request", "grant"):
        assert token.encode() not in papers[kind].raw
    assert all(b"PRIVATE" not in paper.raw for paper in papers.values())
