"""`python -m benchmarks.dp_step`: what a private step costs, beside PEFT, Opacus and functorch in the same run."""

from __future__ import annotations

import argparse
from typing import Any

from benchmarks.dp_step import parts, report
from benchmarks.dp_step.configurations import MODELS
from benchmarks.dp_step.machine import machine
from benchmarks.dp_step.processes import measured


def main(arguments: list[str] | None = None) -> None:
    """Measure, and print tables, Markdown or one line of JSON."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not measured("gpu", {})["name"]:
        parser.error("--device cuda: torch finds no CUDA device on this machine")
    result: dict[str, Any] = {"machine": machine(), "options": _told(options)}
    chosen = [name for name in ("real", "scaling", "endtoend", "large") if getattr(options, name)]
    for name in chosen:
        result[name] = getattr(parts, name)(options)
    if not chosen:
        result |= parts.table(options)
    print(report.render(result, options.format), flush=True)


def _told(options: argparse.Namespace) -> dict[str, Any]:
    names = ("device", "threads", "turns", "warmup", "noise", "quick", "batch", "tokens", "rank")
    return {name: getattr(options, name) for name in names}


def _peers(text: str) -> list[str]:
    names = text.split(",")
    if unknown := set(names) - set(report.NAMES):
        raise argparse.ArgumentTypeError(f"no peer is called {', '.join(sorted(unknown))}")
    return names


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.dp_step", description=__doc__)
    what = parser.add_argument_group("what is measured (default: every configuration of the table)")
    what.add_argument("--model", choices=MODELS, help="only this model's configurations")
    what.add_argument("--targets", choices=["qv", "all-linear"], help="only adapters on these layers")
    what.add_argument("--real", choices=["banking77", "medquad"], help="real batches of uneven lengths instead")
    what.add_argument("--scaling", action="store_true", help="time and memory against B, T, r and layers instead")
    what.add_argument("--endtoend", action="store_true", help="records a second through `fedtune simulate` instead")
    what.add_argument("--large", action="store_true", help="a Llama of the 1B class, on a GPU only, instead")
    size = parser.add_argument_group("sizes")
    size.add_argument("--batch", type=int, help="records in a physical batch")
    size.add_argument("--tokens", type=int, help="tokens in a record")
    size.add_argument("--rank", type=int, help="LoRA's rank")
    size.add_argument("--rows", type=int, default=1000, help="records of the whole study (--endtoend)")
    size.add_argument("--steps", type=int, default=20, help="steps of each of its two sites (--endtoend)")
    how = parser.add_argument_group("how")
    how.add_argument("--peers", type=_peers, help=f"some of {','.join(report.NAMES)}")
    how.add_argument("--turns", type=int, default=15, help="measured steps of each peer")
    how.add_argument("--warmup", type=int, default=2, help="steps before them")
    how.add_argument("--threads", type=int, default=1, help="threads of torch")
    how.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    how.add_argument("--noise", choices=["seeded", "secure"], default="seeded", help="fedtune's generator")
    how.add_argument("--peak-tflops", type=float, default=989.0, help="the GPU's matrix peak (H200, bfloat16: 989)")
    how.add_argument("--no-memory", action="store_true", help="time only")
    how.add_argument("--quick", action="store_true", help="seconds: one tiny model")
    how.add_argument("--format", choices=["text", "markdown", "json"], default="text")
    return parser


if __name__ == "__main__":
    main()
