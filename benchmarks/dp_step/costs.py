"""The cost model: floating-point operations and bytes of one private LoRA step, from the shape alone.

A product of (m, k) and (k, n) is 2·m·k·n operations. With N positions (B·T, or B behind the pooling), a frozen layer
(d → o) costs 2·N·d·o forward and as much backward, if its input leads to something trained. Its factors cost
2·N·r·(d + o) forward and twice that backward (once without the input's part), whether their gradients are summed or
kept for each record: the batched product has the same operations. Attention costs 4·B·T²·H forward and 8·B·T²·H
backward, the whole square, without recomputation. What is not a matrix product is not counted.

Privacy adds 4·B·r·(d + o) a layer, one pass over the rows for the norms and one for the weighted sum, and the rows
themselves: 4·B·P bytes for P trainable numbers.
"""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.dp_step.configurations import Configuration


@dataclass(frozen=True, slots=True)
class Layer:
    """A linear layer (inputs → outputs) at so many positions."""

    inputs: int
    outputs: int
    positions: int
    adapted: bool = False
    input_gradient: bool = True
    trained: bool = False

    def forward(self, rank: int) -> int:
        """Operations of y = x Wᵀ + s·(x Aᵀ) Bᵀ."""
        low_rank = 2 * self.positions * rank * (self.inputs + self.outputs) if self.adapted else 0
        return 2 * self.positions * self.inputs * self.outputs + low_rank

    def backward(self, rank: int) -> int:
        """Operations of the gradients of x, A and B, or of W where the layer itself is trained."""
        whole = 2 * self.positions * self.inputs * self.outputs * (self.input_gradient + self.trained)
        if not self.adapted:
            return whole
        into_input = self.inputs if self.input_gradient else 0
        return whole + 2 * self.positions * rank * (2 * self.outputs + self.inputs + into_input)


@dataclass(frozen=True, slots=True)
class Cost:
    """Operations of one step without privacy, those that privacy adds, and the bytes of the per-record rows."""

    operations: int
    extra_operations: int
    store_bytes: int
    parameters: int


def cost(shape: Configuration) -> Cost:
    """Return what one step of a configuration costs."""
    every = layers(shape)
    matrices = sum(layer.forward(shape.rank) + layer.backward(shape.rank) for layer in every)
    attention = 12 * shape.layers * shape.batch * shape.tokens**2 * shape.width
    numbers = sum(_numbers(layer, shape.rank) for layer in every)
    factors = sum(shape.rank * (layer.inputs + layer.outputs) for layer in every if layer.adapted)
    return Cost(matrices + attention, 4 * shape.batch * factors, 4 * shape.batch * numbers, numbers)


def layers(shape: Configuration) -> list[Layer]:
    """Return every linear layer of a configuration; what the embeddings feed needs no gradient of its input."""
    positions = shape.batch * shape.tokens
    adapts_all = shape.targets == "all-linear"
    found = []
    for number in range(shape.layers):
        for name, inputs, outputs in _block(shape):
            adapted = adapts_all or name in {"query", "value", "fused"}
            reads_embeddings = number == 0 and name in {"query", "key", "value", "fused"}
            found.append(Layer(inputs, outputs, positions, adapted, input_gradient=not reads_embeddings))
    return found + _output(shape, positions, adapts_all=adapts_all)


def _block(shape: Configuration) -> list[tuple[str, int, int]]:
    """Return the linear layers of one block (name, d, o)."""
    width, inner = shape.width, shape.inner
    if shape.family == "gpt2":
        return [("fused", width, 3 * width), ("out", width, width), ("up", width, inner), ("down", inner, width)]
    held = width * (shape.kv_heads or shape.heads) // shape.heads
    attention = [("query", width, width), ("key", width, held), ("value", width, held), ("out", width, width)]
    feed_forward = [("up", width, inner), ("down", inner, width)]
    gate = [("gate", width, inner)] if shape.family == "llama" else []
    return attention + gate + feed_forward


def _output(shape: Configuration, positions: int, *, adapts_all: bool) -> list[Layer]:
    if shape.family != "bert":
        return [Layer(shape.width, shape.vocabulary, positions)]
    pooler = Layer(shape.width, shape.width, shape.batch, adapted=adapts_all)
    return [pooler, Layer(shape.width, shape.classes, shape.batch, trained=True)]


def _numbers(layer: Layer, rank: int) -> int:
    """Return how many trainable numbers a layer has; a trained layer has a bias."""
    if layer.trained:
        return layer.inputs * layer.outputs + layer.outputs
    return rank * (layer.inputs + layer.outputs) if layer.adapted else 0
