"""The report of a run: what it shows is what was recorded, and text is never more than text."""

import json
import re
import shutil
from dataclasses import replace
from html.parser import HTMLParser

import markdown
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from mbrl_text_env.agents.collection import collect
from mbrl_text_env.benchmarks import compare as comparisons
from mbrl_text_env.benchmarks.charts import Series, of_curves, of_rows
from mbrl_text_env.benchmarks.cli import app
from mbrl_text_env.benchmarks.compare import compare, read_rows
from mbrl_text_env.benchmarks.page import (
    Page,
    answers_markdown,
    embedded_json,
    rendered,
    token_ends,
)
from mbrl_text_env.benchmarks.report import search_page, verdict
from mbrl_text_env.benchmarks.reports import write_report
from mbrl_text_env.benchmarks.statistics import Interval
from mbrl_text_env.benchmarks.terminal import visible
from mbrl_text_env.records import RecordWriter, read_records
from tests.benchmarks.test_compare import LM, PROMPTS, Fussy, toy_comparison
from tests.benchmarks.test_search_view import searched
from tests.toys import CountReward

HOSTILE = (
    "<script>alert(1)</script>", "</script><img src=x onerror=alert(1)>", "[red]not red[/red]",
    "\x1b[31mred\x1b[0m \r gone", "]]> <!-- -->", "\u202eright to left\u202c \u200f \u2028 end",
    "{{ 7 * 7 }} {% raw %}", "&lt;b&gt; \"quoted' `ticks`", "\ud800 half",
)  # fmt: skip


class Read(HTMLParser):
    """Tags, attributes, texts, scripts and the cells of the tables of a page."""

    def __init__(self, html):
        super().__init__(convert_charrefs=True)
        self.tags, self.attributes, self.texts, self.scripts, self.tables = [], [], [], [], []
        self.open = ""
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag in ("script", "td", "th"):
            self.open = tag
        starts = {"table": [self.tables], "tr": self.tables[-1:], "script": [self.scripts]}
        starts |= dict.fromkeys(("td", "th"), self.tables[-1][-1:] if self.tables else [])
        for place in starts.get(tag, []):
            place.append([] if tag in ("table", "tr") else "")

    def handle_endtag(self, tag):
        if tag == self.open:
            self.open = ""

    def handle_data(self, data):
        if self.open == "script":
            self.scripts[-1] += data
            return
        self.texts.append(data)
        if self.open:
            self.tables[-1][-1][-1] += data

    @property
    def data(self):
        return json.loads(self.scripts[0])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("compared")
    compare(toy_comparison(), path)
    return path


def test_every_figure_is_that_of_the_summary(folder):
    page = Read((folder / "report.html").read_text())
    summary = json.loads((folder / "summary.json").read_text())
    assert page.data["summary"] == summary
    quality, cost = page.tables[:2]
    for entry, shown, spent in zip(summary["agents"], quality[1:], cost[1:], strict=True):
        versus = entry["vs_best_of_n"]
        assert shown == [
            entry["agent"],
            f"{entry['mean']:.3f} [{entry['low']:.3f}, {entry['high']:.3f}]",
            f"{versus['difference']:+.3f} [{versus['low']:+.3f}, {versus['high']:+.3f}]",
            f"{versus['win_rate']:.0%}",
        ]
        assert spent[:2] == [entry["agent"], f"{entry['generated_tokens']:.0f}"]
        for name, figure in zip(shown[:1] * 2, shown[1:3], strict=True):
            # What a chart says of each mark; best-of-N is not compared with itself.
            assert f"{name}: {figure}" in page.texts or (name, figure[:2]) == ("best-of-n", "+0")
    assert verdict(summary) in page.texts


def test_every_answer_is_there(folder):
    answers = Read((folder / "report.html").read_text()).data["answers"]
    rows = read_rows(folder / "results.jsonl")
    assert answers["columns"][answers["baseline"]] == "best-of-n"
    found = {
        (column, row["id"]): cell
        for row in answers["rows"]
        for column, cell in zip(answers["columns"], row["cells"], strict=True)
    }
    assert len(found) == len(rows)
    for row in rows:
        cell = found[row["agent"], row["prompt_id"]]
        assert "".join(cell["pieces"]) == row["response"]
        assert cell["score"] == row["score"]
        assert len(cell["logprobs"]) == row["response_tokens"]
        assert sum(cell["logprobs"]) == pytest.approx(row["logprob"], abs=0.01)


def test_it_is_made_again_from_what_was_recorded(folder, tmp_path):
    assert write_report(folder, tmp_path / "again.html") == tmp_path / "again.html"
    assert (tmp_path / "again.html").read_bytes() == (folder / "report.html").read_bytes()
    result = CliRunner().invoke(app, ["report", str(tmp_path)])
    assert result.exit_code == 2
    assert "or of records, got none of their files" in " ".join(result.output.split())
    shutil.copytree(folder, tmp_path / "damaged")
    (tmp_path / "damaged" / "results.jsonl").write_text("{")
    result = CliRunner().invoke(app, ["report", str(tmp_path / "damaged")])
    assert result.exit_code == 2
    assert "damaged" in result.output


def test_it_is_written_as_the_run_goes(tmp_path, monkeypatch):
    monkeypatch.setattr(comparisons, "_REPORT_SECONDS", 0.0)
    seen = []

    def look(spec, count, rows):
        page = tmp_path / "report.html"
        seen.append(len(Read(page.read_text()).data["answers"]["rows"]) if page.exists() else 0)

    compare(toy_comparison(), tmp_path, on_batch=look)
    assert seen == [0, 0, 6, 6, 6, 12, 12, 12, 18, 18, 18, 20]
    assert "is not finished" not in (tmp_path / "report.html").read_text()


def test_a_prompt_without_a_score_has_its_error(tmp_path):
    compare(replace(toy_comparison(), reward_model=Fussy({"p3"})), tmp_path)
    rows = Read((tmp_path / "report.html").read_text()).data["answers"]["rows"]
    [row] = [row for row in rows if row["id"] == "p3"]
    assert all(cell["score"] is None for cell in row["cells"])
    assert all("ZeroDivisionError" in cell["error"] for cell in row["cells"])


def poisoned(folder, target):
    """A comparison whose prompts, answers and names are hostile."""
    shutil.copytree(folder, target)
    rows = read_rows(target / "results.jsonl")
    for i, row in enumerate(rows):
        text = HOSTILE[i % len(HOSTILE)]
        row.update(prompt=text, response=text, parts={text: 1.0}, token_ends=[1, len(text)])
    with (target / "results.jsonl").open("w") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    summary = json.loads((target / "summary.json").read_text())
    summary.update(reward=HOSTILE[1], warnings=list(HOSTILE), label=HOSTILE[0], value=HOSTILE[5])
    (target / "summary.json").write_text(json.dumps(summary))
    (target / "run.json").write_text(json.dumps({"command": HOSTILE[0], "host": HOSTILE[1]}))
    return target


def test_text_is_never_markup_or_script(folder, tmp_path):
    harmless = Read((folder / "report.html").read_text())
    html = write_report(poisoned(folder, tmp_path / "a")).read_text(encoding="utf-8")
    page = Read(html)
    assert len(page.scripts) == len(harmless.scripts) == 2
    assert page.scripts[1] == harmless.scripts[1]
    assert set(page.tags) <= set(harmless.tags) | {"li", "pre"}
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    assert visible(html) == html, "nothing in it controls, overwrites or reorders the line"
    for text in HOSTILE:
        assert visible(text) in page.texts
    answers = page.data["answers"]["rows"]
    assert {row["prompt"] for row in answers} <= {visible(text) for text in HOSTILE}
    assert {"".join(c["pieces"]) for row in answers for c in row["cells"] if "pieces" in c} <= {
        visible(text) for text in HOSTILE
    }


def test_answers_in_markdown_are_text_alone(folder, tmp_path):
    """As MkDocs reads it; an empty line would end the HTML for other readers."""
    texts = [
        *HOSTILE,
        "```\ncode\n```",
        "# a\n\n- b",
        "[a](b) *c* `d` <https://e.f>",
        "[a]: b",
        "|a|b|",
    ]
    rows = [{"prompt": t, "cells": [{"text": t, "score": 0.5}, None]} for t in texts]
    data = {"columns": [HOSTILE[1], "b"], "rows": rows}
    source = answers_markdown(Page("", data={"answers": data}))
    tables = source.strip().split("\n\n")
    assert len(tables) == len(texts)
    assert all(table.startswith("<table>") and table.endswith("</table>") for table in tables)
    extensions = ["tables", "attr_list", "toc", "pymdownx.highlight", "pymdownx.superfences"]
    page = Read(markdown.markdown(source, extensions=extensions))
    assert set(page.tags) == {"table", "tr", "th", "td", "br"}
    for text, [[prompt], names, cells] in zip(texts, page.tables, strict=True):
        shown = visible(text).strip().replace("\n", "")
        assert (prompt, cells, names[0]) == (shown, [shown, ""], f"{HOSTILE[1]} (0.500)")
    result = CliRunner().invoke(app, ["report", str(folder), "--out", str(tmp_path / "a.md")])
    assert result.exit_code == 0
    rows = read_rows(folder / "results.jsonl")
    assert (tmp_path / "a.md").read_text().count("<td>") == len(rows)


def test_nothing_is_fetched(folder):
    html = (folder / "report.html").read_text()
    assert not re.findall(r"""(?:src|href)\s*=|url\(|@import|https?://""", html)
    assert "default-src 'none'" in html
    assert "script-src 'sha256-" in html


LEAVES = st.text() | st.floats() | st.none()


@given(st.recursive(LEAVES, lambda x: st.lists(x) | st.dictionaries(st.text(), x)))
def test_embedded_json_ends_no_block(data):
    text = embedded_json(data)
    assert not set(text) & set("<>&\u2028\u2029")
    json.loads(text)


def entry(agent, difference=None, low=None, high=None, mean=0.5, prompts=20):
    versus = {"difference": difference, "low": low, "high": high, "prompts": prompts}
    return {
        "agent": agent, "mean": mean, "low": mean - 0.1, "high": mean + 0.1,
        **({} if difference is None else {"vs_best_of_n": versus}),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("entries", "expected"),
    [
        ([entry("a", 0.2, 0.1, 0.3)], "a beats best-of-n in joy by +0.200 [+0.100, +0.300]"),
        ([entry("a", 0.2, -0.1, 0.3)], "Not decided: a minus best-of-n is +0.200"),
        ([entry("a", -0.2, -0.3, -0.1), entry("b", -0.4, -0.5, -0.3)], "the closest, a, is at"),
        ([entry("a", 0.2, 0.1, 0.3, prompts=7)], "a conclusion needs at least 8 prompts"),
        ([entry("b", 0.1, 0.05, 0.2), entry("a", 0.2, 0.1, 0.3)], "a beats best-of-n"),
    ],
)
def test_the_verdict_claims_no_more_than_the_intervals(entries, expected):
    budget = {"budget_tokens": 64, "budget_flops": None, "budget_seconds": None}
    summary = {"reward": "joy", "prompts": ["p"] * 20, "warnings": [], **budget}
    found = verdict({**summary, "agents": [entry("best-of-n", 0.0, 0.0, 0.0), *entries]})
    assert expected in found
    alone = verdict({**summary, "agents": [entry("sampling", mean=0.4), entry("random")]})
    assert alone.startswith("random has the highest mean joy, 0.500 [0.400, 0.600], of 2 agents")


FIGURES = st.floats(-1e6, 1e6, allow_nan=False)


@given(st.lists(st.tuples(FIGURES, FIGURES, FIGURES, FIGURES), min_size=1, max_size=6))
def test_marks_stand_within_the_axes_and_in_order(rows):
    ordered = [sorted(figures) for _, *figures in rows]
    intervals = [Interval(middle, low, high) for low, middle, high in ordered]
    one = Series("a", [x for x, *_ in rows], intervals)
    for chart in (
        of_curves("t", "x", "y", [one]),
        of_rows("t", "x", {str(k): {"": i} for k, i in enumerate(intervals)}),
    ):
        assert 1 <= len(chart.x_ticks) <= 12
        for mark in chart.marks:
            assert 0 <= mark.x <= chart.width
            assert 0 <= mark.y <= chart.height
            low, high = (mark.high, mark.low) if not chart.rows else (mark.low, mark.high)
            assert low - 0.02 <= (mark.x if chart.rows else mark.y) <= high + 0.02


def test_places_by_hand():
    one = Series("a", [1.0, 2.0, 4.0], [Interval(y, y - 1, y + 1) for y in (1.0, 2.0, 3.0)])
    chart = of_curves("t", "N", "y", [one], is_log=True)
    first, second, third = chart.marks
    assert second.x - first.x == pytest.approx(third.x - second.x)
    assert first.y - second.y == pytest.approx(second.y - third.y)
    assert second.high == pytest.approx(third.y)
    assert [tick.text for tick in chart.x_ticks] == ["1", "2", "4"]
    assert [tick.text for tick in chart.y_ticks] == ["0", "1", "2", "3", "4"]
    assert len(chart.bands[0].split()) == 6


def test_where_tokens_end():
    letters = {1: "ab", 2: "c", 3: ""}
    assert token_ends(lambda ids: "".join(letters[i] for i in ids), [1, 2, 3]) == [2, 3, 3]
    data = "é!".encode()
    parts = [data[:1], data[1:2], data[2:]]

    def decode(ids):
        return b"".join(parts[i] for i in ids).decode("utf-8", "replace")

    assert token_ends(decode, [0, 1, 2]) == [0, 1, 2]


def test_a_search_is_embedded_whole():
    search = searched()
    infinite = [np.inf] * len(search["nodes"])
    run = {"command": "mbrl-text search", "date": "today"}
    page = Read(rendered(search_page(search, infinite, {"agent": "beam"}, run)))
    nodes = [{**node, "bound": None} for node in search["nodes"]]
    assert page.data["search"] == {**search, "nodes": nodes}
    bounded = Read(rendered(search_page(search, range(len(nodes)), {"agent": "beam"}, run)))
    shown = [node["bound"] for node in bounded.data["search"]["nodes"]]
    assert shown == [None if n["finish_reason"] else n["index"] for n in search["nodes"]]
    assert 0 < shown.count(None) < len(shown)
    chosen = search["nodes"][search["chosen"]]
    assert f"From {len(nodes) - 1} chunks, the search chose node {chosen['index']}" in " ".join(
        page.texts
    )


def test_records_have_a_report(tmp_path):
    prompts = PROMPTS[:4]
    with RecordWriter(tmp_path / "records") as writer:
        collect(LM, CountReward(), prompts, writer, samples_per_prompt=2, max_response_tokens=6)
    path = write_report(tmp_path / "records")
    assert path == tmp_path / "records-report.html"
    page, records = Read(path.read_text()), read_records(tmp_path / "records")
    by_prompt = {p.id: [r.score for r in records if r.prompt_id == p.id] for p in prompts}
    one, two = page.data["curve"]
    assert one["mean"]["mean"] == pytest.approx(np.mean(list(by_prompt.values())))
    assert two["mean"]["mean"] == pytest.approx(np.mean([max(s) for s in by_prompt.values()]))
    lengths = [len(record.response_ids) for record in records]
    assert (one["cost"], two["cost"]) == (np.mean(lengths), 2 * np.mean(lengths))
    for row in page.data["answers"]["rows"]:
        assert [cell["score"] for cell in row["cells"]] == by_prompt[row["id"]]


def test_an_empty_page_is_a_page():
    page = Read(rendered(Page("nothing")))
    assert page.data == {}
    assert page.tables == []


def test_one_response_to_one_prompt_has_a_report(tmp_path):
    with RecordWriter(tmp_path / "records") as writer:
        collect(LM, CountReward(), PROMPTS[:1], writer, samples_per_prompt=1, max_response_tokens=6)
    [record] = read_records(tmp_path / "records")
    [point] = Read(write_report(tmp_path / "records").read_text()).data["curve"]
    assert point["mean"] == {"mean": record.score, "low": record.score, "high": record.score}
