"The student editions: what the notebooks give, and runnable with nothing written in them."
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from maskrcnn_course.course import write_exercises

ROOT = Path(__file__).resolve().parent.parent
EDITIONS = sorted((ROOT / "exercises").glob("*.ipynb"))

RUN = """
import sys
from execnb.nbio import read_nb
from execnb.shell import CaptureShell

def skipped(cell): return cell.cell_type != "code" or cell.source.startswith(("#| slow", "#| gpu"))

notebook = read_nb(sys.argv[1])
CaptureShell().run_all(notebook, exc_stop=True, preproc=skipped)
for cell in notebook.cells:
    for out in cell.get("outputs", []): print("".join(out.get("text", [])), end="")
"""


def test_the_folder_holds_what_the_notebooks_give(tmp_path):
    "After a change of an exercise: maskrcnn-course exercises --overwrite"
    write_exercises(tmp_path, ROOT / "nbs")
    assert [path.name for path in EDITIONS] == sorted(path.name for path in tmp_path.iterdir())
    for path in EDITIONS: assert path.read_bytes() == (tmp_path / path.name).read_bytes(), path.name


@pytest.mark.parametrize("path", EDITIONS, ids=lambda p: p.stem)
def test_nothing_written_yet_is_said_and_the_rest_runs(path):
    "Every check is tried, says that nothing is there, and the library takes over; no cell fails."
    codes = ["".join(cell["source"]) for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]
             if cell["cell_type"] == "code"]
    tried = [m for code in codes for m in re.findall(r"^\w+ = attempt\(\w+, check_(\w+)", code, re.MULTILINE)]
    environment = os.environ | {"MPLBACKEND": "agg"}
    done = subprocess.run([sys.executable, "-c", RUN, path.name], cwd=path.parent, env=environment,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert re.findall(r"^✗ (\w+): not written yet$", done.stdout, re.MULTILINE) == tried
    assert tried and "✓" not in done.stdout
