"""A site that signs as it should and lies in what it signs: imported into its executor before anything else.

`tests.support.no_lookups` imports the module that FEDTUNE_TEST_HOOK names. Round n gets the n-th of the bad replies.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

_APP = "fedtune_client.app"


class _Lying(importlib.abc.Loader):
    """Loads the site's app and puts a liar between what it answers and its envelope."""

    def __init__(self, loader: Any) -> None:
        self._loader = loader

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        found: ModuleType | None = self._loader.create_module(spec)
        return found

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        vars(module)["_act"] = lying(vars(module)["_act"])


class _Finder(importlib.abc.MetaPathFinder):
    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name != _APP:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        assert spec is not None
        spec.loader = _Lying(spec.loader)
        return spec


def lying(act: Callable[..., Any]) -> Callable[..., Any]:
    """Return what replaces the site's acting on a message."""

    def answer(kind: str, context: Any, act_on: Any, content: Any) -> Any:
        from fedtune.flower.messages import Update, decode_instruction, decode_update
        from fedtune_client.site import study_of
        from tests.server.test_rounds import TWISTS

        reply, study = act(kind, context, act_on, content), study_of(context)
        number = decode_instruction(content, study).round
        if kind != "train" or number > len(TWISTS):
            return reply
        update = decode_update(reply, study)
        return list(TWISTS.values())[number - 1][0](update) if isinstance(update, Update) else reply

    return answer


sys.meta_path.insert(0, _Finder())
