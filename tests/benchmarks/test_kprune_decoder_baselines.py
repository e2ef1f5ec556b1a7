"""The baselines for decoders against slow answers in float64."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from accelerate.utils import compare_versions
from torch import Tensor
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, LlamaConfig, LlamaForCausalLM

from benchmarks.kprune import decoder_baselines as baselines
from benchmarks.kprune.decoder_runs import matrix_elements
from benchmarks.kprune.decoder_tuning import refit_locally, tune_by_engine
from benchmarks.kprune.decoder_units import Walk, sublayers
from kprune_ext import KPruneConfig

SIZES = {
    "vocab_size": 60,
    "hidden_size": 24,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 8,
    "max_position_embeddings": 64, "pad_token_id": 0,
}  # fmt: skip


def tiny(family: str) -> LlamaForCausalLM | Gemma3ForCausalLM:
    if family == "llama":
        return LlamaForCausalLM(LlamaConfig(**SIZES)).double().eval()
    config = Gemma3TextConfig(
        **SIZES, sliding_window=4, layer_types=["sliding_attention", "full_attention"]
    )
    return Gemma3ForCausalLM(config).double().eval()


@pytest.fixture(params=["llama", "gemma"])
def model(request: pytest.FixtureRequest) -> LlamaForCausalLM | Gemma3ForCausalLM:
    if request.param == "gemma" and compare_versions("transformers", "<", "5.0"):
        pytest.skip("layers of Gemma 3 take other arguments before transformers 5")
    found = tiny(request.param)
    with torch.no_grad():
        for parameter in found.parameters():  # norms, too, and no unit like another
            parameter.add_(0.3 * torch.randn_like(parameter))
    return found


@pytest.fixture
def batches() -> list[dict[str, Tensor]]:
    """Two batches; the second is padded."""
    mask = torch.ones(3, 9, dtype=torch.long)
    mask[0, 4:] = mask[2, 7:] = 0
    ids = torch.randint(1, 60, (3, 9)) * mask
    whole = torch.randint(1, 60, (4, 12))
    return [
        {"input_ids": whole, "attention_mask": torch.ones_like(whole)},
        {"input_ids": ids, "attention_mask": mask},
    ]


def inputs_of(model: torch.nn.Module, batches: list[dict[str, Tensor]]) -> dict[int, Tensor]:
    """The inputs of all output projections at tokens that are no padding, one token at a time."""
    found: dict[int, list[Tensor]] = {}
    layers = [s.output for s in sublayers(model)]
    for number, linear in enumerate(layers):
        found[number] = []
        linear.register_forward_pre_hook(lambda _, args, kept=found[number]: kept.append(args[0]))
    rows: dict[int, list[Tensor]] = {number: [] for number in found}
    for batch in batches:
        with torch.no_grad():
            model(**batch)
        for number, kept in found.items():
            (values,) = kept
            kept.clear()
            for sample, mask in zip(values, batch["attention_mask"], strict=True):
                rows[number] += [token for token, there in zip(sample, mask, strict=True) if there]
    return {number: torch.stack(tokens) for number, tokens in rows.items()}


def logits_with_ablated_units(model, masks, batch, fill=None):
    """Logits with the features of removed units replaced, by hooks that know nothing of weights."""
    model = deepcopy(model)
    for number, (sublayer, keep) in enumerate(zip(sublayers(model), masks, strict=True)):
        width = sublayer.output.in_features
        kept = torch.tensor([bool(keep[c // sublayer.unit_size]) for c in range(width)])
        other = torch.zeros(width).double() if fill is None else fill[number]

        def change(_, args, kept=kept, other=other):
            return (torch.where(kept, args[0], other),)

        sublayer.output.register_forward_pre_hook(change)
    with torch.no_grad():
        return model(**batch).logits


def test_a_walk_is_the_models_own_forward(model, batches):
    layers, walk = sublayers(model), Walk.start(model, batches)
    wanted = inputs_of(deepcopy(model), batches)
    for number, sublayer in enumerate(layers):
        found = walk.features(number, sublayer)
        got = torch.cat([x[mask] for x, mask in zip(found, walk.tokens, strict=True)])
        torch.testing.assert_close(got, wanted[number])
        walk.advance(sublayer, found)
    for state, batch in zip(walk.states, batches, strict=True):
        with torch.no_grad():
            last = model.get_decoder()(**batch).last_hidden_state
        torch.testing.assert_close(model.get_decoder().norm(state), last)
    assert model.get_decoder().layers[0] is layers[0].layer


def fluctuations(values: Tensor, weight: Tensor) -> list[float]:
    """Variance times squared column norm of each channel, in plain numbers."""
    found = []
    for c in range(values.shape[1]):
        mean = sum(float(v) for v in values[:, c]) / len(values)
        variance = sum((float(v) - mean) ** 2 for v in values[:, c]) / len(values)
        found.append(variance * sum(float(w) ** 2 for w in weight[:, c].detach()))
    return found


def standard(values: list[float]) -> list[float]:
    mean = sum(values) / len(values)
    deviation = (sum((v - mean) ** 2 for v in values) / (len(values) - 1)) ** 0.5
    return [(v - mean) / deviation for v in values]


@pytest.mark.parametrize("summed_first", [False, True])
def test_flap_is_its_formula(model, batches, summed_first):
    reduction = 0.3
    every, layers = inputs_of(deepcopy(model), batches), sublayers(model)
    scores, costs, units = [], [], []
    for number, sublayer in enumerate(layers):
        heads, size = sublayer.kind == "attention", sublayer.unit_size
        channels = fluctuations(every[number], sublayer.output.weight)
        parts = [slice(size * unit, size * unit + size) for unit in range(sublayer.units)]
        if summed_first:
            scores += standard([sum(channels[part]) for part in parts])
        else:
            single = standard([c**2 for c in channels] if heads else channels)
            scores += [sum(single[part]) / size for part in parts]
        units += [(number, unit) for unit in range(sublayer.units)]
        costs += [24 * 8 * (2 + 1 + 1 + 2) if heads else 3 * 24] * sublayer.units
    left, wanted = (1 - reduction) * sum(costs), set()
    for place in sorted(range(len(units)), key=lambda p: -scores[p]):
        left -= costs[place]
        if left < 0:
            break
        wanted.add(units[place])
    criterion = baselines.flap_unit_scores if summed_first else baselines.flap_scores
    masks, means = baselines.flap_choice(model, batches, reduction, criterion)
    found = {(n, int(u)) for n, mask in enumerate(masks) for u in mask.nonzero().flatten()}
    assert found == wanted
    for number, mean in enumerate(means):
        torch.testing.assert_close(mean, every[number].mean(0))


def test_flap_puts_the_mean_in_the_place_of_what_it_removes(model, batches):
    dense = deepcopy(model)
    means = [rows.mean(0) for rows in inputs_of(deepcopy(dense), batches).values()]
    masks = baselines.prune_by_flap(model, batches, 0.3)
    assert any(not mask.all() for mask in masks)
    wanted = logits_with_ablated_units(dense, masks, batches[0], means)
    with torch.no_grad():
        torch.testing.assert_close(model(**batches[0]).logits, wanted)


def test_flap_loses_nothing_where_inputs_are_constant():
    model = tiny("llama")
    with torch.no_grad():
        model.model.embed_tokens.weight.copy_(torch.randn(24).double().expand(60, 24))
    ids = torch.randint(1, 60, (2, 8))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    with torch.no_grad():
        wanted = model(**batch).logits
        baselines.prune_by_flap(model, [batch], 0.5)
        torch.testing.assert_close(model(**batch).logits, wanted)


def test_wanda_is_its_formula_on_the_pruned_layers_below(model, batches):
    dense = deepcopy(model)
    masks = baselines.prune_by_wanda(model, batches, 0.4)
    assert {int(mask.sum()) for mask in masks[::2]} == {2}
    for number, sublayer in enumerate(sublayers(dense)):
        # The first `number` sub-layers are pruned already.
        partial = deepcopy(dense)
        for below, mask in zip(sublayers(partial)[:number], masks, strict=False):
            below.remove(mask)
        values, weight = inputs_of(partial, batches)[number], sublayer.output.weight
        scores = []
        for unit in range(sublayer.units):
            total = 0.0
            for c in range(unit * sublayer.unit_size, (unit + 1) * sublayer.unit_size):
                norm = (sum(float(v) ** 2 for v in values[:, c]) / len(values)) ** 0.5
                total += sum(abs(float(w)) * norm for w in weight[:, c].detach()) / len(weight)
            scores.append(total)
        count = int(masks[number].sum())
        kept = sorted(range(len(scores)), key=lambda u: -scores[u])[:count]
        assert sorted(kept) == masks[number].nonzero().flatten().tolist()
    wanted = logits_with_ablated_units(dense, masks, batches[1])
    with torch.no_grad():
        torch.testing.assert_close(model(**batches[1]).logits, wanted)


def test_magnitude_takes_all_weights_of_a_unit(model):
    sublayer = sublayers(model)[0]
    attention = sublayer.block
    wanted = []
    for group in range(3):
        query, key = slice(16 * group, 16 * group + 16), slice(8 * group, 8 * group + 8)
        parts = [attention.q_proj.weight[query], attention.k_proj.weight[key]]
        parts += [attention.v_proj.weight[key], attention.o_proj.weight[:, query]]
        wanted.append(sum(float(part.detach().square().sum()) for part in parts))
    found = baselines.magnitude_scores(sublayer)
    torch.testing.assert_close(found, torch.tensor(wanted, dtype=torch.float64))
    masks = baselines.prune_by_magnitude(model, 0.4)
    worst = min(range(3), key=wanted.__getitem__)
    assert not masks[0][worst] and int(masks[0].sum()) == 2


@pytest.mark.parametrize("reduction", [0.1, 0.2, 0.3, 0.5])
def test_budgets_are_kept(model, batches, reduction):
    layers = sublayers(model)
    whole = sum(s.cost * s.units for s in layers)
    assert whole == matrix_elements(model)
    largest = max(s.cost for s in layers) / whole
    for masks in (
        baselines.flap_choice(model, batches, reduction)[0],
        baselines.prune_by_wanda(deepcopy(model), batches, reduction),
        baselines.prune_by_magnitude(deepcopy(model), reduction),
    ):
        kept = baselines.share_kept(model, masks)
        assert 1 - reduction - largest < kept <= 1 - reduction + 1e-9


def test_uniform_layers_keep_the_budget_to_a_neuron(model):
    layers = sublayers(model)
    for reduction in (0.1, 0.2, 0.3, 0.5):
        groups, neurons = baselines.uniform_sizes(layers, reduction)
        attention, mlp = layers[:2]
        whole = attention.units * attention.cost + mlp.units * mlp.cost
        kept = groups * attention.cost + neurons * mlp.cost
        assert kept <= (1 - reduction) * whole < kept + mlp.cost


def test_the_local_refit_is_least_squares_on_the_dense_layers(batches):
    model = tiny("llama")
    many = [
        {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        for ids in torch.randint(1, 60, (8, 16, 30))
    ]
    with torch.no_grad():
        for sublayer in sublayers(model):
            sublayer.output.weight.mul_(3)
    every, masks = inputs_of(deepcopy(model), many), []
    dense = [s.output.weight.detach().clone() for s in sublayers(model)]
    for sublayer in sublayers(model):
        masks.append(torch.arange(sublayer.units) % 3 > 0)
    refit_locally(model, many, masks)
    for number, (sublayer, keep) in enumerate(zip(sublayers(model), masks, strict=True)):
        columns = sublayer.columns(keep)
        x, wanted = every[number][:, columns], every[number] @ dense[number].T
        found = sublayer.output.weight.detach()
        assert not found[:, ~columns].any()
        exact = torch.linalg.lstsq(x, wanted).solution.T
        errors = [float((x @ w.T - wanted).square().sum()) for w in (exact, found[:, columns])]
        untuned = float((x @ dense[number][:, columns].T - wanted).square().sum())
        assert errors[0] <= errors[1] < errors[0] + 0.1 * (untuned - errors[0])


def test_given_masks_are_tuned_by_the_engine():
    model = tiny("llama").float()
    ids = torch.randint(1, 60, (24, 30))
    many = [{"input_ids": part, "attention_mask": torch.ones_like(part)} for part in ids.split(8)]
    masks, _ = baselines.flap_choice(model, many, 0.3)
    masks[0] = torch.zeros(3, dtype=torch.bool)  # a whole sub-layer gone
    tuned = tune_by_engine(model, many, masks, KPruneConfig(reduction=0.3))
    assert matrix_elements(tuned) / matrix_elements(model) == pytest.approx(
        baselines.share_kept(model, masks), abs=1e-9
    )
    untuned = deepcopy(model)
    for sublayer, keep in zip(sublayers(untuned), masks, strict=True):
        sublayer.remove(keep)
    with torch.no_grad():
        wanted = model.model(**many[0]).last_hidden_state
        errors = [
            float((m.get_decoder()(**many[0]).last_hidden_state - wanted).square().mean())
            for m in (tuned, untuned)
        ]
    assert errors[0] < errors[1]


def test_other_decoders_are_refused():
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=2, n_embd=8))
    with pytest.raises(SystemExit, match="built like Llama or Gemma; GPT2LMHeadModel is not"):
        sublayers(model)
