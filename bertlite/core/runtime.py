"""The machine: device, precision, determinism and the ranks."""

import ctypes
import os
import platform
import shutil
import sys
import sysconfig
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import psutil
import torch
import torch.distributed as dist

from bertlite.core.distributed import get_rank
from bertlite.core.errors import UserError
from bertlite.core.logging import logger


@dataclass(frozen=True)
class Runtime:
    """What a run computes on. `dtype` is that of matrix products; weights and sums are fp32 throughout."""

    device: torch.device
    dtype: torch.dtype
    compile: bool
    rank: int = 0
    world_size: int = 1

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def environment(self) -> dict[str, str | int | bool]:
        """What has to be equal for two runs to be equal bit for bit."""
        processor = f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
        return {
            "device": torch.cuda.get_device_name() if self.device.type == "cuda" else processor,
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
            "precision": "bf16" if self.dtype == torch.bfloat16 else "fp32",
            "compile": self.compile,
            "ranks": self.world_size,
        }


def initialize_runtime(precision: str = "fp32", compile: str | bool = False) -> Runtime:
    """Choose device and precision, make torch deterministic, and join the other ranks under torchrun."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS is deterministic only with this
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # torch sets it so too
    _keep_memory()
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    device = torch.device("cuda", local_rank) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if world_size > 1 and not dist.is_initialized():
        # One rank may spend hours on preparing a corpus while the others wait.
        backend, place = ("nccl", device) if device.type == "cuda" else ("gloo", None)
        dist.init_process_group(backend, timeout=timedelta(days=1), device_id=place)
    return Runtime(
        device=device,
        dtype=_matrix_dtype(precision, device),
        compile=bool(compile) and _can_compile(device, compile),
        rank=get_rank(),
        world_size=world_size,
    )


def available_memory(runtime: Runtime) -> int:
    """Bytes that a rank may still take."""
    if runtime.device.type == "cuda":
        return int(torch.cuda.mem_get_info()[0])
    return int(psutil.virtual_memory().available) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def is_out_of_memory(error: Exception) -> bool:
    """Whether this is what Python, a GPU or torch's own allocator for CPUs raises when memory gives out."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def _matrix_dtype(precision: str, device: torch.device) -> torch.dtype:
    if device.type == "cuda":
        fast_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        fast_bf16 = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    if precision == "bf16" or (precision == "auto" and fast_bf16):
        return torch.bfloat16
    return torch.float32


def _can_compile(device: torch.device, setting: str | bool) -> bool:
    """Whether torch.compile has what it needs here; if not and `setting` is "auto", says what is missing."""
    if device.type == "cuda":
        missing = "" if shutil.which(os.environ.get("CC", "gcc")) or shutil.which("clang") else "a C compiler (gcc)"
        if torch.cuda.get_device_capability() < (7, 0):
            missing = "a GPU of compute capability 7.0 or newer"
    else:
        compiler = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")
        missing = "" if shutil.which(compiler) else f"a C++ compiler ({compiler})"
        if not Path(sysconfig.get_path("include"), "Python.h").exists():
            missing = "Python's headers (python3-dev)"
    if not missing:
        return True
    if setting != "auto":
        raise UserError(f"train.compile is true, but that needs {missing}; install it, or set it to auto")
    logger.info(f"the model runs uncompiled, more slowly: compiling needs {missing}")
    return False


def _keep_memory() -> None:
    """Let the C library reuse the memory of large tensors, where it would return it to the system and fetch it anew,
    zeroed page by page, several times a step. See mallopt(3); other C libraries than glibc have no such switch."""
    M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
    library = ctypes.CDLL(None)
    if hasattr(library, "mallopt"):
        library.mallopt(M_MMAP_MAX, 0)  # no blocks outside of the heap
        library.mallopt(M_TRIM_THRESHOLD, -1)  # which never shrinks
