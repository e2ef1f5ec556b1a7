"""K-prune written naively in float64 from its formulas, to compare the engine with.

One sample at a time, without padding or batches; explicit masks over matrices of full size; an own
forward pass of BERT; the Fisher information as an explicit expectation over classes; the threshold
by trying all of them; weight tuning by stacking every token (and the ridge, as extra rows) into one
least-squares problem. Shares no code with ``kprune_ext``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

Key = tuple[int, str]
PATHS = {
    "attention": "bert.encoder.layer.{}.attention.output",
    "ffn": "bert.encoder.layer.{}.output",
}


@dataclass
class NaiveBert:
    """A BERT classifier as a dictionary of float64 weights, with a mask on every unit."""

    weights: dict[str, Tensor]
    layers: int
    heads: int
    epsilon: float
    masks: dict[Key, Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, model: torch.nn.Module) -> NaiveBert:
        weights = {
            name: value.detach().double().clone() for name, value in model.state_dict().items()
        }
        config = model.config
        naive = cls(
            weights, config.num_hidden_layers, config.num_attention_heads, config.layer_norm_eps
        )
        for layer in range(naive.layers):
            naive.masks[layer, "attention"] = torch.ones(config.num_attention_heads).double()
            naive.masks[layer, "ffn"] = torch.ones(config.intermediate_size).double()
        return naive

    def keys(self) -> list[Key]:
        return [(layer, kind) for layer in range(self.layers) for kind in ("attention", "ffn")]

    def linear(self, x: Tensor, path: str) -> Tensor:
        return x @ self.weights[path + ".weight"].T + self.weights[path + ".bias"]

    def norm(self, x: Tensor, path: str) -> Tensor:
        shape = x.shape[-1:]
        weight, bias = self.weights[path + ".weight"], self.weights[path + ".bias"]
        return F.layer_norm(x, shape, weight, bias, self.epsilon)

    def embed(self, ids: Tensor) -> Tensor:
        words = self.weights["bert.embeddings.word_embeddings.weight"][ids]
        positions = self.weights["bert.embeddings.position_embeddings.weight"][: len(ids)]
        types = self.weights["bert.embeddings.token_type_embeddings.weight"][0]
        return self.norm(words + positions + types, "bert.embeddings.LayerNorm")

    def features(self, x: Tensor, key: Key) -> Tensor:
        """What enters the output projection before any mask, ``(tokens, dims)``."""
        layer, kind = key
        prefix = f"bert.encoder.layer.{layer}"
        if kind == "ffn":
            return F.gelu(self.linear(x, f"{prefix}.intermediate.dense"))
        query, keys, values = (
            self.linear(x, f"{prefix}.attention.self.{name}") for name in ("query", "key", "value")
        )
        size = query.shape[1] // self.heads
        outputs = []
        for head in range(self.heads):
            part = slice(head * size, (head + 1) * size)
            scores = query[:, part] @ keys[:, part].T / math.sqrt(size)
            outputs.append(scores.softmax(1) @ values[:, part])
        return torch.cat(outputs, 1)

    def spread(self, key: Key, mask: Tensor) -> Tensor:
        """A mask of units as a mask of dimensions."""
        size = self.output_weight(key).shape[1] // len(mask)
        return mask.repeat_interleave(size)

    def output_weight(self, key: Key) -> Tensor:
        return self.weights[PATHS[key[1]].format(key[0]) + ".dense.weight"]

    def total(self, x: Tensor, key: Key, mask: Tensor) -> Tensor:
        """Output of the sub-layer plus the residual stream."""
        features = self.features(x, key) * self.spread(key, mask)
        return self.linear(features, PATHS[key[1]].format(key[0]) + ".dense") + x

    def step(self, x: Tensor, key: Key, mask: Tensor | None = None) -> Tensor:
        total = self.total(x, key, self.masks[key] if mask is None else mask)
        return self.norm(total, PATHS[key[1]].format(key[0]) + ".LayerNorm")

    def classify(self, x: Tensor) -> Tensor:
        pooled = self.linear(x[0], "bert.pooler.dense").tanh()
        return self.linear(pooled, "classifier")

    def states(self, ids: Tensor, keys: list[Key]) -> dict[Key, Tensor]:
        """The hidden state before each sub-layer."""
        x, states = self.embed(ids), {}
        for key in keys:
            states[key] = x
            x = self.step(x, key)
        return states

    def logits(self, ids: Tensor, masks: dict[Key, Tensor] | None = None) -> Tensor:
        x = self.embed(ids)
        for key in self.keys():
            x = self.step(x, key, (masks or self.masks)[key])
        return self.classify(x)


def predictive_knowledge(
    student: NaiveBert, samples: list[Tensor], temperature: float
) -> dict[Key, Tensor]:
    """½ T² E_x E_{c ~ p(x)} (∂ log p_c(x) / ∂m)², p being softened at temperature T."""
    totals = {key: torch.zeros_like(mask) for key, mask in student.masks.items()}
    for ids in samples:
        masks = {key: mask.clone().requires_grad_() for key, mask in student.masks.items()}
        log_p = (student.logits(ids, masks) / temperature).log_softmax(0)
        for log_probability in log_p:
            gradients = torch.autograd.grad(
                log_probability, list(masks.values()), retain_graph=True
            )
            for key, gradient in zip(masks, gradients, strict=True):
                expected = log_probability.detach().exp() * gradient**2
                totals[key] += 0.5 * temperature**2 * expected / len(samples)
    return totals


def divergence(
    teacher: NaiveBert,
    student: NaiveBert,
    samples: list[Tensor],
    temperature: float,
    masks: dict[Key, Tensor],
) -> Tensor:
    """T² KL(teacher ‖ student), softened, averaged over samples."""
    total = torch.zeros((), dtype=torch.float64)
    for ids in samples:
        log_p = (teacher.logits(ids) / temperature).log_softmax(0)
        log_q = (student.logits(ids, masks) / temperature).log_softmax(0)
        total = total + temperature**2 * (log_p.exp() * (log_p - log_q)).sum() / len(samples)
    return total


def representational_knowledge(student: NaiveBert, samples: list[Tensor]) -> dict[Key, Tensor]:
    """Mean over tokens of Σ_i f_i² · mean_j W_ji² over the dimensions i of each unit."""
    totals = {key: torch.zeros_like(mask) for key, mask in student.masks.items()}
    tokens = sum(len(ids) for ids in samples)
    for ids in samples:
        for key, x in student.states(ids, student.keys()).items():
            features, weight = student.features(x, key), student.output_weight(key)
            size = weight.shape[1] // len(totals[key])
            for unit in range(len(totals[key])):
                for i in range(unit * size, (unit + 1) * size):
                    energy = (features[:, i] ** 2).sum() * (weight[:, i] ** 2).mean()
                    totals[key][unit] += energy / tokens
    return totals


def best_threshold_masks(scores: list[Tensor], costs: list[float], budget: float) -> list[Tensor]:
    """Try every score per cost as the threshold; the lowest whose survivors fit the budget."""
    ratios = [score.double() / cost for score, cost in zip(scores, costs, strict=True)]
    best = [torch.zeros(len(ratio), dtype=torch.bool) for ratio in ratios]
    lowest = math.inf
    for threshold in torch.cat(ratios).tolist():
        keep = [ratio >= threshold for ratio in ratios]
        spent = sum(int(mask.sum()) * cost for mask, cost in zip(keep, costs, strict=True))
        if spent <= budget and threshold < lowest:
            best, lowest = keep, threshold
    return best


def tuned_weights(
    features: Tensor, targets: Tensor, weight: Tensor, ridge: float
) -> tuple[Tensor, Tensor]:
    """Least squares by stacking tokens and ridge rows; returns weight and bias."""
    tokens, units = features.shape
    strength = ridge * units / tokens * (features**2).sum() / units if units else 0.0
    rows = torch.cat([features, torch.ones(tokens, 1).double()], 1)
    pull = torch.cat([math.sqrt(strength) * torch.eye(units).double(), torch.zeros(units, 1)], 1)
    left = torch.cat([rows, pull])
    right = torch.cat([targets, math.sqrt(strength) * weight.T])
    solution = torch.linalg.lstsq(left, right, driver="gelsd").solution
    return solution[:-1].T, solution[-1]


def tune(
    teacher: NaiveBert,
    student: NaiveBert,
    samples: list[Tensor],
    key: Key,
    keep: Tensor,
    ridge: float,
) -> None:
    """Prune one sub-layer of the student in place and fit it to the teacher."""
    features, targets = [], []
    for ids in samples:
        ours = student.states(ids, student.keys())[key]
        theirs = teacher.states(ids, teacher.keys())[key]
        features.append(student.features(ours, key))
        targets.append(teacher.total(theirs, key, teacher.masks[key]) - ours)
    dims = student.spread(key, keep.double()).bool()
    weight = student.output_weight(key)
    tuned, bias = tuned_weights(
        torch.cat(features)[:, dims], torch.cat(targets), weight[:, dims], ridge
    )
    weight.zero_()
    weight[:, dims] = tuned
    student.weights[PATHS[key[1]].format(key[0]) + ".dense.bias"].copy_(bias)
    student.masks[key] = keep.double()


def prune(
    model: torch.nn.Module,
    samples: list[Tensor],
    *,
    reduction: float,
    temperature: float,
    lambda_rep: float,
    ridge: float,
    flops: dict[str, int],
) -> NaiveBert:
    """The whole of K-prune, every score measured anew before every sub-layer on all samples."""
    teacher, student = NaiveBert.of(model), NaiveBert.of(model)
    keys = student.keys()
    left = int((1 - reduction) * sum(len(student.masks[key]) * flops[key[1]] for key in keys))
    for number, key in enumerate(keys):
        predictive = predictive_knowledge(student, samples, temperature)
        representational = representational_knowledge(student, samples)
        later = keys[number:]
        scores = [predictive[k] + lambda_rep * representational[k] for k in later]
        keep = best_threshold_masks(scores, [flops[k[1]] for k in later], left)[0]
        tune(teacher, student, samples, key, keep, ridge)
        left -= int(keep.sum()) * flops[key[1]]
    return student
