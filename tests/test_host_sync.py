"""no_host_sync: what it sees, and that nothing leaves torch's debug mode on."""

import warnings

import pytest
import torch

from tests.support.host_sync import no_host_sync

WARNING = "Synchronization debug mode is a prototype feature and does not yet detect all "
WARNING += "synchronizing operations"


@pytest.mark.parametrize("another_warning", [False, True])
def test_the_mode_does_not_stay_on(monkeypatch: pytest.MonkeyPatch, another_warning: bool) -> None:
    """With torch's own order of things, as it needs a GPU: it sets the mode, and then warns."""
    mode: list[int | str] = [0]

    def set_mode(new: int | str) -> None:
        mode[0] = new
        warnings.warn(WARNING, UserWarning, stacklevel=1)
        if another_warning and new == "error":
            warnings.warn("another", UserWarning, stacklevel=1)

    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: mode[0])
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", set_mode)

    def fail() -> None:
        assert mode == ["error"]
        raise RuntimeError("a host sync")

    expected = "another" if another_warning else "a host sync"
    with pytest.raises((RuntimeError, UserWarning), match=expected), no_host_sync():
        fail()
    assert mode == [0]


@pytest.mark.gpu
def test_a_wait_for_the_gpu_is_seen() -> None:
    x = torch.ones(3, device="cuda").sum()
    with pytest.raises(RuntimeError, match="synchronizing CUDA operation"), no_host_sync():
        x.item()
    assert torch.cuda.get_sync_debug_mode() == 0
    with no_host_sync():
        x += x
    assert x.item() == 6
