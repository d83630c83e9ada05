"""The quick start and the README's notebook lines run as they stand."""

import re
import runpy
import sys

import nbformat
import pytest
from nbclient import NotebookClient


@pytest.fixture
def in_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_quickstart_runs(request, tiny_folder, in_folder, monkeypatch, capsys):
    script = request.config.rootpath / "examples" / "quickstart.py"
    monkeypatch.setattr(sys, "argv", [str(script), str(tiny_folder)])
    runpy.run_path(str(script), run_name="__main__")
    assert (in_folder / "heart.png").exists()
    assert "described:" in capsys.readouterr().out


def test_readme_lines_run(request, tiny_folder, in_folder):
    readme = (request.config.rootpath / "README.md").read_text()
    code = re.search(r"```python\n(import unimm\nfrom transformers.*?)```", readme, re.DOTALL).group(1)
    exec(compile(code.replace("model_cards/unimm-tiny", str(tiny_folder)), "README", "exec"), {})
    assert (in_folder / "heart.png").exists()


def test_notebook_runs(request, tiny_folder, in_folder):
    notebook = nbformat.read(request.config.rootpath / "examples" / "quickstart.ipynb", as_version=4)
    for cell in notebook.cells:
        cell.source = cell.source.replace("../model_cards/unimm-tiny", str(tiny_folder))
    NotebookClient(notebook, timeout=120, kernel_name="python3").execute()
    assert "image/png" in notebook.cells[3].outputs[-1]["data"]
