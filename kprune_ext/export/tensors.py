"""The tensors of a GGUF file, made one at a time from those of the model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from .graphs import Plan
from .sizes import PROJECTIONS, padded, path_of
from .weights import EMBEDDING, HEAD

#: Names in the file, by projection.
_NAMES = {
    "q_proj": "attn_q",
    "k_proj": "attn_k",
    "v_proj": "attn_v",
    "o_proj": "attn_output",
    "gate_proj": "ffn_gate",
    "up_proj": "ffn_up",
    "down_proj": "ffn_down",
}


@dataclass(frozen=True)
class Entry:
    """One tensor of the file.

    Attributes:
        name: Its name in the file.
        shape: Its shape, as PyTorch counts dimensions.
        sources: Names of the model's tensors that it is made of.
        make: Makes it.
    """

    name: str
    shape: tuple[int, ...]
    sources: tuple[str, ...]
    make: Callable[[], Tensor]


def interleaved(tensor: Tensor, head: int) -> Tensor:
    """Returns rows of queries or keys so that dimensions which turn together are neighbours.

    Args:
        tensor: Weight `(heads * head, in)` or bias `(heads * head,)`. In each head the dimensions `i`
            and `i + head / 2` turn together.
        head: Dimensions of a head.
    """
    split = tensor.unflatten(0, (-1, 2, head // 2))
    return split.transpose(1, 2).reshape(tensor.shape)


def entries_of(plan: Plan) -> list[Entry]:
    """Returns the tensors of the file, in their order.

    Raises:
        ValueError: If the model has tensors that have no place in the file; the message names some.
    """
    entries = list(_all(plan))
    used = {source for entry in entries for source in entry.sources}
    if plan.weights.tied:
        used.add(HEAD)
    for number, target in enumerate(plan.targets.layers):
        if not target.groups:  # nothing of the layer's attention is written
            used |= {n for n in plan.weights.shapes if _is_attention(n, number)}
    check_used(plan.weights.shapes, used)
    return entries


def check_used(present: object, used: set[str]) -> None:
    """Refuses a model with tensors that an export would lose.

    Raises:
        ValueError: If there are any; the message names some.
    """
    left = sorted(n for n in dict.fromkeys(present) if n not in used)  # type: ignore[call-overload]
    left = [name for name in left if not name.endswith("rotary_emb.inv_freq")]
    if left:
        raise ValueError(
            f"The model has tensors that have no place in the export, such as {', '.join(left[:3])}. "
            "Modules of your own cannot be exported."
        )


def _is_attention(name: str, number: int) -> bool:
    prefix = f"model.layers.{number}."
    return name.startswith((f"{prefix}self_attn.", f"{prefix}input_layernorm."))


def _all(plan: Plan) -> Iterator[Entry]:
    weights, hidden = plan.weights, plan.sizes.hidden
    whole = (plan.sizes.vocabulary, hidden)
    yield Entry("token_embd.weight", whole, (EMBEDDING,), partial(weights.read, EMBEDDING))
    for number in range(weights.layers):
        yield from _layer(plan, number)
    yield _norm(plan, "model.norm.weight", "output_norm.weight")
    if not weights.tied:
        yield Entry("output.weight", whole, (HEAD,), partial(weights.read, HEAD))
    if plan.rotary.kind == "llama3":
        head = plan.sizes.head
        make = partial(plan.rotary.factors, head)
        yield Entry("rope_freqs.weight", (head // 2,), (), make)


def _layer(plan: Plan, number: int) -> Iterator[Entry]:
    attends = plan.targets.layers[number].groups > 0
    for path, name in plan.family.norms:
        if attends or name != "attn_norm":
            source = f"model.layers.{number}.{path}.weight"
            yield _norm(plan, source, f"blk.{number}.{name}.weight")
    fused = PROJECTIONS[:3] if plan.graph.fused else ()
    if fused:
        parts = [_projection(plan, number, name, "weight") for name in fused]
        yield _joined(f"blk.{number}.attn_qkv.weight", parts)
    for projection in PROJECTIONS[len(fused) :]:
        if not attends and projection in PROJECTIONS[:4]:
            continue
        for kind in ("weight", "bias"):
            if f"model.layers.{number}.{path_of(projection)}.{kind}" in plan.weights.shapes:
                yield _projection(plan, number, projection, kind)


def _norm(plan: Plan, source: str, name: str) -> Entry:
    weights, offset = plan.weights, plan.family.norm_offset
    # Queries are scaled by their norm, where they have one.
    scale = plan.query_scale if name.endswith(".attn_q_norm.weight") else 1.0

    def make() -> Tensor:
        return (weights.read(source).float() + offset) * scale

    if source not in weights.shapes:
        raise ValueError(f"There is no {source}. The weights are not those of the config's family.")
    return Entry(name, weights.shapes[source], (source,), make)


def _projection(plan: Plan, number: int, projection: str, kind: str) -> Entry:
    weights, sizes = plan.weights, plan.targets
    source = f"model.layers.{number}.{path_of(projection)}.{kind}"
    whole = sizes.rows(projection, sizes.layers[number])
    shape = whole if kind == "weight" else whole[:1]
    scale = plan.query_scale if projection == "q_proj" and not plan.graph.norms else 1.0

    def make() -> Tensor:
        tensor = padded(weights.read(source), shape)
        if scale != 1:
            tensor = (tensor.float() * scale).to(tensor.dtype)
        if plan.graph.interleaved and projection in ("q_proj", "k_proj"):
            tensor = interleaved(tensor, sizes.head)
        return tensor

    return Entry(f"blk.{number}.{_NAMES[projection]}.{kind}", shape, (source,), make)


def _joined(name: str, parts: list[Entry]) -> Entry:
    shape = (sum(part.shape[0] for part in parts), *parts[0].shape[1:])
    sources = tuple(source for part in parts for source in part.sources)
    return Entry(name, shape, sources, lambda: torch.cat([part.make() for part in parts]))
