"""fedtune's side: apps that carry an adapter to every site and back, or ask sites to sleep; and their executors.

    python -m benchmarks.deployment.apps site|coordinator PORT SECRET

The plan of a run is JSON: `rounds` of {"mebibytes", "sleep"}, the number of `sites`, and `out`, the file for the
measurements. Whatever else serves these two roles can be measured the same way.
"""

from __future__ import annotations

import json
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from benchmarks.deployment.payload import adapter, moved
from fedtune.flower.arrays import from_record, to_record
from fedtune.flower.environment import log_plainly
from fedtune.flower.executor import ExecutorSettings, serve_coordinator, serve_site
from fedtune.flower.messages import Instruction, decode_instruction, encode_instruction

PLAN_SHA256 = "a" * 64
_POLL = 0.1  # seconds between two looks for replies, as fedtune's coordinator waits
client, server = ClientApp(), ServerApp()


@client.train()
def train(message: Message, context: Context) -> Message:
    """Note when the adapter is here, sleep as long as the round says, and send it back moved."""
    arrived = time.time()
    instruction = decode_instruction(message.content, PLAN_SHA256)
    number, arrays = instruction.round, dict(instruction.adapter)
    message.content.clear()
    del instruction  # what is left are the arrays
    time.sleep(json.loads(str(context.run_config["plan"]))["rounds"][number]["sleep"])
    state = moved(arrays, context.node_id % 1009)
    return Message(RecordDict({"x": to_record(state), "t": ConfigRecord({"arrived": arrived})}), reply_to=message)


@server.main()
def main(grid: Grid, context: Context) -> None:
    """Run the plan's rounds with every site and write down when what was where."""
    plan = json.loads(str(context.run_config["plan"]))
    nodes = _connected(grid, plan["sites"])
    found = [_round(grid, nodes, number, asked["mebibytes"]) for number, asked in enumerate(plan["rounds"])]
    Path(plan["out"]).write_text(json.dumps(found), encoding="utf-8")


def _round(grid: Grid, nodes: list[int], number: int, mebibytes: int) -> dict[str, float]:
    arrays = adapter(mebibytes, seed=number)
    began = time.time()
    content = encode_instruction(Instruction(PLAN_SHA256, number, arrays))
    del arrays
    pushed = set(grid.push_messages([Message(content, node, "train", ttl=3600.0) for node in nodes]))
    del content
    arrived, total = 0.0, 0.0
    for reply in _replies(grid, pushed):
        if reply.has_error():
            raise RuntimeError(reply.error.reason)
        arrived = max(arrived, float(str(reply.content["t"]["arrived"])))
        total += sum(float(array[0, 0]) for array in from_record(reply.content["x"]).values())  # type: ignore[arg-type]
    ended = time.time()
    return {"down": arrived - began, "up": ended - arrived, "seconds": ended - began, "checked": total}


def _replies(grid: Grid, pending: set[str]) -> Iterator[Message]:
    while pending:
        replies: list[Message] = list(grid.pull_messages(pending))
        if not replies:
            time.sleep(_POLL)
        while replies:
            reply = replies.pop()
            pending.discard(reply.metadata.reply_to_message_id)
            yield reply


def _connected(grid: Grid, wanted: int) -> list[int]:
    while len(nodes := list(grid.get_node_ids())) < wanted:
        time.sleep(_POLL)
    return nodes


def serve(role: str, port: int, secret: Path) -> None:
    """Serve one role until SIGTERM."""
    log_plainly()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    settings = ExecutorSettings(port, secret)
    start: dict[str, Any] = {
        "site": lambda: serve_site(settings, client),
        "coordinator": lambda: serve_coordinator(settings, server),
    }
    start[role]()


if __name__ == "__main__":
    serve(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]))
