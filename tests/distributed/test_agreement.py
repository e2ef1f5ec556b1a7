"""Processes that are given different work are told so, all of them, before they begin."""

import pytest

from tests.distributed import processes_apart
from tests.helpers.launching import launched


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    return launched(processes_apart, tmp_path_factory.mktemp("apart"))


@pytest.mark.parametrize(
    "case",
    [
        "r", "rank_pattern", "max_memory", "dtype", "corda_damping", "corda_weighting", "methods",
        "target_modules", "checkpoint_dir", "model's weights", "model's config", "model's layers",
        "sensitivity", "reduction", "max_tokens", "pruned model's weights", "predict",
    ],
)  # fmt: skip
def test_what_differs_is_named_everywhere(case, seen):
    named = case.removeprefix("pruned ")
    for one in seen:
        assert one[case].startswith(
            "ValueError: The processes were given different work: processes 0"
        )
        assert named in one[case].split("Call this")[0]
    assert seen[0][case] == seen[1][case]


@pytest.mark.parametrize(
    ("case", "error"),
    [
        ("argument", "ValueError: dtype must be"),
        ("target", "ValueError: "),
        ("size", "ValueError: max_memory='much'"),
        ("pruned argument", "ValueError: classifier.weight is on the meta device"),
    ],
)
def test_an_error_in_the_arguments_of_one_is_handed_on(case, error, seen):
    assert seen[1][case].startswith(error)
    assert seen[0][case].startswith("RuntimeError: Process 1 failed")
    assert error in seen[0][case]


@pytest.mark.parametrize("case", ["same", "memory of its own"])
def test_what_may_differ(case, seen):
    assert not isinstance(seen[0][case], str), seen[0][case]
    assert seen[0][case] == seen[1][case]
