"""What the hardware computes faster."""

import platform
import sys
from pathlib import Path

import pytest
import torch

from bertlite.core.runtime import Runtime, fast_dtype

CPU = torch.device("cpu")


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/cpuinfo")
def test_processors_with_instructions_for_bf16_use_them(monkeypatch):
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
    flags = set(Path("/proc/cpuinfo").read_text().split())
    has_bf16 = flags & {"avx512_bf16", "amx_bf16", "bf16"}  # x86 and ARM
    assert fast_dtype(CPU) == (torch.bfloat16 if has_bf16 else torch.float32)


@pytest.mark.skipif("x86" not in platform.machine(), reason="the variable names x86 instructions")
def test_instructions_that_are_switched_off_are_not_used(monkeypatch):
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "avx512_core")
    assert fast_dtype(CPU) == torch.float32


@pytest.mark.parametrize(
    ("dtype", "setting", "expected"),
    [
        (torch.bfloat16, "auto", "bf16 (native)"),
        (torch.float32, "auto", "fp32 (no native bf16)"),
        (torch.float32, "fp32", "fp32"),
    ],
)
def test_the_precision_is_explained(dtype, setting, expected):
    assert Runtime(CPU, dtype, compile=False).describe_precision(setting) == expected
