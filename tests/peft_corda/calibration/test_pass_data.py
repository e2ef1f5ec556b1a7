"""Data that comes in several passes: too much to carry, shuffled, of unknown length, or other data."""

import pytest
import torch

from peft_corda import calibrate
from tests.helpers.corda import bytes_of, deep_model, make_batches, make_config, padded_batches

CARRIED = "each from where the last one ended"
NOT_CARRIED = "each from the start of the model"
ENOUGH = "80KB"  # for hidden states of 28 kB and two of five blocks' covariances


class Loader:
    """As a DataLoader: it has a length, and yields batches in an order of its own each time."""

    def __init__(self, batches, order=lambda iteration, batches: batches):
        self.batches, self.order, self.iteration = batches, order, 0

    def __len__(self):
        return len(self.batches)

    def __iter__(self):
        self.iteration += 1
        return iter(self.order(self.iteration, self.batches))


def test_hidden_states_beyond_their_limit_are_given_up(capsys):
    """The first batch is short, so more was expected to fit in than does."""
    model, config = deep_model("llama"), make_config()
    batches = make_batches(1, 4, 2) + make_batches(3)
    whole = bytes_of(calibrate(model, config, batches))
    run = []
    model.model.layers[0].mlp.register_forward_pre_hook(lambda *_: run.append(1))
    capsys.readouterr()
    parts = calibrate(model, config, Loader(batches), max_memory="40KB")
    assert CARRIED in capsys.readouterr().err
    assert bytes_of(parts) == whole
    # Every pass ran it for every batch: 5 blocks' 4 covariances, of which one fits at a time.
    assert len(run) > 10 * len(batches)


def test_shuffled_data_is_run_from_the_start(capsys):
    model, config, batches = deep_model("llama"), make_config(), padded_batches()
    loader = Loader(
        batches, lambda iteration, given: given[iteration % 3 :] + given[: iteration % 3]
    )
    parts = calibrate(model, config, loader, max_memory=ENOUGH)
    assert NOT_CARRIED in capsys.readouterr().err
    whole = calibrate(model, config, batches)
    for name, module in whole.modules.items():
        assert parts.modules[name].tokens == module.tokens
        assert parts.modules[name].energy == pytest.approx(module.energy, rel=1e-5)


@pytest.mark.parametrize(
    "order",
    [
        lambda iteration, given: [given[0], *given[1:][:: 1 if iteration % 2 else -1]],
        lambda iteration, given: given if iteration < 6 else given[:-1],
    ],
    ids=["swapped", "fewer"],
)
def test_data_that_differs_behind_the_first_batch_is_refused(order):
    model, batches = deep_model("llama"), make_batches()
    with pytest.raises(ValueError, match="or its order, differs from that of the previous pass"):
        calibrate(model, make_config(), Loader(batches, order), max_memory=ENOUGH)


def test_data_of_unknown_length_is_run_from_the_start(capsys):
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(make_batches())

    model, config = deep_model("llama"), make_config()
    loader = torch.utils.data.DataLoader(Stream(), batch_size=None)
    whole = bytes_of(calibrate(model, config, make_batches()))
    capsys.readouterr()
    assert bytes_of(calibrate(model, config, loader, max_memory=ENOUGH)) == whole
    assert NOT_CARRIED in capsys.readouterr().err
