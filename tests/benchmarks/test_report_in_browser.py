"""The report and the search viewer in a real browser: keys, order, filters, and nothing hostile.

A driver is added to the page's own script, so that its policy allows it, and writes what it found
into the page. Skipped where Debian's package `chromium` is not installed.
"""

import html
import json
import re
import shutil
import subprocess

import pytest

from mbrl_text_env.agents import Adaptive, BeamSearch
from mbrl_text_env.benchmarks import page as pages
from mbrl_text_env.benchmarks.compare import compare, read_rows
from mbrl_text_env.benchmarks.page import write_page
from mbrl_text_env.benchmarks.report import comparison_page, search_page
from mbrl_text_env.types import Budget
from mbrl_text_env.world_model import WorldModelValue
from tests.benchmarks.test_compare import toy_comparison
from tests.benchmarks.test_report import HOSTILE, poisoned
from tests.benchmarks.test_search_view import searched
from tests.world_model.test_value import Share
from tests.world_model.worlds import LIMIT, LM, PROMPTS, fitted

BROWSER = shutil.which("chromium") or shutil.which("chromium-headless-shell")
pytestmark = pytest.mark.skipif(
    BROWSER is None, reason="no browser: Debian's package `chromium` is not installed"
)

DRIVER = """
(() => {
  const at = (id) => document.getElementById(id), all = (q) => [...document.querySelectorAll(q)];
  const key = (name, where) => (where || document.activeElement)
    .dispatchEvent(new KeyboardEvent("keydown", { key: name, bubbles: true, cancelable: true }));
  const set = (id, value) => { at(id).value = value; at(id).dispatchEvent(new Event("input")); };
  const option = (id, text) => all(`#${id} option`).find((o) => o.textContent === text).value;
  const ids = () => all("article > .note").map((p) => p.textContent);
  const found = { errors: [] };
  addEventListener("error", (event) => found.errors.push(String(event.message)));
  addEventListener("securitypolicyviolation", (event) => found.errors.push(event.blockedURI));
  try { %s } catch (error) { found.errors.push(String(error.stack)); }
  const shown = document.createElement("pre");
  shown.id = "found";
  shown.textContent = JSON.stringify(found);
  document.body.append(shown);
})();
"""


@pytest.fixture
def opened(tmp_path, monkeypatch):
    """Opens a page, runs a driver in it and returns what it found, and the page's text."""

    def opener(page, driver, *, width=1000):
        parts = shutil.copytree(pages._PARTS, tmp_path / "parts", dirs_exist_ok=True)
        script = (pages._PARTS / "report.js").read_text() + DRIVER % driver
        (parts / "report.js").write_text(script)
        with monkeypatch.context() as patch:
            patch.setattr(pages, "_PARTS", parts)
            write_page(tmp_path / "page.html", page)
        profile = f"--user-data-dir={tmp_path / 'profile'}"
        words = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom", profile]
        words += [f"--window-size={width},800", (tmp_path / "page.html").as_uri()]
        done = subprocess.run(words, capture_output=True, text=True, timeout=300)
        [text] = re.findall(r'<pre id="found">(.*?)</pre>', done.stdout, re.DOTALL)
        found = json.loads(html.unescape(text))
        assert found.pop("errors") == []
        return found

    return opener


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("compared")
    compare(toy_comparison(), path)
    return path


def recorded(folder):
    summary = json.loads((folder / "summary.json").read_text())
    return summary, read_rows(folder / "results.jsonl")


def test_answers_are_sorted_filtered_searched_and_coloured(folder, opened):
    summary, rows = recorded(folder)
    score = {(row["agent"], row["prompt_id"]): row["score"] for row in rows}
    names = summary["prompts"]
    above = {p: score["sampling", p] - score["best-of-n", p] for p in names}
    found = opened(
        comparison_page(summary, rows, {}),
        """
        found.all = ids();
        set("sort", option("sort", "sampling most below best-of-n"));
        found.sorted = ids();
        set("filter", option("filter", "sampling worse than best-of-n"));
        found.worse = ids();
        set("filter", "0"); set("sort", "0"); set("find", "P1");
        found.sought = ids();
        set("find", "");
        at("colour").click();
        found.tokens = all(".token").length;
        found.width = document.documentElement.scrollWidth;
        key("/", document.body); found.slash = document.activeElement.id;
        const focused = () => ids()[all("article").indexOf(document.activeElement)];
        key("Escape"); key("j", document.body); found.j = focused();
        key("j"); key("j"); key("k"); found.jjk = focused();
        """,
        width=500,
    )  # fmt: skip
    assert found["all"] == names
    assert found["sorted"] == sorted(names, key=lambda p: above[p])
    assert found["worse"] == [p for p in found["sorted"] if above[p] < 0]
    assert found["sought"] == [p for p in names if "p1" in p]
    assert found["tokens"] == sum(row["response_tokens"] for row in rows)
    assert found["width"] <= 500
    assert (found["slash"], found["j"], found["jjk"]) == ("find", names[0], names[1])


def test_hostile_texts_are_shown_and_do_nothing(folder, tmp_path, opened):
    summary, rows = recorded(poisoned(folder, tmp_path / "a"))
    found = opened(
        comparison_page(summary, rows, {"command": HOSTILE[0]}),
        """
        window.alert = () => found.errors.push("alert");
        at("colour").click();
        found.prompts = all("article > h3").map((h) => h.textContent);
        found.scripts = document.scripts.length; found.images = document.images.length;
        """,
    )
    assert (found["scripts"], found["images"]) == (2, 0)
    assert set(found["prompts"]) == {pages.visible(text) for text in HOSTILE}


def test_a_thousand_prompts_are_made_row_by_row(folder, opened):
    summary, rows = recorded(folder)
    agents = [entry["agent"] for entry in summary["agents"]]
    names = [f"q{k}" for k in range(1000)]
    long = {"response": "word " * 100, "token_ends": [], "token_logprobs": []}
    many = [
        {**rows[0], **long, "agent": a, "prompt_id": name, "prompt": f"Question {name}?"}
        for a in agents
        for name in names
    ]
    found = opened(
        comparison_page({**summary, "prompts": names}, many, {}),
        """found.rows = all("article").length; set("find", "q999"); found.one = ids();
        found.milliseconds = performance.now();""",
    )
    assert found["rows"] == 20
    assert found["one"] == ["q999"]
    print(f"{found['milliseconds']:.0f} ms to load 1,000 prompts and find one")


def test_a_search_is_stepped_through(opened):
    search = {**searched(Adaptive, tokens=150), "prompt": HOSTILE[0]}
    nodes, run = search["nodes"], {"command": ""}
    found = opened(
        search_page(search, [1.0] * len(nodes), {}, run),
        """
        const items = () => all("#tree li").map((li) => Number(li.dataset.node));
        const selected = () => document.querySelector("#tree [aria-selected=true]");
        const chosen = () => Number(selected().dataset.node);
        found.first = chosen(); found.all = items();
        at("path").click(); found.path = items();
        at("all").click(); set("time", 3); found.three = items(); found.at = chosen();
        at("forth").click(); found.four = items();
        at("back").click(); at("back").click(); found.two = items();
        set("time", 1000); document.querySelector("#tree li").click();
        found.root = chosen(); found.candidates = all("#node tbody tr").length;
        key("ArrowRight"); found.right = chosen();
        key("ArrowLeft"); key("ArrowLeft"); found.left = chosen();
        found.focus = document.activeElement.dataset.node;
        """,
    )  # fmt: skip
    everything = list(range(len(nodes)))
    below = [node["index"] for node in nodes[1:] if node["parent"] == 0]
    on_path = {node["index"] for node in nodes if node["chosen"]}
    assert found["first"] == search["chosen"]
    assert sorted(found["all"]) == everything
    assert set(found["path"]) == on_path | {
        node["index"] for node in nodes if node["parent"] in on_path
    }
    for name, last in (("three", 3), ("four", 4), ("two", 2)):
        assert sorted(found[name]) == everything[: last + 1]
    assert found["at"] == 3
    assert (found["root"], found["candidates"]) == (0, len(below))
    assert found["right"] == below[0]
    assert (found["left"], found["focus"]) == (0, "0")


def test_imagined_futures_are_shown_where_a_world_model_was_asked(opened):
    value = WorldModelValue(fitted(), Share())
    agent = BeamSearch(LM, Share(), value, max_response_tokens=LIMIT, chunk_tokens=2)
    [(_, tree)] = agent.explore(PROMPTS[:1], Budget(tokens=60), seed=1)
    search = tree.to_dict(LM)
    found = opened(
        search_page(search, [1.0] * len(tree.nodes), {}, {"command": ""}),
        """
        found.shown = all("#tree li").map((li) => {
          const node = Number(li.dataset.node);
          document.querySelector(`#tree li[data-node="${node}"]`).click();
          const figures = all("#node h3 + dl dd").slice(-8).map((dd) => dd.textContent);
          return [node, figures, at("node").textContent.includes("64 imagined futures")];
        });
        found.width = document.documentElement.scrollWidth;
        """,
        width=500,
    )  # fmt: skip
    assert found["width"] <= 500
    assert any(is_told for *_, is_told in found["shown"])
    for index, figures, is_told in found["shown"]:
        node = search["nodes"][index]
        assert is_told == (node["value"] is not None)
        if is_told:
            details = node["details"]
            parts = details["epistemic"], details["aleatoric"]
            assert figures == [f"{x:.3f}" for x in (node["value"], *details["quantiles"], *parts)]
