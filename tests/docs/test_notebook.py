"""docs/notebook.ipynb runs, and shows what it says."""

from pathlib import Path

import pytest

DOCS = Path(__file__).parents[2] / "docs"


@pytest.mark.slow
def test_the_notebook_runs_from_its_first_cell_to_its_last(tmp_path: Path, monkeypatch) -> None:
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    pytest.importorskip("pandas")
    monkeypatch.setenv("XLA_FLAGS", "")
    notebook = nbformat.read(DOCS / "notebook.ipynb", as_version=4)
    client = nbclient.NotebookClient(
        notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}
    )
    client.execute()
    shown = [
        "".join(str(one.get("data", one)) for one in c.get("outputs", [])) for c in notebook.cells
    ]
    code = [text for c, text in zip(notebook.cells, shown, strict=True) if c.cell_type == "code"]
    assert "valid_loss" in code[0]
    assert "grad_norm" in code[1]
    assert "text/html" in code[1]
    assert 0 < float(notebook.cells[5].outputs[-1]["data"]["text/plain"]) < 5
    assert notebook.cells[7].outputs[-1]["text"].strip()
