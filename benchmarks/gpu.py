"""What benchmarks/gpu.sh runs: the tests, waits and figures of a GPU; with --rehearse the same on the CPU.

`check` and `measure` start each step as a process of its own, give it what is left of the time, and write the
results after every step: gpu_check.json or gpu_measure.json, and a log beside it. `check` also writes
gpu_waits.json.
"""
import argparse
import contextlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LIMIT = {"check": 200, "measure": 440}  # seconds; with starting and stopping 4 and 8 minutes
CLI = [sys.executable, "-c", "from maskrcnn_course.cli import main; raise SystemExit(main())"]


# ---- steps that run as processes

class Report:
    "The results of a part, written after every step, and its log."

    def __init__(self, out, part):
        self.file, self.log = out / f"gpu_{part}.json", out / f"gpu_{part}.log"
        self.log.write_text("")
        self.steps, self.lock = {}, threading.Lock()

    def read(self): return json.loads(self.file.read_text()) if self.file.is_file() else {}

    def add(self, name, state, seconds, output):
        "Note that a step passed, failed or was stopped, and the end of what it printed."
        last = "".join(output.strip().splitlines()[-1:])[:300]
        with self.lock:  # steps of `check` end at the same time
            self.steps[name] = state
            known = self.read()
            row = dict(state=state, seconds=round(seconds), last_line=last)
            write(self.file, known | {"steps": known.get("steps", {}) | {name: row}})
            with self.log.open("a") as log: log.write(f"==== {name}: {state}, {seconds:.0f} s\n{output}\n")
            print(f"{name:40} {state:8} {seconds:4.0f} s   {last}", flush=True)

    def close(self, names, start):
        "Say what became of every step; returns the exit status."
        reached = Counter(self.steps.values())
        bad = [name for name, state in self.steps.items() if state == "failed"]
        missing = [name for name in names if self.steps.get(name, "stopped") == "stopped"]
        print(f"{reached['passed']} passed; failed: {', '.join(bad) or 'none'}; not reached or not finished: "
              f"{', '.join(missing) or 'none'}; {time.time() - start:.0f} s; {self.file}")
        return bool(bad)


def write(path, value):
    "Replace a JSON file in one step."
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(value, indent=1))
    os.replace(part, path)


def run(command, seconds, env):
    "Run a command for so many seconds at most: whether it passed, failed or was stopped, and its output."
    with tempfile.TemporaryFile("w+", errors="replace") as file:
        process = subprocess.Popen(command, cwd=ROOT, env=env, stdout=file, stderr=subprocess.STDOUT,
                                   stdin=subprocess.DEVNULL, start_new_session=True)
        state = None
        try:
            for how in (signal.SIGINT, signal.SIGKILL):
                try: process.wait(seconds)
                except subprocess.TimeoutExpired:
                    os.killpg(process.pid, how)
                    state, seconds = "stopped", 15  # time to write what it has
        except BaseException:  # whoever stops this program stops its steps
            os.killpg(process.pid, signal.SIGKILL)
            raise
        process.wait()
        file.seek(0)
        return state or ("failed" if process.returncode else "passed"), file.read()


def environment(rehearse, **more):
    known = dict(PYTHONUNBUFFERED="1", PYTHONWARNINGS="ignore", MPLBACKEND="agg", **more)
    return os.environ | known | (dict(GPU_REHEARSAL="1", CUDA_VISIBLE_DEVICES="") if rehearse else {})


def step(report, name, command, end, env, most=10**6):
    "Run one step of a part and write what became of it, if there is time for it."
    start = time.time()
    if end - start < 10: return None
    state, output = run(command, min(end - start, most), env)
    report.add(name, state, time.time() - start, output)
    return state


# ---- check

def notebooks():
    "Every notebook by its name and whether it has cells for a GPU; these come first."
    paths = sorted((ROOT / "nbs").glob("[0-9]*.ipynb"), reverse=True)  # the chapter on speed takes longest
    found = {path.stem: "#| gpu" in path.read_text(encoding="utf-8") for path in paths}
    return dict(sorted(found.items(), key=lambda item: not item[1]))


def check(args):
    "Tests marked gpu, waits, the notebooks with cells for a GPU and then the others, side by side."
    start, report, me = time.time(), Report(args.out, "check"), [sys.executable, __file__]
    cores = os.cpu_count() or 2
    at_once = max(2, cores // 2)
    env = environment(args.rehearse, OMP_NUM_THREADS=str(max(1, cores // at_once)))
    write(report.file, {"machine": about(), "rehearsal": args.rehearse})
    step_waits = [*me, "waits", str(args.out / "gpu_waits.json")] + ["--rehearse"] * args.rehearse
    tests = [sys.executable, "-m", "pytest", *"-m gpu -v -p no:cacheprovider --tb=short".split()]
    commands = {"waits": step_waits, "pytest": tests}
    for name, has_cells in notebooks().items():
        if args.rehearse and not has_cells: continue  # every test run has them all
        if "import av" in (ROOT / f"nbs/{name}.ipynb").read_text() and not importlib.util.find_spec("av"):
            print(f"notebook {name} is left out: the package av is not here", flush=True)
            continue
        call = f"nbdev_test('nbs/{name}.ipynb', flags='gpu', n_workers=0, do_print=True)"
        commands[f"notebook {name}"] = [sys.executable, "-c", f"from nbdev.test import nbdev_test; {call}"]
    with ThreadPoolExecutor(at_once) as pool:
        for name, command in commands.items():
            pool.submit(step, report, name, command, start + args.seconds, env)
    return report.close(commands, start)


@contextlib.contextmanager
def told_waits(device):
    "The places where Python waits for the GPU meanwhile, as PyTorch tells; on a CPU the list stays empty."
    import torch
    places = []
    if device == "cuda": torch.cuda.set_sync_debug_mode("warn")
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        yield places
    if device == "cuda": torch.cuda.set_sync_debug_mode("default")
    places += [f"{Path(w.filename).name}:{w.lineno}" for w in told if "synchroniz" in str(w.message)]


def waits(args):
    "Count how often Python waits for the GPU, in a training step and in inference, ours and torchvision's."
    import torch
    from vs_torchvision import inference, train_step
    device, size = where(args)
    found = {}
    for name, case in {"training step": train_step, "inference": inference}.items():
        functions, _ = case(device, size, 1 if args.rehearse else 2, "float32")
        for side, function in functions.items():
            function()
            if device == "cuda": torch.cuda.synchronize()
            with told_waits(device) as places: function()
            found[f"{name}, {side}"] = dict(count=len(places), places=Counter(places).most_common(8))
    write(Path(args.file), {"machine": about(), "waits": found})
    print("; ".join(f"{name}: {w['count']}" for name, w in found.items()))
    if (ours := found["training step, ours"])["count"]: sys.exit(f"ours waits: {ours['places']}")


# ---- measure

def gpu_cases(device, size, small, backend, largest):
    """Every case as a name and a function that makes it, in the order in which they are worth measuring.

    A name that ends in "compiled" measures the case of that name again, with both sides compiled as well.
    """
    from vs_torchvision import OPERATORS, inference, kernel, train_step
    operators, cases = OPERATORS | {"RoIAlign by the kernel": kernel}, {}
    def add(name, function, n, number, s=size, compiled=False, **more):
        n = min(n, largest)
        words = "".join(f", {value} {key}" for key, value in more.items())
        how = dict(backend=backend) if compiled else {}
        label = f"{name} {s} batch {n} {number}{words}" + " compiled" * compiled
        cases.setdefault(label, partial(function, device, s, n, number, **more, **how))
    def train(*args, **more): add("train", train_step, *args, **more)
    def detect(*args, **more): add("inference", inference, *args, **more)
    def part(name, s=size): cases.setdefault(f"{name} {s}", partial(operators[name], device, s))
    # the promises, one by one
    train(8, "bf16")
    detect(1, "bf16")
    part("RoIAlign, forward and backward")
    part("paste 100 masks")
    detect(1, "bf16", detections=500)
    train(2, "tf32")
    train(1, "tf32", objects=500)
    train(8, "bf16", compiled=True)
    detect(1, "bf16", compiled=True)
    train(16, "bf16")
    for name in operators: part(name)
    # all others
    for n in (2, 1, 8, 16):
        for s in (size, small):
            for number in ("bf16", "tf32"):
                train(n, number, s)
                detect(n, number, s)
    for name in operators: part(name, small)
    for n in (2, 8):
        for s in (size, small):
            train(n, "bf16", s, compiled=True)
            detect(n, "bf16", s, compiled=True)
    return cases


ENDED = "ended the process"


def shortened(cases):
    "One case of each kind, for a rehearsal."
    kinds = {}
    for label, make in cases.items(): kinds.setdefault((make.func, *make.keywords), (label, make))
    return dict(kinds.values())


def busy(function):
    "Milliseconds in which the GPU computes during one call, and copies that it makes to the host."
    import torch
    from torch.profiler import ProfilerActivity, profile
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        function()
        torch.cuda.synchronize()
    events = seen.key_averages()
    return dict(gpu_ms=sum(e.self_device_time_total for e in events) / 1000,
                copies_to_host=sum(e.count for e in events if "DtoH" in e.key))


def speed(args):
    "Measure the cases that the results do not have yet, until the time is up; write each when it is done."
    from vs_torchvision import line, machine, versus
    (device, size), file, end = where(args), Path(args.file), time.time() + args.seconds
    how = ("96x128", "eager", 1) if args.rehearse else ("300x400", "inductor", 16)
    cases = gpu_cases(device, size, *how)
    if args.rehearse: cases = shortened(cases)
    def note(**more): write(file, json.loads(file.read_text()) | more)
    note(planned=list(cases))
    for label, make in cases.items():
        known = json.loads(file.read_text())
        tried, failed = known.get("tried", []), known.get("failed", {})
        if label in tried: continue
        if time.time() > end: break
        # should the case end this process, it is noted already and not tried again
        note(tried=[*tried, label], failed=failed | {label: ENDED})
        try:
            functions, per_call = make()
            r = versus(functions, device, 0 if args.rehearse else 5, per_call) | {"machine": machine()}
            note(cases=known.get("cases", {}) | {label.removesuffix(" compiled"): r})
            if device == "cuda": r["busy"] = {side: busy(function) for side, function in functions.items()}
        except Exception as e:
            note(failed=failed | {label: f"{type(e).__name__}: {e}"[:500]})
            print(f"{label} failed: {e}", flush=True)
            if "CUDA error" in str(e): raise  # nothing works in this process any more
            continue
        finally: functions = None
        note(failed=failed, cases=known.get("cases", {}) | {label.removesuffix(" compiled"): r})
        print(line(label, r), flush=True)


def learnt(out, images):
    "What a training has reached: epochs, the losses of the first and the last one, images per second, AP."
    if not (out / "history.json").is_file(): return None
    history, found = json.loads((out / "history.json").read_text()), {}
    for name in dict.fromkeys(h["stage"] for h in history):
        rows = [h for h in history if h["stage"] == name]
        first, last = (sum(h["train"].values()) for h in (rows[0], rows[-1]))
        found[name] = dict(epochs=len(rows), first_loss=first, last_loss=last, seconds=rows[-1]["seconds"],
                           images_per_second=images * len(rows) / rows[-1]["seconds"])
    if (out / "metrics.json").is_file():
        metrics = json.loads((out / "metrics.json").read_text())
        found["AP"] = {kind: metrics[kind]["AP"] for kind in ("bbox", "segm")}
    return found


def measure(args):
    "Speed and memory beside torchvision for half of the time, then two trainings, then speed again."
    start, report = time.time(), Report(args.out, "measure")
    end, env = start + args.seconds, environment(args.rehearse)
    write(report.file, {"machine": about(), "rehearsal": args.rehearse})
    me = [sys.executable, __file__, "speed", str(report.file)] + ["--rehearse"] * args.rehearse
    def cases(until):
        "Start again where a case has ended the process, until all are measured or the time is up."
        state = "failed"
        while state == "failed" and until - time.time() > 20:
            before = len(report.read().get("tried", []))
            state = step(report, "speed and memory",
                         [*me, "--seconds", str(until - time.time() - 25)], until, env)
            if state == "stopped": forget_the_last()
            if len(report.read().get("tried", [])) == before: break
    def forget_the_last():
        "The case that the deadline stopped may be tried again."
        known = report.read()
        failed = {label: why for label, why in known.get("failed", {}).items() if why != ENDED}
        last = known.get("failed", {}).keys() - failed
        tried = [label for label in known.get("tried", []) if label not in last]
        write(report.file, known | {"failed": failed, "tried": tried})
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        scenes, n = folder / "scenes.h5", 24 if args.rehearse else 1200
        if not args.rehearse: cases(start + 0.4 * args.seconds)
        step(report, "scenes", [*CLI, "scenes", str(scenes), "--n", str(n)], end, env)
        workers = ["--workers", "0" if args.rehearse else str(max(0, min(12, os.cpu_count() - 2)))]
        laptop = ["--preset", "tiny" if args.rehearse else "laptop"]
        standard = ["--preset", "tiny" if args.rehearse else "standard",
                    "--no-pretrained", "--stages", "joint",
                    "--epochs", "joint=2" if args.rehearse else "joint=20", "--mixed-precision", "bf16"]
        for name, options, most in (("laptop", laptop, 100), ("standard", standard, 120)):
            command = [*CLI, "train", str(scenes), "--out", str(folder / name), *options, *workers]
            state = step(report, f"train {name}", command, end, env, most)
            if found := learnt(folder / name, n - n // 6):
                known = report.read()
                write(report.file, known | {"training": known.get("training", {}) | {name: found}})
                print(json.dumps(found), flush=True)
                falls = all(f["last_loss"] < f["first_loss"]
                            for f in found.values() if f.get("epochs", 0) > 1)
                if state == "stopped" and falls:  # by the clock, as meant
                    report.steps[f"train {name}"] = "passed"
                if not falls: report.steps[f"train {name}"] = "failed"
        cases(end)
    known = report.read()
    names = ["scenes", "train laptop", "train standard", *known.get("planned", ["speed and memory"])]
    if "planned" in known: report.steps.pop("speed and memory", None)  # its cases speak for it
    for label, why in known.get("failed", {}).items(): report.add(label, "failed", 0, why)
    for label in known.get("tried", []): report.steps.setdefault(label, "passed")
    return report.close(names, start)


# ---- the command

def about():
    "Machine, versions and commit that the results belong to."
    sys.path.insert(0, str(ROOT / "benchmarks"))
    from vs_torchvision import machine
    try:
        asked = ["git", "rev-parse", "--short", "HEAD"]
        commit = subprocess.run(asked, cwd=ROOT, capture_output=True, text=True).stdout.strip()
    except OSError: commit = ""
    return machine() | {"commit": commit or "not known", "date": time.strftime("%Y-%m-%d")}


def where(args):
    "Device and size of the larger pictures; of a rehearsal both are small."
    import vs_torchvision
    if not args.rehearse: return "cuda", "800x1333"
    vs_torchvision.SIZES |= {"160x224": (160, 224), "96x128": (96, 128)}
    return "cpu", "160x224"


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["check", "measure", "waits", "speed"],
                        help="check or measure; the others are steps of these")
    parser.add_argument("file", nargs="?", help="the results file, for a step")
    parser.add_argument("--rehearse", action="store_true", help="on the CPU, with tiny sizes")
    parser.add_argument("--seconds", type=float, help="stop after so many (check 200, measure 440)")
    args = parser.parse_args()
    os.environ |= environment(args.rehearse)
    import torch
    if not args.rehearse and not torch.cuda.is_available():
        sys.exit("PyTorch finds no GPU here; --rehearse runs the same steps on the CPU")
    if args.part in ("waits", "speed"): return globals()[args.part](args)
    args.seconds = args.seconds or (900 if args.rehearse else LIMIT[args.part])  # a CPU takes its time
    default = tempfile.mkdtemp() if args.rehearse else ROOT / "benchmarks/results"
    args.out = Path(os.environ.get("OUT") or default)
    args.out.mkdir(parents=True, exist_ok=True)
    return {"check": check, "measure": measure}[args.part](args)


if __name__ == "__main__": sys.exit(main())
