"""Planning passes: everything once, in order, within the limit, in as few passes as can be."""

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from peft_corda.base_model.input_groups import Group
from peft_corda.planning.passes import plan_passes

groups = st.lists(st.integers(1, 50), min_size=1, max_size=30).map(
    lambda sizes: [Group((f"layer{number}",), size) for number, size in enumerate(sizes)]
)


@given(groups=groups, spare=st.integers(0, 50_000))
def test_plan(groups, spare):
    limit = max(group.bytes() for group in groups) + spare
    passes = plan_passes(groups, limit)
    assert [group for part in passes for group in part] == groups
    assert all(sum(group.bytes() for group in part) <= limit for part in passes)
    for part, following in pairwise(passes):
        assert sum(group.bytes() for group in part) + following[0].bytes() > limit
