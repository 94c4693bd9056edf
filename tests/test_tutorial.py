"""The tutorial's notebook runs. With RENEW=1 its outputs are written again."""

import os
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).parents[1] / "docs" / "tutorial.ipynb"


def code(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def kinds(cell):
    """The outputs of a cell: streams by name, results by their formats."""
    shown = [output for output in cell.outputs if output.get("name") != "stderr"]
    return [output.get("name") or sorted(output.data) for output in shown]


@pytest.mark.slow
def test_the_notebook_runs(installed, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(installed))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    committed = [kinds(cell) for cell in code(notebook)]
    place = {"metadata": {"path": str(tmp_path)}}
    NotebookClient(notebook, timeout=300, resources=place, record_timing=False).execute()
    if os.environ.get("RENEW"):
        for cell in code(notebook):
            cell.outputs = [out for out in cell.outputs if out.get("name") != "stderr"]
        nbformat.write(notebook, NOTEBOOK)
    assert [kinds(cell) for cell in code(notebook)] == committed
    assert (tmp_path / "comparison" / "report.html").is_file()


def test_it_is_committed_as_it_ran_and_names_no_place():
    cells = code(nbformat.read(NOTEBOOK, as_version=4))
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    text = NOTEBOOK.read_text(encoding="utf-8")
    for name in ("home/", "tmp/", "root/", "work/", "Users", "Traceback", "Warning"):
        assert name not in text
