"""docs/quickstart.ipynb runs from top to bottom."""

import nbformat
import pytest
from conftest import ROOT
from nbclient import NotebookClient

NOTEBOOK = ROOT / "docs" / "quickstart.ipynb"


@pytest.mark.slow
def test_the_notebook_runs_from_top_to_bottom(demo_root, tmp_path, tiny_settings):
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    places = [cell.metadata.get("tags") == ["parameters"] for cell in notebook.cells]
    settings = " ".join(f"'{word}'" for word in tiny_settings(demo_root, tmp_path))
    source = f"data, outdir = {str(demo_root)!r}, {str(tmp_path)!r}\nsettings = {settings!r}"
    notebook.cells[places.index(True)].source = source
    del notebook.cells[places.index(True) + 1 : places.index(True) + 3]  # draw the demo
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": ROOT / "docs"}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    text = "".join(output.get("text", "") for output in outputs)
    assert "Traceback" not in text
    assert "error:" not in text
    assert "6_retrain      mIoU" in text
    assert "report.html" in text
    pictures = [output for output in outputs if "image/png" in output.get("data", {})]
    assert len(pictures) == 3
