"""Show a comparison, a fit or a search: in the terminal, as a page or as a picture."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Group
from rich.table import Column, Table
from rich.text import Text
from rich.tree import Tree

from mbrl_text_env.agents.registry import parse_spec
from mbrl_text_env.benchmarks.audit.measures import MIN_PROMPTS
from mbrl_text_env.benchmarks.charts import Chart, Series, of_curves, of_rows
from mbrl_text_env.benchmarks.page import Page, answer
from mbrl_text_env.benchmarks.statistics import Interval
from mbrl_text_env.benchmarks.terminal import numbers, panel, plain, table_of, visible
from mbrl_text_env.files import write_file

if TYPE_CHECKING:
    from mbrl_text_env.agents.values import FittedValue


Node = Mapping[str, Any]
Children = Sequence[Sequence[int]]

BASELINE = "best-of-n"

_ANSWER_WIDTH = 44
_TEXT_WIDTH = 60
_LABEL_WIDTH = 26
_AUDIT_TELLS = "Run `mbrl-text reward audit` to see whether the reward is exploitable."


def table(summary: Mapping[str, Any]) -> Group:
    """A comparison as two tables that fit into 80 columns: quality and cost."""
    warnings = [Text(f"Warning: {warning}", style="yellow") for warning in summary["warnings"]]
    if warnings:
        warnings.append(Text(_AUDIT_TELLS))
    return Group(*tables(summary), *warnings)


def tables(summary: Mapping[str, Any]) -> tuple[Table, Table]:
    """A comparison's quality and its cost, for the terminal and the page."""
    entries, gold = summary["agents"], [f"mean {summary['gold']}"] if summary["gold"] else []
    failed = ", ".join(f"{e['agent']} {e['failed']}" for e in entries if e["failed"])
    failures = f" Prompts left out because scoring failed: {failed} (errors in results.jsonl)."
    quality = table_of(
        ((entry["agent"], *_quality(entry, len(gold))) for entry in entries),
        "agent",
        *numbers("mean reward", "minus best-of-N", "wins", *gold),
        title=f"Reward {summary['reward']!r}: {len(summary['prompts'])} prompts, "
        f"{shown_budget(summary)}, {summary['language_model']}",
    )
    cost = table_of(
        (
            (
                entry["agent"],
                f"{entry['generated_tokens']:.0f}",
                f"{entry['reward_calls']:.1f}",
                f"{entry['value_calls']:.1f}",
                # The size of a server's model can be unknown.
                f"{entry['flops'] / 1e9:.1f}" if entry["flops"] else "-",
                f"{entry['seconds']:.2f}",
            )
            for entry in entries
        ),
        "agent",
        *numbers("tokens", "reward calls", "value calls", "GFLOPs", "seconds"),
        title="Cost per prompt",
        caption="Means over prompts, 95% bootstrap intervals, differences paired by prompt. A tie "
        f"counts as half a win.{failures if failed else ''}",
    )
    return quality, cost


def _quality(entry: Mapping[str, Any], golds: int) -> list[str]:
    versus = entry.get("vs_best_of_n")
    beside = [f"{_paired(versus):+.3f}", f"{versus['win_rate']:.0%}"] if versus else ["-", "-"]
    gold = [f"{entry['gold']:.3f}" if "gold" in entry else "-"] * golds
    return [f"{Interval.of(entry):.3f}", *beside, *gold]


def _paired(versus: Mapping[str, Any]) -> Interval:
    return Interval(versus["difference"], versus["low"], versus["high"])


def verdict(summary: Mapping[str, Any]) -> str:
    """The result of a comparison in one sentence.

    An agent is better or worse than best-of-N if the interval of its paired difference excludes 0.
    """
    entries, baseline = summary["agents"], baseline_of(e["agent"] for e in summary["agents"])
    others = [e for e in entries if e["agent"] != baseline and e.get("vs_best_of_n")]
    prompts = f"{len(summary['prompts'])} prompts at {shown_budget(summary)}"
    if not others:
        top = max(entries, key=itemgetter("mean"))
        return (
            f"{top['agent']} has the highest mean {summary['reward']}, {Interval.of(top):.3f}, of "
            f"{len(entries)} agents on {prompts}. There is no comparison with best-of-N."
        )
    best = max(others, key=lambda entry: entry["vs_best_of_n"]["difference"])
    found, pairs = _paired(best["vs_best_of_n"]), best["vs_best_of_n"]["prompts"]
    figure = f"{found:+.3f} (95% interval, paired over {prompts})"
    if pairs < MIN_PROMPTS:
        return (
            f"Not decided: {best['agent']} minus {baseline} is {figure}, but a conclusion needs "
            f"at least {MIN_PROMPTS} prompts."
        )
    if found.low > 0:
        looks = ". See the warnings" if summary["warnings"] else ""
        return f"{best['agent']} beats {baseline} in {summary['reward']} by {figure}{looks}."
    if found.high < 0:
        return f"No agent reaches {baseline}: the closest, {best['agent']}, is at {figure}."
    return f"Not decided: {best['agent']} minus {baseline} is {figure}, which includes 0."


def baseline_of(specs: Iterable[str]) -> str | None:
    """The spec of the baseline, which is the first best-of-N; None without one."""
    return next((spec for spec in specs if parse_spec(spec)[0] == BASELINE), None)


def comparison_page(
    summary: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], run: Mapping[str, Any]
) -> Page:
    """Make a comparison's page from the contents of its files (`run` from `run.json`)."""
    warnings = [*summary["warnings"], *([_AUDIT_TELLS] if summary["warnings"] else [])]
    apart = ("agents", "prompts", "warnings", "format")
    agents = [entry["agent"] for entry in summary["agents"]]
    return Page(
        f"{summary['reward']}: {', '.join(agents)}",
        verdict(summary),
        warnings,
        _charts(summary),
        [*tables(summary), *_parts(summary)],
        {"summary": summary, "answers": _answers(agents, rows)},
        {"agents": ", ".join(agents), **{k: v for k, v in summary.items() if k not in apart}},
        run,
        len(rows) >= len(agents) * len(summary["prompts"]),
    )


def _charts(summary: Mapping[str, Any]) -> list[Chart]:
    entries = summary["agents"]
    names = [entry["agent"] for entry in entries]
    baseline = baseline_of(names)
    costs = (
        ("generated_tokens", 1.0, "generated tokens per prompt"),
        ("flops", 1e9, "GFLOPs per prompt"),
    )
    found = [
        of_curves(
            f"Reward against {label.partition(' per ')[0]}, with 95% intervals",
            label,
            f"mean {summary['reward']}",
            [Series(e["agent"], [e[key] / unit], [Interval.of(e)]) for e in entries],
            reference=None if baseline is None else names.index(baseline),
        )
        for key, unit, label in costs
        if any(entry[key] for entry in entries)
    ]
    paired = {
        e["agent"]: {"": _paired(e["vs_best_of_n"])}
        for e in entries
        if e["agent"] != baseline and e.get("vs_best_of_n")
    }
    if paired:
        label = f"{summary['reward']} minus that of {baseline}, 95% interval"
        found.append(of_rows("Differences from best-of-N on the same prompts", label, paired))
    return found


def _parts(summary: Mapping[str, Any]) -> list[Table]:
    """The means of the reward's parts, if it has several."""
    names = list(dict.fromkeys(name for entry in summary["agents"] for name in entry["parts"]))
    if len(names) < 2:
        return []
    rows = (
        (e["agent"], *(f"{e['parts'][n]:.3f}" if n in e["parts"] else "-" for n in names))
        for e in summary["agents"]
    )
    title = f"Mean parts of {summary['reward']!r}"
    return [table_of(rows, "agent", *numbers(*names), title=title)]


def _answers(agents: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    by_prompt: dict[str, dict[str, Any]] = {}
    for row in rows:
        own = by_prompt.setdefault(row["prompt_id"], {"prompt": row["prompt"]})
        own[row["agent"]] = answer(row.get("response", ""), row)
    baseline = baseline_of(agents)
    return {
        "columns": list(agents),
        "baseline": None if baseline is None else list(agents).index(baseline),
        "rows": [
            {"id": name, "prompt": own["prompt"], "cells": [own.get(agent) for agent in agents]}
            for name, own in by_prompt.items()
        ],
    }


def shown_budget(summary: Mapping[str, Any]) -> str:
    """Format the budget of a comparison.

    Example:
        >>> shown_budget({"budget_tokens": 400, "budget_flops": None, "budget_seconds": 1.5})
        '400 tokens, 1.5 seconds per prompt'
    """
    units = (("tokens", ""), ("FLOPs", ".4g"), ("seconds", ".4g"))
    caps = [(summary[f"budget_{unit.lower()}"], unit, spec) for unit, spec in units]
    shown = ", ".join(f"{cap:{spec}} {unit}" for cap, unit, spec in caps if cap is not None)
    return f"{shown} per prompt" if shown else "no budget"


def fit_table(value_model: FittedValue, reward: str) -> Group:
    """The quality of a fitted value model on held-out prompts: overall, and by prefix length."""
    found = value_model.report_
    whole = table_of(
        (
            ("records", f"{found.num_records}"),
            ("prompts", f"{found.num_prompts}"),
            ("prefixes", f"{found.num_prefixes}"),
            ("head", value_model.chosen_),
            ("correlation", f"{found.correlation:.3f}"),
            ("correlation within a prompt", f"{found.within_prompt:.3f}"),
            ("standard deviation of the error", f"{found.std:.3f}"),
            ("errors within one predicted std (ideal: 0.68)", f"{found.within_one_std:.3f}"),
            ("errors within two predicted stds (ideal: 0.95)", f"{found.within_two_std:.3f}"),
        ),
        "measured on held-out prompts",
        "",
        title=f"Value of {reward!r}",
    )
    lengths = table_of(
        (
            (
                str(row.length),
                str(row.num_prefixes),
                *(f"{figure:.3f}" for figure in (row.correlation, row.within_prompt, row.std)),
            )
            for row in found.by_length
        ),
        *numbers("prefix tokens", "prefixes", "correlation", "within a prompt", "error std"),
    )
    return Group(whole, *([lengths] if found.by_length else []))


def side_by_side(rows: Sequence[dict[str, Any]]) -> Group:
    """Show the responses to one prompt side by side; all rows have the same prompt."""
    # Limit the width, also if the output has none.
    grid = Table.grid(*(Column(max_width=_ANSWER_WIDTH) for _ in rows))
    grid.add_row(
        *(
            panel(row["response"].strip(), row["agent"], f"score {row['score']:.3f}")
            for row in rows
            if row["score"] is not None
        )
    )
    return Group(plain(f"Prompt: {rows[0]['prompt']}", style="bold"), grid)


@contextmanager
def png(path: Path, *, figsize: tuple[float, float], dpi: int = 150) -> Iterator[Any]:
    """Give a matplotlib figure to draw on, and write it as a PNG at the end."""
    # The object-oriented interface needs no display and leaves the user's backend alone.
    from matplotlib.figure import Figure

    figure = Figure(figsize=figsize, layout="constrained")
    yield figure
    with write_file(path) as scratch:
        figure.savefig(scratch, format="png", dpi=dpi)


def search_page(
    search: Mapping[str, Any],
    bounds: Sequence[float],
    settings: Mapping[str, Any],
    run: Mapping[str, Any],
) -> Page:
    """A search (`SearchTree.to_dict`) as a page to step through.

    `bounds` are upper bounds of the score of a response that begins with each node; infinite if
    unknown, and not shown for ended nodes. `run` comes from `provenance`.
    """
    nodes = [
        {**node, "bound": None if node["finish_reason"] else bound}
        for node, bound in zip(search["nodes"], bounds, strict=True)
    ]
    chosen = None if search["chosen"] is None else nodes[search["chosen"]]
    found = "chose no answer" if chosen is None else f"chose node {chosen['index']}"
    drawn = "1 chunk" if len(nodes) == 2 else f"{len(nodes) - 1} chunks"
    score = "" if chosen is None or chosen["score"] is None else f", score {chosen['score']:.3f}"
    note = "" if chosen is None or not chosen["note"] else f" ({chosen['note']})"
    return Page(
        f"Search: {_short(search['prompt'], 100)}",
        f"From {drawn}, the search {found}{score}{note}.",
        data={"search": {**search, "nodes": nodes}},
        settings=settings,
        run=run,
    )


def draw_tree(search: Mapping[str, Any], *, most_children: int = 4) -> Tree:
    """A search (`SearchTree.to_dict`) as a Rich tree: the chosen path in bold.

    Each node shows its chosen child and the best others by score or value, `most_children` in all.
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
    """Draw a search as a PNG: tokens on x, colour by score or value, the chosen path in bold."""
    nodes, children = search["nodes"], _children(search["nodes"])
    heights, order = np.zeros(len(nodes)), list(_depth_first(children))
    # Each leaf has its own line; other nodes are centred on their children.
    for line, leaf in enumerate(i for i in order if not children[i]):
        heights[leaf] = -line
    for index in reversed(order):
        if children[index]:
            heights[index] = np.mean(heights[children[index]])
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


def _worth(node: Node) -> float | None:
    worth: float | None = node["value"] if node["score"] is None else node["score"]
    return worth


def _rank(node: Node) -> tuple[bool, float]:
    worth = _worth(node)
    return not node["chosen"], float("inf") if worth is None else -worth


def _short(text: str, width: int = _TEXT_WIDTH) -> str:
    line = visible(" ".join(text.split()))
    return line if len(line) <= width else line[: width - 3] + "..."
