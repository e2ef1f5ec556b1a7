"""Two processes agree on modules that only some batches of one of them reach."""

import pytest

from peft_corda import CordaFactors
from tests.distributed import unreached_processes
from tests.helpers.launching import launched


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    """What each of the two processes saw."""
    return launched(unreached_processes, tmp_path_factory.mktemp("unreached"))


@pytest.mark.parametrize("case", [name for name in unreached_processes.SHARES if name != "none"])
def test_modules_are_calibrated_on_the_batches_that_reach_them(case, seen, tmp_path):
    first, second = seen
    assert isinstance(first[case], bytes), first[case]
    assert first[case] == second[case] == first[case, "passes"] == second[case, "passes"]
    (tmp_path / "factors").write_bytes(first[case])
    modules = CordaFactors.load(tmp_path / "factors").modules
    shares = unreached_processes.SHARES[case]
    tokens = sum(int(b["attention_mask"].sum()) for share in shares for b in share if b)
    assert {m.tokens for name, m in modules.items() if "vision_tower" in name} == {15}
    assert {m.tokens for name, m in modules.items() if "language_model" in name} == {tokens}


def test_modules_that_no_batch_of_either_reaches(seen):
    for one in seen:
        assert "never called during calibration: none of the 3 batches reaches it" in one["none"]
