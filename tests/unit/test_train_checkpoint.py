"""Checkpoints: what was saved comes back, what was not is refused."""

from __future__ import annotations

import pytest
import torch

from cloud_learner.train import checkpoint
from edge_runtime.errors import ConfigError


def test_what_was_saved_comes_back(tmp_path):
    checkpoint.save(tmp_path / "c.pt", {"weights": torch.arange(3), "ledger": [("a", 1, 2)]})

    found = checkpoint.load(tmp_path / "c.pt")

    assert found["ledger"] == [("a", 1, 2)]
    assert torch.equal(torch.arange(3), found["weights"])


def test_a_copy_shares_nothing_with_its_original():
    state = {"weights": torch.zeros(3)}
    again = checkpoint.copied(state)
    state["weights"].add_(1)

    assert again["weights"].tolist() == [0, 0, 0]


def test_files_that_are_no_checkpoints_of_this_version_are_refused(tmp_path):
    (tmp_path / "garbage").write_bytes(b"no checkpoint")
    torch.save([1, 2], tmp_path / "list")
    torch.save({"version": checkpoint.CHECKPOINT_VERSION + 1}, tmp_path / "newer")

    for name in ("garbage", "list", "newer", "absent"):
        with pytest.raises(ConfigError, match=name) as caught:
            checkpoint.load(tmp_path / name)
        assert caught.value.code == "bad_checkpoint"


def test_two_streams_of_random_numbers_do_not_disturb_each_other():
    def drawn(between):
        stream = checkpoint.settle(5)
        with stream.used():
            first = torch.rand(3)
        between()
        with stream.used():
            return torch.cat([first, torch.rand(3)]).tolist()

    def disturb():
        torch.manual_seed(9)
        with checkpoint.settle(5).used():
            torch.rand(7)

    torch.manual_seed(5)
    assert torch.rand(6).tolist() == drawn(lambda: None) == drawn(disturb)


def test_torch_goes_on_as_if_a_stream_had_not_been_used():
    torch.manual_seed(1)
    expected = torch.rand(4).tolist()
    torch.manual_seed(1)
    with checkpoint.settle(5).used():
        torch.rand(3)

    assert expected == torch.rand(4).tolist()
    assert torch.get_num_threads() == 1
