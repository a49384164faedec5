"""The branches that ask for CUDA say and do the right thing, on a machine without it."""

from collections.abc import Callable

import pytest
import torch

import dbp_bench
from dbp_bench import memory, noise
from dbp_bench.entries import given
from dbp_bench.errors import BadRequest
from dbp_bench.provenance import full_float32
from dbp_bench.training.distributed import launched

GPU = torch.device("cuda", 1)


def test_free_memory_counts_what_torch_keeps(monkeypatch: pytest.MonkeyPatch) -> None:
    says = {"mem_get_info": (100, 1000), "memory_reserved": 50, "memory_allocated": 20}
    for name, value in says.items():
        monkeypatch.setattr(f"torch.cuda.{name}", lambda _, value=value: value)
    assert memory.free_bytes(GPU) == 130


@pytest.mark.parametrize(
    "said",
    ["CUDA error: out of memory", "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `create`"],
)
def test_errors_of_memory_in_libraries_are_known(said: str) -> None:
    assert memory.is_exhausted(RuntimeError(said))


def test_more_processes_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    with pytest.raises(BadRequest, match="process 2 of this machine has no GPU of its own"):  # noqa: SIM117
        with launched("cuda"):
            pass


def test_the_images_of_a_script_are_on_the_current_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.current_device", lambda: 1)
    assert given._home(GPU) == "cuda"
    monkeypatch.setattr("torch.cuda.current_device", lambda: 0)
    with pytest.raises(BadRequest, match=r"call torch\.cuda\.set_device\(1\) first"):
        given._home(GPU)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_gpu_that_is_not_there_is_refused() -> None:
    with pytest.raises(BadRequest, match="'cuda': this torch sees no GPU"):
        dbp_bench.load_defense("ddpm", "digits-linf", device="cuda")


def test_the_current_gpu_is_seeded_too(monkeypatch: pytest.MonkeyPatch) -> None:
    seeds, states = list[int](), list[str]()
    answers: dict[str, Callable[..., object]] = {
        "is_initialized": lambda: True,
        "current_device": lambda: 1,
        "manual_seed": seeds.append,
        "get_rng_state": lambda _: states.append("read"),
        "set_rng_state": lambda *_: states.append("restored"),
    }
    for name, answer in answers.items():
        monkeypatch.setattr(f"torch.cuda.{name}", answer)
    with noise.seeded(7):
        assert (seeds, states) == ([7], ["read"])
    assert states == ["read", "restored"]


def test_float32_is_float32_in_matrices_too() -> None:
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    try:
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.allow_tf32 = True
        full_float32()
        assert torch.get_float32_matmul_precision() == "highest"
        assert not torch.backends.cudnn.allow_tf32
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]
