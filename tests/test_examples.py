"""The quick start and the README's notebook lines run as they stand."""

import re
import runpy
import sys

import pytest


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
