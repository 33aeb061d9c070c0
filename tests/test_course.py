"What holds for the course as a whole."
import ast
import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "nbs").glob("[0-9]*.ipynb"))
CELLS = {path: json.loads(path.read_text(encoding="utf-8"))["cells"] for path in NOTEBOOKS}


def module_of(path):
    found = re.search(r"#\| default_exp (\w+)", "".join("".join(c["source"]) for c in CELLS[path]))
    return found and found[1]


MODULES = [name for path in NOTEBOOKS if (name := module_of(path))]


def test_every_module_comes_from_a_notebook():
    assert {p.stem for p in (ROOT / "maskrcnn_course").glob("*.py")} - {"__init__", "_modidx"} == set(MODULES)


@pytest.mark.parametrize("name", MODULES)
def test_a_module_imports_only_from_modules_before_it(name):
    tree = ast.parse((ROOT / "maskrcnn_course" / f"{name}.py").read_text(encoding="utf-8"))
    imported = {node.module.split(".")[-1] for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level}
    imported |= {node.module.split(".")[1] for node in ast.walk(tree)
                 if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("maskrcnn_course.")}
    assert imported <= set(MODULES[:MODULES.index(name)])


@pytest.mark.parametrize("name", MODULES)
def test_no_ready_made_detector_and_no_development_tool_in_the_library(name):
    text = (ROOT / "maskrcnn_course" / f"{name}.py").read_text(encoding="utf-8")
    assert not re.search(r"import (fastcore|nbdev|IPython|ipywidgets)|from (fastcore|nbdev|IPython|ipywidgets)", text)
    if name != "mask_rcnn": assert "models.detection" not in text  # there, to hand weights over


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_a_notebook_is_whole_and_small(path):
    outputs = [o for c in CELLS[path] if c["cell_type"] == "code" for o in c["outputs"]]
    assert outputs and not [o for o in outputs if o["output_type"] == "error"]
    assert path.stat().st_size < 1.5e6
    assert not re.search(r"/(home|root|Users)/\w", "".join("".join(o.get("text", "")) for o in outputs))
