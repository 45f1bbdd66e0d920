"""docs/quickstart.ipynb runs from top to bottom."""

import nbformat
import pytest
from conftest import ROOT
from nbclient import NotebookClient

NOTEBOOK = ROOT / "docs" / "quickstart.ipynb"


@pytest.mark.exhaustive
def test_the_notebook_runs_from_top_to_bottom(tmp_path):
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    places = [cell.metadata.get("tags") == ["parameters"] for cell in notebook.cells]
    settings = "supervised.iterations=6 retrain.iterations=4 workers=0"
    source = (
        f"data, outdir = {str(tmp_path / 'data')!r}, {str(tmp_path)!r}\nsettings = {settings!r}"
    )
    notebook.cells[places.index(True)].source = source
    NotebookClient(notebook, timeout=900, resources={"metadata": {"path": ROOT / "docs"}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    text = "".join(output.get("text", "") for output in outputs)
    assert "Traceback" not in text
    assert "error:" not in text
    assert "unlabeled.txt has 108 lines" in text
    assert "6_retrain      mIoU" in text
    assert "probability by both" in text
    assert "report.html: open it in a browser" in text
    pictures = [output for output in outputs if "image/png" in output.get("data", {})]
    assert len(pictures) == 3
