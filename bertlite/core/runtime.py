"""What a run computes on: device, precision, determinism, ranks, memory."""

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

from bertlite.core.distributed import check_environment, get_rank, get_world_size
from bertlite.core.errors import Failure, UserError
from bertlite.core.logging import logger

PRECISIONS = {"bf16": torch.bfloat16, "fp32": torch.float32}
PRECISION_NAMES = {dtype: name for name, dtype in PRECISIONS.items()}
# Values of oneDNN's environment variable that limits its instructions.
ISA_WITHOUT_BF16 = {"SSE41", "AVX", "AVX2", "AVX2_VNNI", "AVX2_VNNI_2", "AVX512_CORE", "AVX512_CORE_VNNI"}


@dataclass(frozen=True)
class Runtime:
    """What a run computes on. `dtype` is that of matrix products; weights and sums are in fp32."""

    device: torch.device
    dtype: torch.dtype
    compile: bool
    rank: int = 0
    world_size: int = 1

    def autocast(self) -> torch.autocast:
        """Return the context in which the model computes in `dtype`."""
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def describe_precision(self, setting: str) -> str:
        """Return the precision, and why `train.precision` auto chose it."""
        if setting != "auto":
            return PRECISION_NAMES[self.dtype]
        return "bf16 (native)" if self.dtype == torch.bfloat16 else "fp32 (no native bf16)"

    def multiplies_by_onednn(self) -> bool:
        """Return whether training multiplies by oneDNN: in fp32 on AMD's processors.

        There torch calls MKL, which measured a fifth slower than oneDNN. bf16 is oneDNN's anyway.
        """
        if self.device.type != "cpu" or self.dtype != torch.float32 or not torch.backends.mkldnn.is_available():
            return False
        capabilities: dict[str, object] = getattr(torch.cpu, "get_capabilities", dict)()  # not in torch 2.11
        return torch.backends.mkl.is_available() and "AMD" in str(capabilities.get("cpu_name"))

    def environment(self) -> dict[str, str | int | bool]:
        """Return what must be equal for two runs to be equal bit for bit."""
        processor = f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
        products: dict[str, str | int | bool] = {"matrix products": "oneDNN"} if self.multiplies_by_onednn() else {}
        return products | {
            "device": torch.cuda.get_device_name() if self.device.type == "cuda" else processor,
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
            "precision": PRECISION_NAMES[self.dtype],
            "compile": self.compile,
            "ranks": self.world_size,
        }


def initialize_runtime(precision: str = "fp32", compile: str | bool = False) -> Runtime:
    """Choose device and precision, make torch deterministic, and join the other ranks under torchrun.

    `precision` is fp32, bf16 or auto; `compile` is True, False or "auto". Raises UserError if True is impossible.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS is deterministic only with this
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # torch sets it so too
    _keep_freed_memory()
    check_environment()
    world_size = get_world_size()
    device, backend = torch.device("cpu"), "gloo"
    if torch.cuda.is_available():
        local_rank, num_devices = int(os.environ.get("LOCAL_RANK") or 0), torch.cuda.device_count()
        if local_rank >= num_devices:
            raise UserError(f"there are more ranks than GPUs on this machine; set --nproc-per-node to {num_devices}")
        device, backend = torch.device("cuda", local_rank), "nccl"
        torch.cuda.set_device(device)
    if world_size > 1 and not dist.is_initialized():
        # The timeout is long because rank 0 may prepare a corpus for hours while the other ranks wait.
        device_id = device if backend == "nccl" else None
        dist.init_process_group(backend, timeout=timedelta(days=1), device_id=device_id)
    return Runtime(
        device=device,
        dtype=_choose_dtype(precision, device),
        compile=bool(compile) and _can_compile(device, compile),
        rank=get_rank(),
        world_size=world_size,
    )


def fast_dtype(device: torch.device) -> torch.dtype:
    """Return the precision in which a device multiplies faster: bf16 if it has instructions for it, else fp32."""
    if device.type == "cuda":
        has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    elif platform.machine() in ("x86_64", "AMD64"):
        limit = os.environ.get("ONEDNN_MAX_CPU_ISA", "").upper()  # the instructions that torch's library may use
        has_bf16 = limit not in ISA_WITHOUT_BF16 and (
            torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        )
    else:  # ARM
        has_bf16 = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return torch.bfloat16 if has_bf16 else torch.float32


def available_memory(runtime: Runtime) -> int:
    """Return how many bytes this rank may still allocate."""
    if runtime.device.type == "cuda":
        return int(torch.cuda.mem_get_info()[0])
    return int(psutil.virtual_memory().available) // int(os.environ.get("LOCAL_WORLD_SIZE") or 1)


def check_finite(outputs: torch.Tensor) -> None:
    """Raise Failure for outputs of a model that are NaN or infinite."""
    if not torch.isfinite(outputs).all():
        raise Failure(
            "the model's outputs are not finite: its weights are too large for the precision of the arithmetic"
        )


def is_out_of_memory(error: Exception) -> bool:
    """Return whether the error is that of Python, of a GPU or of torch's allocator for CPUs when out of memory."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def _choose_dtype(precision: str, device: torch.device) -> torch.dtype:
    if precision == "auto":
        return fast_dtype(device)
    return torch.bfloat16 if precision == "bf16" else torch.float32


def _can_compile(device: torch.device, setting: str | bool) -> bool:
    """Return whether torch.compile has what it needs. If not, log what is missing, or raise UserError."""
    missing = _missing_for_compile(device)
    if not missing:
        return True
    if setting != "auto":
        raise UserError(f"train.compile is true, but that needs {missing}; install it, or set train.compile to auto")
    logger.info(f"the model runs uncompiled, which is slower: torch.compile needs {missing}")
    return False


def _missing_for_compile(device: torch.device) -> str:
    """Name what torch.compile needs and does not find; "" if nothing is missing."""
    if device.type == "cuda":
        if torch.cuda.get_device_capability() < (7, 0):
            return "a GPU of compute capability 7.0 or newer"
        compiler_found = shutil.which(os.environ.get("CC", "gcc")) or shutil.which("clang")
        return "" if compiler_found else "a C compiler (gcc)"
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        return "Python's headers (python3-dev)"
    compiler = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")
    return "" if shutil.which(compiler) else f"a C++ compiler ({compiler})"


def _keep_freed_memory() -> None:
    """Let the C library keep the memory of freed tensors for the next ones.

    glibc otherwise returns large blocks to the system and requests them again, cleared page by page, several times a
    step. See mallopt(3); other C libraries have no such setting.
    """
    if sys.platform != "linux":
        return
    M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
    c_library = ctypes.CDLL(None)
    if hasattr(c_library, "mallopt"):
        c_library.mallopt(M_MMAP_MAX, 0)  # allocate every block on the heap
        c_library.mallopt(M_TRIM_THRESHOLD, -1)  # never shrink the heap
