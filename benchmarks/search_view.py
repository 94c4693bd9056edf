"""What a planner looked at: its exported search drawn in the terminal and as a picture."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.text import Text
from rich.tree import Tree

from mbrl_text_env.benchmarks.report import png
from mbrl_text_env.benchmarks.terminal import visible

Node = Mapping[str, Any]
Children = Sequence[Sequence[int]]

_TEXT_WIDTH = 60
_LABEL_WIDTH = 26


def draw_tree(search: Mapping[str, Any], *, most_children: int = 4) -> Tree:
    """A search as a Rich tree: the chosen path in bold, beside it the best of what was not chosen.

    Args:
        search: What `SearchTree.to_dict` returns.
        most_children: Children shown of a node, the chosen one and those of the highest worth.

    Example:
        >>> rich.print(draw_tree(tree.to_dict(planner.language_model)))  # doctest: +SKIP
    """
    nodes, children = search["nodes"], _children(search["nodes"])
    drawn = {0: Tree(Text(_short(search["prompt"]), style="italic"))}
    for index in _depth_first(children):
        if index not in drawn:
            continue
        below = sorted(children[index], key=lambda i: _rank(nodes[i]))
        for child in sorted(below[:most_children]):
            drawn[child] = drawn[index].add(_line(nodes[child]))
        if len(below) > most_children:
            drawn[index].add(Text(f"and {len(below) - most_children} more", style="dim"))
    return drawn[0]


def picture(search: Mapping[str, Any], path: Path) -> None:
    """Draw a search as a PNG: tokens to the right, colour for worth, the chosen path thick.

    Args:
        search: What `SearchTree.to_dict` returns.
        path: Where to.
    """
    nodes, children = search["nodes"], _children(search["nodes"])
    heights = _heights(children)
    lengths = np.array([node["response_tokens"] for node in nodes], dtype=float)
    worths = np.array([_worth(node) for node in nodes], dtype=float)
    known = np.flatnonzero(np.isfinite(worths))
    leaves = sum(not below for below in children)
    with png(path, figsize=(11, min(40.0, max(3.0, 0.16 * leaves))), dpi=130) as figure:
        axes = figure.subplots()
        for node in nodes[1:]:
            ends = [node["parent"], node["index"]]
            chosen = bool(node["chosen"])
            axes.plot(
                lengths[ends],
                heights[ends],
                color="black" if chosen else "0.8",
                linewidth=2.0 if chosen else 0.7,
                zorder=1 + chosen,
            )
            if chosen:
                axes.annotate(
                    _short(node["text"], _LABEL_WIDTH),
                    (lengths[node["index"]], heights[node["index"]]),
                    textcoords="offset points",
                    xytext=(-2, 5),
                    ha="right",
                    fontsize=6,
                    parse_math=False,
                )
        if len(known):
            dots = axes.scatter(
                lengths[known],
                heights[known],
                c=worths[known],
                s=[34 if nodes[i]["score"] is not None else 14 for i in known],
                cmap="viridis",
                zorder=3,
            )
            figure.colorbar(dots, label="score or value")
        axes.set_xlabel("response tokens")
        axes.set_yticks([])
        axes.set_title(_short(search["prompt"], 100), fontsize=9, parse_math=False)


def _line(node: Node) -> Text:
    worth = "score" if node["score"] is not None else "value"
    line = Text()
    if _worth(node) is not None:
        line.append(f"{worth} {_worth(node):.3f}", style="green" if worth == "score" else "cyan")
        if node["std"]:
            line.append(f" ± {node['std']:.3f}", style="cyan")
        line.append("  ")
    line.append(_short(node["text"]), style="bold" if node["chosen"] else "")
    if node["visits"]:
        line.append(f"  {node['visits']} visits, mean {node['mean']:.3f}", style="magenta")
    if node["note"]:
        line.append(f"  ({node['note']})", style="dim")
    return line


def _children(nodes: Sequence[Node]) -> list[list[int]]:
    children: list[list[int]] = [[] for _ in nodes]
    for node in nodes[1:]:
        children[node["parent"]].append(node["index"])
    return children


def _depth_first(children: Children) -> Iterator[int]:
    stack = [0]
    while stack:
        index = stack.pop()
        yield index
        stack.extend(reversed(children[index]))


def _heights(children: Children) -> np.ndarray[Any, np.dtype[np.float64]]:
    """A line of its own for each leaf; other nodes stand in the middle of their children."""
    heights = np.zeros(len(children))
    order = list(_depth_first(children))
    for line, leaf in enumerate(i for i in order if not children[i]):
        heights[leaf] = -line
    for index in reversed(order):
        if children[index]:
            heights[index] = np.mean(heights[list(children[index])])
    return heights


def _worth(node: Node) -> float | None:
    worth: float | None = node["value"] if node["score"] is None else node["score"]
    return worth


def _rank(node: Node) -> tuple[bool, float]:
    worth = _worth(node)
    return not node["chosen"], float("inf") if worth is None else -worth


def _short(text: str, width: int = _TEXT_WIDTH) -> str:
    line = visible(" ".join(text.split()))
    return line if len(line) <= width else line[: width - 3] + "..."
