"""Apps that do next to nothing, and executors of them: `python -m tests.support.toy_apps FUNCTION PORT SECRET`."""

from __future__ import annotations

import json
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from fedtune.errors import DataError
from fedtune.flower.environment import log_plainly
from fedtune.flower.executor import ExecutorSettings, serve_coordinator, serve_site
from fedtune.processes import logs

CANARY = "patient 4711 has a secret"


def client() -> ClientApp:
    """Doubles an array, or fails as the plan says."""
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        plan = json.loads(str(context.run_config["plan"]))
        if plan.get("fail") == "code":
            raise DataError("missing-column", CANARY)
        if plan.get("fail") == "text":
            raise ValueError(CANARY)
        if plan.get("fail") in {"pause", "slow"}:
            Path(f"{plan['touch']}.{context.node_id}").touch()
            time.sleep(3 if plan["fail"] == "pause" else 60)
        doubled = 2 * message.content["x"]["w"].numpy()
        keys = ",".join(sorted(context.run_config))
        content = RecordDict({"x": ArrayRecord({"w": _array(doubled)}), "c": ConfigRecord({"keys": keys})})
        return Message(content, reply_to=message)

    return app


def server() -> ServerApp:
    """Sends an array to every node and writes down what comes back."""
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        plan = json.loads(str(context.run_config["plan"]))
        if plan.get("fail") == "coordinator":
            raise ValueError(CANARY)
        nodes = list(grid.get_node_ids())
        while len(nodes) < plan["nodes"]:
            time.sleep(0.1)
            nodes = list(grid.get_node_ids())
        content = RecordDict({"x": ArrayRecord({"w": _array(np.arange(plan["size"], dtype=np.float32))})})
        found = []
        for reply in _replies(grid, [Message(content, node, "train", ttl=plan.get("ttl", 60.0)) for node in nodes]):
            if reply.has_error():
                found.append({"error": reply.error.code, "reason": reply.error.reason})
            else:
                values = reply.content["x"]["w"].numpy()
                found.append({"sum": float(values.sum()), "keys": reply.content["c"]["keys"]})
        Path(plan["out"]).write_text(json.dumps(found))

    return app


def _replies(grid: Grid, messages: list[Message]) -> Iterator[Message]:
    pending = set(grid.push_messages(messages))
    while pending:
        for reply in grid.pull_messages(pending):
            pending.discard(reply.metadata.reply_to_message_id)
            yield reply
        time.sleep(0.1)


def _array(values: np.ndarray) -> object:
    from flwr.app import Array

    return Array(values)


def main(function: str, port: str, secret: str) -> None:
    logs.setup("executor")
    log_plainly()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    settings = ExecutorSettings(int(port), Path(secret), poll=0.05, patience=20.0, longest_pause=1.0)
    if function == "site":
        serve_site(settings, client())
    else:
        serve_coordinator(settings, server())


if __name__ == "__main__":
    main(*sys.argv[1:])
