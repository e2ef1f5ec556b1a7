"""Padding is cut off: sequences of like length are run together, and each keeps what is its own."""

from itertools import combinations, pairwise

import pytest
import torch
from accelerate import cpu_offload

from peft_corda.base_model.forward import Runner
from peft_corda.base_model.targets import find_targets
from peft_corda.batches.batches import of_like_length, unpadded
from tests.helpers.corda import covariances_of, make_config, make_model

IDS = torch.arange(1, 13).reshape(3, 4)
RIGHT = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1], [1, 1, 1, 0]])
LEFT = RIGHT.flip(1)


class TestOfLikeLength:
    def batch(self, lengths, **extra):
        mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
        ids = torch.arange(1, mask.numel() + 1).reshape(mask.shape) * mask
        return {"input_ids": ids, "attention_mask": mask} | extra

    def test_cut_where_padding_costs_more_than_a_run(self):
        batch = self.batch([3, 20, 4, 19])
        batch["position_ids"] = batch["input_ids"] + 1000
        long, short = of_like_length(batch, run_cost=10)
        assert torch.equal(long["input_ids"], batch["input_ids"][[1, 3]])
        assert torch.equal(short["input_ids"], batch["input_ids"][[0, 2], :4])
        for part in (long, short):
            assert torch.equal(part["position_ids"], part["input_ids"] + 1000)
            assert torch.equal(part["attention_mask"].bool(), part["input_ids"] > 0)

    @pytest.mark.parametrize("cost", [0, 1, 7, 40, 10**6])
    def test_cheapest_of_all_cuts(self, cost):
        lengths = [2, 2, 3, 5, 5, 9, 14, 15]
        parts = of_like_length(self.batch(lengths), cost)
        found = sum(part["input_ids"].numel() + cost for part in parts)
        least = min(
            sum(cost + len(part) * part[-1] for part in self.pieces(lengths, cuts))
            for count in range(len(lengths))
            for cuts in combinations(range(1, len(lengths)), count)
        )
        assert found == least

    def pieces(self, lengths, cuts):
        return [lengths[a:b] for a, b in pairwise([0, *cuts, len(lengths)])]

    def test_padding_that_all_share_and_empty_rows_go(self):
        batch = self.batch([3, 0, 2, 6])
        batch = {key: value[:3] for key, value in batch.items()}
        (part,) = of_like_length(batch, run_cost=10)
        assert torch.equal(part["attention_mask"], torch.tensor([[1, 1, 1], [1, 1, 0]]))

    @pytest.mark.parametrize(
        "change",
        [
            lambda b: b | {"attention_mask": b["attention_mask"].flip(1)},
            lambda b: b | {"attention_mask": torch.zeros_like(b["attention_mask"])},
            lambda b: b | {"pixel_values": torch.zeros(b["input_ids"].shape)},
            lambda b: b | {"position_ids": b["input_ids"][:1]},
            lambda b: {"input_ids": b["input_ids"]},
        ],
        ids=["left padding", "no token", "other entries", "other shape", "no mask"],
    )
    def test_left_alone(self, change):
        batch = change(self.batch([1, 30]))
        (part,) = of_like_length(batch, run_cost=0)
        assert part == batch and part is not batch

    def test_no_more_runs_where_each_brings_weights_in(self):
        model, batch = make_model("llama"), self.batch([200, 2, 2, 2])
        batch["input_ids"] %= 60  # of the model's vocabulary
        targets = find_targets(model, make_config())
        assert len(Runner(model, targets).parts(batch)) == 2
        cpu_offload(model, torch.device("cpu"))
        assert len(Runner(model, targets).parts(batch)) == 1

    @pytest.mark.parametrize("kind", ["llama", "gpt2", "bert"])
    def test_statistics_stay_as_they_are(self, kind):
        model = make_model(kind)
        targets = find_targets(model, make_config(kind))
        padded = self.batch([40, 2, 3, 2, 39, 3, 2, 2, 2, 2])
        padded["input_ids"] %= 60
        one_by_one = [
            {key: value[row : row + 1, :length] for key, value in padded.items()}
            for row, length in enumerate(padded["attention_mask"].sum(1).tolist())
        ]
        assert len(of_like_length(padded, 64)) == 2
        found = covariances_of(model, targets, [padded])
        wanted = covariances_of(model, targets, one_by_one)
        for name, covariance in wanted.items():
            assert found[name].tokens == covariance.tokens
            torch.testing.assert_close(found[name].matrix, covariance.matrix, rtol=1e-4, atol=1e-6)


class TestUnpadded:
    def rows(self, batch, key="input_ids"):
        return [part[key].tolist() for part in unpadded(batch)]

    def test_right(self):
        found = self.rows({"input_ids": IDS, "attention_mask": RIGHT})
        assert found == [[[1, 2, 3], [9, 10, 11]], [[5, 6, 7, 8]]]

    def test_left(self):
        found = self.rows({"input_ids": IDS, "attention_mask": LEFT})
        assert found == [[[2, 3, 4], [10, 11, 12]], [[5, 6, 7, 8]]]

    def test_nothing_to_cut(self):
        batch = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}
        (part,) = unpadded(batch)
        assert part == batch and part is not batch

    def test_sequence_without_a_token_is_left_out(self):
        mask = RIGHT.clone()
        mask[1] = 0
        assert self.rows({"input_ids": IDS, "attention_mask": mask}) == [[[1, 2, 3], [9, 10, 11]]]
        assert unpadded({"input_ids": IDS, "attention_mask": torch.zeros_like(IDS)}) == []

    def test_what_comes_with_the_tokens_is_cut_like_them(self):
        extra = {
            "token_type_ids": IDS + 100,
            "position_ids": IDS - 1,
            "inputs_embeds": IDS[..., None].expand(3, 4, 2).float(),
            "global_attention_mask": IDS % 2,
        }
        parts = unpadded({"input_ids": IDS, "attention_mask": LEFT, **extra})
        for part in parts:
            assert torch.equal(part["token_type_ids"], part["input_ids"] + 100)
            assert torch.equal(part["position_ids"], part["input_ids"] - 1)
            assert torch.equal(part["inputs_embeds"][..., 1], part["input_ids"].float())
            assert torch.equal(part["global_attention_mask"], part["input_ids"] % 2)
            assert "attention_mask" not in part

    def test_what_does_not_is_kept(self):
        extra = {"use_bias": True, "names": ["a", "b", "c"], "scale": torch.tensor(2.0)}
        extra["table"] = torch.zeros(7, 4)  # neither as many rows as the batch
        for part in unpadded({"input_ids": IDS, "attention_mask": RIGHT, **extra}):
            assert {key: part[key] for key in extra} == extra

    def test_one_value_a_sequence_follows_its_sequence(self):
        parts = unpadded({"input_ids": IDS, "attention_mask": RIGHT, "task": torch.arange(3)})
        assert [part["task"].tolist() for part in parts] == [[0, 2], [1]]

    def test_each_side_by_its_own_mask(self):
        decoder = torch.arange(15).reshape(3, 5)
        decoder_mask = torch.tensor([[1, 1, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 1, 1]])
        batch = {
            "input_ids": IDS,
            "attention_mask": RIGHT,
            "decoder_input_ids": decoder,
            "decoder_attention_mask": decoder_mask,
        }
        assert self.rows(batch) == [[[1, 2, 3]], [[5, 6, 7, 8]], [[9, 10, 11]]]
        assert self.rows(batch, "decoder_input_ids") == [[[0, 1]], [[5, 6]], [list(range(10, 15))]]

    def test_decoder_side_alone(self):
        batch = {"input_ids": IDS, "decoder_input_ids": IDS, "decoder_attention_mask": LEFT}
        assert self.rows(batch) == [IDS[[0, 2]].tolist(), IDS[[1]].tolist()]
        assert self.rows(batch, "decoder_input_ids") == [[[2, 3, 4], [10, 11, 12]], [[5, 6, 7, 8]]]

    def test_hole(self):
        mask = torch.tensor([[1, 0, 1, 1]] * 3)
        with pytest.raises(ValueError, match="leaves out tokens in the middle of a sequence"):
            unpadded({"input_ids": IDS, "attention_mask": mask})

    def test_packed(self):
        mask = torch.ones(3, 1, 4, 4).bool()
        assert len(unpadded({"input_ids": IDS, "attention_mask": mask})) == 1
        mask[0, :, 3] = False
        with pytest.raises(
            ValueError, match=r"packed attention_mask .* takes a mask of shape \(ba"
        ):
            unpadded({"input_ids": IDS, "attention_mask": mask})


def test_one_row_of_positions_for_all_sequences_is_cut_too():
    ids = torch.arange(10).reshape(2, 5)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    batch = {"input_ids": ids, "attention_mask": mask, "position_ids": torch.arange(5)[None]}
    short, long = unpadded(batch)
    assert short["position_ids"].tolist() == [[0, 1, 2]]
    assert long["position_ids"].tolist() == [[0, 1, 2, 3, 4]]
