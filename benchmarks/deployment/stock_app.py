"""Stock Flower's side: the same rounds written as Flower's documentation writes an app. It travels in the bundle."""

import json
import time
from pathlib import Path

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

SHAPE = (64, 4096)
client, server = ClientApp(), ServerApp()


@client.train()
def train(message: Message, context: Context) -> Message:
    """Note when the arrays are here, sleep as long as the round says, and send them back moved."""
    arrived = time.time()
    asked = message.content["c"]
    step = np.float32(context.node_id % 1009)
    moved = {name: Array(array.numpy() + step) for name, array in message.content["x"].items()}
    time.sleep(asked["sleep"])
    content = RecordDict({"x": ArrayRecord(moved), "t": ConfigRecord({"arrived": arrived})})
    return Message(content, reply_to=message)


@server.main()
def main(grid: Grid, context: Context) -> None:
    """Run the plan's rounds with every site and write down when what was where."""
    plan = json.loads(context.run_config["plan"])
    while len(nodes := list(grid.get_node_ids())) < plan["sites"]:
        time.sleep(0.1)
    found = [_round(grid, nodes, number, asked) for number, asked in enumerate(plan["rounds"])]
    Path(plan["out"]).write_text(json.dumps(found), encoding="utf-8")


def _round(grid: Grid, nodes: list[int], number: int, asked: dict) -> dict:
    random = np.random.default_rng(number)
    arrays = {f"layer.{n:04}.lora_A": random.standard_normal(SHAPE, np.float32) for n in range(asked["mebibytes"])}
    began = time.time()
    record = ArrayRecord({name: Array(array) for name, array in arrays.items()})
    content = RecordDict({"x": record, "c": ConfigRecord({"sleep": float(asked["sleep"])})})
    replies = grid.send_and_receive([Message(content, node, "train") for node in nodes])
    arrived, total = 0.0, 0.0
    for reply in replies:
        if reply.has_error():
            raise RuntimeError(reply.error.reason)
        arrived = max(arrived, reply.content["t"]["arrived"])
        total += sum(float(array.numpy()[0, 0]) for array in reply.content["x"].values())
    ended = time.time()
    return {"down": arrived - began, "up": ended - arrived, "seconds": ended - began, "checked": total}
