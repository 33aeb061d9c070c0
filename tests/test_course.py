"What holds for the course as a whole."
import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "nbs").glob("[0-9]*.ipynb"))
CELLS = {path: json.loads(path.read_text(encoding="utf-8"))["cells"] for path in NOTEBOOKS}


def module_of(path):
    found = re.search(r"#\| default_exp (\w+)", "\n".join("".join(c["source"]) for c in CELLS[path]))
    return found and found[1]


# functions that call one of a later module: methods of the model, and what gives back the lessons' modules
HANDS_OVER = {"mask_rcnn": {"torchvision_weights"}, "torchvision_weights": {"speed"}}
MODULES = [name for path in NOTEBOOKS if (name := module_of(path))]


def test_every_module_comes_from_a_notebook():
    assert {p.stem for p in (ROOT / "maskrcnn_course").glob("*.py")} - {"__init__", "_modidx"} == set(MODULES)


@pytest.mark.parametrize("name", MODULES)
def test_a_module_imports_only_from_modules_before_it(name):
    imported = set()
    for node in ast.walk(tree_of(name)):
        if not isinstance(node, ast.ImportFrom): continue
        module = "." * node.level + (node.module or "")
        if module in (".", "maskrcnn_course"): imported |= {alias.name for alias in node.names}
        elif node.level: imported.add(node.module.split(".")[-1])
        elif module.startswith("maskrcnn_course."): imported.add(module.split(".")[1])
    assert imported - HANDS_OVER.get(name, set()) <= set(MODULES[:MODULES.index(name)])


LESSONS = ["boxes", "anchors", "rpn", "fpn", "roi_align", "box_head", "mask_head", "evaluation", "mask_rcnn"]
ENGINE = {"kernels", "speed", "tta", "presets", "augment", "features"}


def tree_of(name): return ast.parse((ROOT / "maskrcnn_course" / f"{name}.py").read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", LESSONS)
def test_a_lesson_asks_nothing_of_the_engine_or_the_device(name):
    "The lesson is the definition: only `apply_to_valid` may look at where a tensor lies."
    for node in tree_of(name).body:
        if isinstance(node, ast.ImportFrom): assert node.module not in ENGINE
        if getattr(node, "name", None) == "apply_to_valid": continue
        words = {n.attr for n in ast.walk(node) if isinstance(n, ast.Attribute)}
        assert not words & {"is_cuda", "is_cpu", "is_mps", "get_device", "mkldnn", "cuda"}, node.lineno
        compared = [n for n in ast.walk(node) if isinstance(n, ast.Compare)]
        assert not any("device" in ast.unparse(n) for n in compared), node.lineno


@pytest.mark.parametrize("name", LESSONS)
def test_a_function_of_a_lesson_fits_on_a_screen(name):
    "Under 40 lines; a constructor's list of documented settings is a table and does not count."
    for node in ast.walk(tree_of(name)):
        if not isinstance(node, ast.FunctionDef): continue
        first = node.body[0].lineno if node.name == "__init__" else node.lineno
        assert node.end_lineno - first + 1 < 40, f"{name}.{node.name}"


@pytest.mark.parametrize("name", MODULES)
def test_no_module_takes_what_another_keeps_to_itself(name):
    for node in ast.walk(tree_of(name)):
        if isinstance(node, ast.ImportFrom) and node.level:
            assert not [alias.name for alias in node.names if alias.name.startswith("_")]


@pytest.mark.parametrize("name", MODULES)
def test_no_ready_made_detector_and_no_development_tool_in_the_library(name):
    text = (ROOT / "maskrcnn_course" / f"{name}.py").read_text(encoding="utf-8")
    assert not re.search(r"import (fastcore|nbdev|IPython|ipywidgets)|"
                         r"from (fastcore|nbdev|IPython|ipywidgets)", text)
    if name != "torchvision_weights": assert "models.detection" not in text  # there, to hand weights over


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_a_notebook_is_whole_and_small(path):
    outputs = [o for c in CELLS[path] if c["cell_type"] == "code" for o in c["outputs"]]
    assert outputs and not [o for o in outputs if o["output_type"] == "error"]
    assert path.stat().st_size < 1.5e6
    assert not re.search(r"/(home|root|Users)/\w", "".join("".join(o.get("text", "")) for o in outputs))


@pytest.mark.parametrize(
    "path", NOTEBOOKS + sorted(ROOT.glob("tests/*.py")) + sorted(ROOT.glob("benchmarks/*.py")),
    ids=lambda p: p.name)
def test_no_code_line_is_longer_than_110_columns(path):
    if path.suffix == ".py": text = path.read_text(encoding="utf-8")
    else: text = "\n".join("".join(c["source"]) for c in CELLS[path] if c["cell_type"] == "code")
    assert not [line for line in text.splitlines() if len(line) > 110]


PUBLIC = ["MaskRCNN", "build_model", "load_model", "save_model", "train", "evaluate", "predict",
          "InstanceDataset", "import_coco", "import_cis680", "import_mask_folder", "write_scenes"]


def test_the_public_names_are_there_whatever_was_imported_before():
    import maskrcnn_course
    assert sorted(maskrcnn_course.__all__) == sorted(PUBLIC) and {*PUBLIC} <= {*dir(maskrcnn_course)}
    assert not {*PUBLIC} & {*MODULES}  # a module of that name would take its place
    for name in PUBLIC: assert callable(getattr(maskrcnn_course, name)), name
    with pytest.raises(AttributeError, match="has no attribute 'train_me'"): maskrcnn_course.train_me


def test_the_package_and_help_need_no_torch():
    "Loading PyTorch takes seconds; nobody should wait for them to read a page of help."
    program = ("import sys, maskrcnn_course\nfrom maskrcnn_course.cli import main\n"
               "try: main(['train', '--help'])\n"
               "except SystemExit: pass\nassert 'torch' not in sys.modules")
    subprocess.run([sys.executable, "-c", program], check=True, capture_output=True)
