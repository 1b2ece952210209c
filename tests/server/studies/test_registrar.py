"""Who is enrolled may connect, nobody else: the registered nodes follow the enrolment's log."""

from __future__ import annotations

from dataclasses import dataclass, field

from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey

from fedtune.errors import TransportError
from fedtune.flower.peer import key_digest
from fedtune.flower.submission import NodeFacts
from fedtune_server.studies.registrar import Registrar, node_keys
from tests.support.enrolments import Coordinator, MakeSite, enrol


@dataclass
class Nodes:
    """Nodes as Flower keeps them: a key is registered once."""

    known: dict[int, NodeFacts] = field(default_factory=dict)
    calls: int = 0

    def nodes(self) -> tuple[NodeFacts, ...]:
        self.calls += 1
        return tuple(self.known.values())

    def register(self, public_key: EllipticCurvePublicKey, name: str) -> int:
        number, key = 1 + max(self.known, default=0), key_digest(public_key)
        if any(node.key == key for node in self.known.values()):
            raise TransportError("node-exists", "it is registered")
        self.known[number] = NodeFacts(number, name, "registered", key)
        return number

    def unregister(self, node: int) -> None:
        del self.known[node]

    @property
    def names(self) -> list[str]:
        return sorted(node.name for node in self.known.values())


def test_enrolled_sites_are_registered_and_revoked_ones_removed(coordinator: Coordinator, make_site: MakeSite) -> None:
    nodes, registrar = Nodes(), Registrar(coordinator.enrolment)
    registrar.tick(nodes)
    assert nodes.names == []
    for name in ("north", "south"):
        enrol(coordinator, make_site(name))
        registrar.tick(nodes)
    assert nodes.names == ["north", "south"]
    coordinator.enrolment.revoke("north", "left")
    registrar.tick(nodes)
    assert nodes.names == ["south"]


def test_a_site_that_renews_with_a_new_node_key_keeps_the_one_it_still_runs_with(
    coordinator: Coordinator, make_site: MakeSite
) -> None:
    site, nodes, registrar = make_site("north"), Nodes(), Registrar(coordinator.enrolment)
    enrol(coordinator, site)
    registrar.tick(nodes)
    (first,) = nodes.known.values()
    keys = []
    for _ in range(2):
        coordinator.now.later(days=30)
        site.accept(coordinator.approve(site.renew(new_node=True)))
        registrar.tick(nodes)
        keys.append({node.key for node in nodes.known.values()})
    assert [len(found) for found in keys] == [2, 2]
    assert first.key in keys[0]
    assert first.key not in keys[1], "the grant before the last no longer stands"
    assert {site for site, _ in node_keys(coordinator.enrolment.members).values()} == {"north"}


def test_what_others_have_registered_is_removed_and_what_was_lost_registered_again(
    coordinator: Coordinator, make_site: MakeSite
) -> None:
    nodes, registrar = Nodes(), Registrar(coordinator.enrolment)
    enrol(coordinator, make_site("north"))
    nodes.known[7] = NodeFacts(7, "stranger", "online", "f" * 64)
    registrar.tick(nodes)
    assert nodes.names == ["north"]
    nodes.known.clear()
    registrar.look_again()
    registrar.tick(nodes)
    assert nodes.names == ["north"]


def test_nothing_is_asked_while_nothing_changes(coordinator: Coordinator, make_site: MakeSite) -> None:
    time = [0.0]
    nodes, registrar = Nodes(), Registrar(coordinator.enrolment, lambda: time[0])
    enrol(coordinator, make_site("north"))
    for _ in range(50):
        time[0] += 1
        registrar.tick(nodes)
    assert nodes.calls == 1
    time[0] += 100
    registrar.tick(nodes)
    assert nodes.calls == 2
