"""What the processor is told to do: each target's own dot product, no other's instructions, no float
multiply-add but the contract's, and accumulators that stay in registers."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache

import pytest
import torch
from disassembly import Code, functions, innermost_loops
from execution import CPUS
from networks import Residual, conv_norm, images, settle
from torch import Tensor, nn

import qcompile
from qcompile.compiled import CompiledModel

Builder = Callable[[], nn.Module]
# The instruction that takes the dot products, and its registers.
DOT = {
    "x86-amx": ("tdpbusd", "tmm"),
    "x86-avx512-vnni": ("vpdpbusd", "zmm"),
    "x86-avx512-bf16": ("vpdpbusd", "zmm"),
    "x86-avx2": ("vpmaddubsw", "ymm"),
    "arm64-dotprod": ("sdot", ".16b"),
    "arm64-neon": ("smull", ".8b"),
}
MULTIPLY_ADD = re.compile(r"vfn?m(add|sub|addsub|subadd)\d+[ps][sd]|fn?ml[as]|fn?m(add|sub)")
# Dot products and matrix products that came after the first 64-bit ARM.
LATER_ARM = re.compile(r"[us]u?dot|[us]u?mmla|bfdot|bfmmla")
# A vector register stored to the stack, in the words of either machine.
SPILL = re.compile(r"v?mov\S+ %[xyz]mm\d+(,.*)?,-?(0x)?[0-9a-f]*\(%r[sb]p.*|st[rpu]+ q\d+, .*\[(sp|x29).*")
every_target = pytest.mark.parametrize("target", CPUS)


class Plain(nn.Module):
    """Every way a float product could meet a sum, except the residual add: requantization with and without a
    clamp, averages, products, concatenation of different scales, float inputs and outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_norm(3, 32, 3, 2, activation=nn.ReLU())
        self.wide = conv_norm(32, 64, 3)
        self.each = conv_norm(64, 64, 3, groups=64, activation=nn.ReLU6())
        self.head = nn.Linear(128, 10)

    def forward(self, x: Tensor) -> Tensor:
        y = self.wide(self.stem(x))
        gate = torch.sigmoid(y.mean((2, 3), keepdim=True))
        both = torch.cat([self.each(y), nn.functional.avg_pool2d(y * gate, 3, 1, 1)], 1)
        return self.head(both.mean((2, 3)))


class WithResidual(nn.Module):
    """Three convolutions that tell themselves apart by their size; the last one adds."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_norm(3, 32, 7, 2, activation=nn.ReLU())
        body = nn.Sequential(conv_norm(32, 64, 3, activation=nn.ReLU()), conv_norm(64, 32, 5))
        self.block = Residual(body, 32, 32, 1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.block(self.stem(x))
        return y


class OneChannel(nn.Module):
    """A pair of products with one channel has one weight, and 255 * 127 fits 16 bits."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 16, 3)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv(x[:, :1])
        return y


@cache
def compiled(network: Builder, target: str) -> CompiledModel:
    model = settle(network(), images(4, 32, seed=1))
    return qcompile.compile(model, target, calibration=images(4, 32, seed=2).split(1), strict=True)


@cache
def code_of(network: Builder, target: str) -> dict[str, Code]:
    (variant,) = compiled(network, target).artifact.variants
    return dict(functions(variant))


def every_instruction(network: Builder, target: str) -> list[str]:
    return [f"{i.mnemonic} {i.operands}" for code in code_of(network, target).values() for i in code]


def kernels(network: Builder, target: str, *operators: str, within: str = "") -> dict[str, Code]:
    """The functions that compute ATen `operators` in the submodule `within`."""
    rows = compiled(network, target).coverage
    names = {row.kernel for row in rows if row.op in operators and row.where.startswith(within)}
    found = {symbol: code for symbol, code in code_of(network, target).items() if symbol.startswith(tuple(names))}
    assert len(found) >= len(names) > 0
    return found


@every_target
def test_convolutions_and_matrix_products_use_the_processors_dot_product(target: str) -> None:
    mnemonic, register = DOT[target]
    for symbol, code in kernels(WithResidual, target, "aten.conv2d.default").items():
        dots = [i for i in code if i.mnemonic == mnemonic and register in i.operands]
        assert len(dots) >= 8, symbol


@every_target
def test_floats_are_never_multiplied_and_added_in_one_step(target: str) -> None:
    assert [i for i in every_instruction(Plain, target) if MULTIPLY_ADD.match(i)] == []


@every_target
def test_except_in_the_residual_add_where_the_contract_says_so(target: str) -> None:
    residual = kernels(WithResidual, target, "aten.add.Tensor")
    fused = {s for s, code in code_of(WithResidual, target).items() for i in code if MULTIPLY_ADD.match(i.mnemonic)}
    assert fused
    assert fused == set(residual)


# (LLVM keeps two of the many products of arm64-neon, which has no dot product, on the stack.)
@pytest.mark.parametrize("target", ["x86-avx512-vnni", "x86-avx2", "arm64-dotprod"])
def test_accumulators_stay_in_registers(target: str) -> None:
    mnemonic, _ = DOT[target]
    for symbol, code in kernels(WithResidual, target, "aten.conv2d.default", within="block").items():
        loops = [loop for loop in innermost_loops(code) if any(i.mnemonic == mnemonic for i in loop)]
        assert loops, symbol
        spills = [str(i) for loop in loops for i in loop if SPILL.match(f"{i.mnemonic} {i.operands}")]
        assert spills == [], symbol


def test_avx2_code_has_no_avx512_instruction() -> None:
    """In 64-bit code an instruction that begins with 62 is an EVEX one, whatever its name."""
    for network in (Plain, WithResidual):
        code = [i for body in code_of(network, "x86-avx2").values() for i in body]
        assert [str(i) for i in code if i.encoding.startswith("62 ")] == []
        assert [str(i) for i in code if "zmm" in i.operands or i.mnemonic.startswith("vpdp")] == []
    other = [i for body in code_of(Plain, "x86-avx512-vnni").values() for i in body]
    assert any("zmm" in i.operands and i.encoding.startswith("62 ") for i in other)


def test_a_saturating_instruction_is_used_only_where_it_cannot_saturate() -> None:
    """Unproven weights give it their size alone, and their sign to the activation by an exclusive or."""
    for symbol, code in kernels(WithResidual, "x86-avx2", "aten.conv2d.default").items():
        loops = [loop for loop in innermost_loops(code) if any(i.mnemonic == "vpmaddubsw" for i in loop)]
        assert loops, symbol
        for loop in loops:
            assert _count(loop, "vpxor") == _count(loop, "vpmaddubsw"), symbol
    for symbol, code in kernels(OneChannel, "x86-avx2", "aten.conv2d.default").items():
        assert _count(code, "vpmaddubsw") > _count(code, "vpxor"), symbol


def _count(code: Code, mnemonic: str) -> int:
    return sum(i.mnemonic == mnemonic for i in code)


def test_neon_code_has_no_later_instruction() -> None:
    for network in (Plain, WithResidual):
        assert [i for i in every_instruction(network, "arm64-neon") if LATER_ARM.match(i)] == []
    assert any(LATER_ARM.match(i) for i in every_instruction(Plain, "arm64-dotprod"))
