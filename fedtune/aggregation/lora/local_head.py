"""Keep the head at every site: a personal classifier on a shared adapter, for any algorithm.

The head is trained as before, is in no message either way, and survives at the site between rounds (`SiteHalf.kept`).
The global adapter is then an adapter without a head; a site measures and exports its own.
"""

from __future__ import annotations

from dataclasses import replace

from fedtune.aggregation.lora.factors import State, only
from fedtune.aggregation.lora.linear import union
from fedtune.aggregation.lora.protocol import Algorithm, Layouts, SiteHalf
from fedtune.model.layout import AdapterLayout


def with_local_head(algorithm: Algorithm) -> Algorithm:
    """Return the algorithm with the head left out of every message and kept at the site."""
    site, server = algorithm.site, algorithm.server
    return replace(
        algorithm,
        traits=replace(algorithm.traits, releases=False),
        averaged=_headless(algorithm.averaged),
        down=lambda layout, turn, since: _cut(layout, algorithm.down(layout, turn, since)),
        site=SiteHalf(
            site.start,
            site.trained,
            site.receive,
            lambda layout, turn, state: _without(layout, site.send(layout, turn, state)),
            lambda layout: union(site.kept(layout), only(layout, "head")),
        ),
        server=replace(
            server, send=lambda layout, turn, state, since: _without(layout, server.send(layout, turn, state, since))
        ),
    )


def _headless(layouts: Layouts) -> Layouts:
    return lambda layout, turn: _cut(layout, layouts(layout, turn))


def _cut(layout: AdapterLayout, part: AdapterLayout) -> AdapterLayout:
    """Return a part without the layout's head; a core or a sketch is no head, whatever its role says."""
    head = set(only(layout, "head").names)
    return AdapterLayout(tuple(spec for spec in part.tensors if spec.name not in head))


def _without(layout: AdapterLayout, message: State) -> State:
    head = set(only(layout, "head").names)
    return {name: array for name, array in message.items() if name not in head}
