"""What somebody without fedtune does with released folders: run by a Python of its own, with transformers and peft."""

from __future__ import annotations

import json
import sys
from typing import Any

import numpy as np
import torch
import transformers
from peft import PeftModel


def main() -> None:
    torch.set_num_threads(1)
    for job in json.loads(sys.stdin.read()):
        with torch.no_grad():
            output = model_of(job)(input_ids=torch.tensor(job["tokens"]), attention_mask=torch.tensor(job["mask"]))
        found = output.logits if hasattr(output, "logits") else output.last_hidden_state
        np.save(job["result"], found.numpy())
    assert not [name for name in sys.modules if name.partition(".")[0].startswith("fedtune")]


def model_of(job: dict[str, Any]) -> Any:
    base = getattr(transformers, job["loader"]).from_pretrained(job["base"], dtype=torch.float32, **job["words"])
    return (base if job["adapter"] is None else PeftModel.from_pretrained(base, job["adapter"])).eval()


if __name__ == "__main__":
    main()
