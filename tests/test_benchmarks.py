"What the benchmarks write from their results."
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))
import gpu  # noqa: E402
import readme  # noqa: E402

MACHINE = dict(cpu="some CPU", threads=2, torch="2.11.0+cu130", torchvision="0.26.0+cu130", gpu="Some Card",
               driver="580.1")


def test_the_page_holds_what_the_results_say():
    "After a new result: python benchmarks/readme.py"
    assert readme.section() in (readme.ROOT / "README.md").read_text()


def test_without_results_there_is_no_gpu_part(tmp_path): assert readme.gpu(tmp_path) == ""


def test_the_gpu_part_names_the_card_and_shows_every_figure(tmp_path):
    case = dict(ratio=2.5, quartiles=[2.4, 2.6], compared=["ours", "theirs compiled"], machine=MACHINE,
                ms={"ours": 40., "theirs compiled": 100.}, peak_mb={"ours": 900., "theirs compiled": 1500.},
                busy={"ours": dict(gpu_ms=36.), "theirs compiled": dict(gpu_ms=50.)})
    training = dict(laptop=dict(rpn=dict(epochs=3, first_loss=1.5, last_loss=.25, images_per_second=321.)))
    files = dict(measure=dict(machine=MACHINE, cases={"train 8": case}, training=training),
                 waits=dict(machine=MACHINE, waits={"training step, ours": dict(count=0)}),
                 check=dict(machine=MACHINE, steps=dict(pytest=dict(state="failed"))))
    for part, value in files.items(): (tmp_path / f"gpu_{part}.json").write_text(json.dumps(value))
    text = readme.gpu(tmp_path)
    assert text.count("Some Card (driver 580.1, torch 2.11.0, torchvision 0.26.0)") == 4
    assert ("| train 8 | **2.50** (2.40 to 2.60) | 40 ms | 100 ms compiled "
            "| 900 / 1,500 MB | 90% / 50% |") in text
    assert "| laptop | rpn | 3 | 1.50 → 0.25 | 321 |" in text
    assert "training step, ours 0" in text and "pytest failed" in text


def test_a_step_that_fails_or_takes_too_long_is_named(tmp_path, capsys):
    report = gpu.Report(tmp_path, "check")
    python = [sys.executable, "-c"]
    end = gpu.time.time() + 60
    slow = "import time\nprint('begun', flush=True)\ntime.sleep(60)"
    for name, code, most in (("good", "print('well')", 60), ("bad", "raise SystemExit('why it failed')", 60),
                             ("slow", slow, 2)):
        gpu.step(report, name, [*python, code], end, gpu.environment(True), most)
    gpu.step(report, "late", [*python, "1"], gpu.time.time() + 1, gpu.environment(True))
    assert report.close(["good", "bad", "slow", "late"], end - 60) == 1
    steps = json.loads((tmp_path / "gpu_check.json").read_text())["steps"]
    assert {name: s["state"] for name, s in steps.items()} == dict(
        good="passed", bad="failed", slow="stopped")
    assert steps["bad"]["last_line"] == "why it failed"
    assert "begun" in (tmp_path / "gpu_check.log").read_text()
    last = capsys.readouterr().out.splitlines()[-1]
    assert "1 passed; failed: bad; not reached or not finished: slow, late;" in last
