"""What is chosen by validation texts, and what is compared on the others."""

import math

import pytest

from benchmarks.corda_training import pareto

BEFORE = {"task": 3.0, "wikitext": 1.0, "nq": 2.0}


def run(method, rate, task, wikitext, seed=0, strength=0.0, size=None):
    """A run whose losses on the validation texts are those on the others."""
    losses = {"task": task, "wikitext": wikitext, "nq": 2.0 + wikitext}
    return {
        "method": method, "rate": rate, "strength": strength, "seed": seed, "forgetting": size,
        "validation": losses, **losses,
    }  # fmt: skip


def report_of(runs):
    settings = {"dtype": "float32", "steps": 4, "batch_size": 2, "rank": 2}
    return {"model": "m", "settings": settings, "before": BEFORE, "runs": runs, "commands": ["c"]}


def test_the_setting_that_forgets_least_is_chosen_among_those_that_learn_as_well():
    runs = [
        run("lora", 1e-3, 2.0, 1.3),
        run("lora", 2e-3, 1.9, 1.5),
        run("lora+decay", 2e-3, 1.905, 1.4, strength=3.0),
        run("kpm", 5e-4, 2.2, 1.0),  # forgets least, but has learned less
        run("kpm", 1e-3, 1.89, 1.2),
        run("kpm", 2e-3, 1.85, 1.6),
        run("ipm", 1e-3, 2.5, 1.0),
        run("kpm", 5e-4, 1.0, 0.0, seed=1),  # another seed does not choose
    ]
    assert pareto.chosen(report_of(runs)) == {
        "lora": ("lora", 2e-3, 0.0),
        "lora+decay": ("lora+decay", 2e-3, 3.0),
        "kpm": ("kpm", 1e-3, 0.0),
        "ipm": ("ipm", 1e-3, 0.0),
        "rivals": ("lora+decay", 2e-3, 3.0),
    }


def test_differences_are_taken_seed_by_seed_with_a_p_value():
    runs = []
    for seed, off in ((0, 0.0), (1, 0.5), (2, 1.0)):
        runs.append(run("lora", 1e-3, 2.0 + off, 1.4 + off, seed))
        runs.append(run("kpm", 1e-3, 2.0 + off, 1.3 + off - 0.01 * seed, seed))
    text = pareto.comparison(report_of(runs))
    row = next(line for line in text.splitlines() if line.startswith("| kpm"))
    assert "-0.110 ± 0.006" in row
    assert row.split("|")[6].strip() == "0.003"
    assert pareto.p_value([0.1, 0.2, 0.3]) == pytest.approx(0.0742, abs=1e-4)
    assert math.isnan(pareto.p_value([0.1]))


def test_the_size_of_the_change_is_correlated_with_what_was_forgotten():
    runs = [run("kpm", rate, 2.0, 1.0 + rate, size=10**rate) for rate in (0.1, 0.2, 0.4)]
    runs.append(run("full", 1e-4, 2.0, 9.0))
    assert pareto.correlation(runs, BEFORE, "wikitext") == (pytest.approx(1.0), 3)
    assert math.isnan(pareto.correlation(runs[:2], BEFORE, "wikitext")[0])
    assert "1.00 (3 runs)" in pareto.as_markdown(report_of(runs))
    assert "too few" in pareto.as_markdown(report_of(runs))


def test_each_start_has_a_correlation_of_its_own():
    sizes = (1.0, 2.0, 3.0, 4.0, 5.0)
    runs = [run("lora", n, 2.0, 1.0 + n, size=math.exp(n)) for n in sizes]
    runs += [run("kpm", n, 2.0, 9.0 - n, size=math.exp(n)) for n in sizes[:4]]
    runs += [
        run("kpm+decay", 5.0, 2.0, 4.0, size=math.exp(5.0)),
        run("ipm", 1.0, 2.0, 1.0, size=1.0),
    ]
    found = pareto.by_start(report_of(runs), "wikitext")
    assert found == {"kpm": (pytest.approx(-1.0), 5), "lora": (pytest.approx(1.0), 5)}
    assert "lora 1.00 (5)" in pareto.as_markdown(report_of(runs))
