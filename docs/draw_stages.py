"""Draw the graph of a small residual block at every stage, as SVG, from the graphs themselves.

    python docs/draw_stages.py [folder]          (default: docs/stages)

The layout is the simple half of Sugiyama's method: a node's row is its longest path from an input;
within a row, nodes stand in graph order. The model, and so each picture, is the same in every run.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from html import escape
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from qcompile.capture import capture
from qcompile.ir import Program, is_constant
from qcompile.manager import PassManager
from qcompile.passes import Context, default_pipeline

WIDTH, HEIGHT, GAP_X, GAP_Y, MARGIN = 190, 40, 24, 24, 12
FILL = {"float": "#dbe9ff", "int8": "#d9f2d9", "observer": "#fff2c6", "other": "#eeeeee"}


class Block(nn.Module):
    """Convolution, batch norm, relu, and a second convolution with a residual: what most CNNs are made of."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(self.bn2(self.conv2(y)) + x)


def label(node: fx.Node) -> str:
    """What a node does, in a few characters."""
    if node.op in ("placeholder", "output"):
        return "input" if node.op == "placeholder" else "output"
    if node.op == "call_module":
        return "observer"
    target: Any = node.target
    name = str(target).removesuffix(".default").replace("quantized_decomposed.", "")
    with_residual = name == "qcompile.conv2d" and node.kwargs.get("residual") is not None
    return f"{name} + residual" if with_residual else name


def kind(node: fx.Node) -> str:
    if node.op == "call_module":
        return "observer"
    value = node.meta.get("val")
    if not isinstance(value, Tensor):
        return "other"
    return {torch.int8: "int8", torch.float32: "float"}.get(value.dtype, "other")


def shape(node: fx.Node) -> str:
    value = node.meta.get("val")
    if not isinstance(value, Tensor):
        return ""
    return f"{str(value.dtype).removeprefix('torch.')} {' x '.join(map(str, value.shape))}"


def place(program: Program) -> dict[fx.Node, tuple[int, int]]:
    """Node -> (row, column)."""
    rows: dict[int, int] = defaultdict(int)
    placed: dict[fx.Node, tuple[int, int]] = {}
    for node in program.graph.nodes:
        if not is_constant(node):
            row = 1 + max((placed[n][0] for n in node.all_input_nodes if n in placed), default=-1)
            if not any(n in placed for n in node.all_input_nodes) and node.op != "placeholder":
                continue  # a weight on its way to its operator
            placed[node] = (row, rows[row])
            rows[row] += 1
    return placed


def draw(program: Program, title: str) -> str:
    """The graph as the text of an SVG file."""
    placed = place(program)
    width = MARGIN * 2 + (max(c for _, c in placed.values()) + 1) * (WIDTH + GAP_X)
    height = MARGIN * 2 + (max(r for r, _ in placed.values()) + 1) * (HEIGHT + GAP_Y)
    corner = {n: (MARGIN + c * (WIDTH + GAP_X), MARGIN + r * (HEIGHT + GAP_Y)) for n, (r, c) in placed.items()}
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
        f'viewBox="0 0 {width} {height}" font-family="sans-serif" font-size="12">',
        f"<title>{escape(title)}</title>",
        '<rect width="100%" height="100%" fill="white"/>',
    ]
    for node, (x, y) in corner.items():
        for source in node.all_input_nodes:
            if source in corner:
                parts.append(_edge(*corner[source], x, y))
    for node, (x, y) in corner.items():
        parts.append(
            f'<rect x="{x}" y="{y}" width="{WIDTH}" height="{HEIGHT}" rx="6" fill="{FILL[kind(node)]}" stroke="#555"/>'
        )
        middle = x + WIDTH // 2
        parts.append(f'<text x="{middle}" y="{y + 17}" text-anchor="middle">{escape(label(node))}</text>')
        parts.append(
            f'<text x="{middle}" y="{y + 32}" text-anchor="middle" fill="#555" font-size="10">{shape(node)}</text>'
        )
    return "\n".join([*parts, "</svg>"]) + "\n"


def _edge(x0: int, y0: int, x1: int, y1: int) -> str:
    """From the bottom of one box to the top of another; around the boxes between, if there are any."""
    start, end = (x0 + WIDTH // 2, y0 + HEIGHT), (x1 + WIDTH // 2, y1)
    if y1 - y0 <= HEIGHT + GAP_Y or x0 != x1:
        return f'<path d="M{start[0]},{start[1]} L{end[0]},{end[1]}" stroke="#555" fill="none"/>'
    side, half = x0 + WIDTH + GAP_X // 2, GAP_Y // 2
    return (
        f'<path d="M{start[0]},{start[1]} v{half} H{side} V{end[1] - half} H{end[0]} V{end[1]}" '
        'stroke="#555" fill="none"/>'
    )


def pictures() -> dict[str, str]:
    """File name -> SVG: the captured graph, then the graph after each pass that changed the picture."""
    torch.manual_seed(0)
    model, x = Block().eval(), torch.randn(1, 8, 16, 16)
    program = capture(model, (x,))
    context = Context(calibration=[x])
    drawn = {"capture.svg": draw(program, "a residual block")}
    for step in default_pipeline():
        PassManager((step,)).run(program, context)
        picture = draw(program, "a residual block")
        if picture not in drawn.values():
            drawn[f"{step.name}.svg"] = picture
    return drawn


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in pictures().items():
        (folder / name).write_text(text)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).with_name("stages"))
