"""Write the figures of benchmarks/results/ into README.md, between its two `results` marks.

And those of speed into benchmarks/README.md.

    python benchmarks/readme.py
"""
import json
from pathlib import Path
from statistics import mean, median, stdev

ROOT = Path(__file__).resolve().parent.parent
START, END = "<!-- results -->", "<!-- /results -->"


def read(stem): return json.loads((ROOT / f"benchmarks/results/{stem}.json").read_text())


def row(name, metrics):
    classes = " / ".join(f"{c['AP50']:.2f}" for c in metrics["bbox"]["per_class"].values())
    rpn = f"{metrics['rpn']['accuracy']:.3f}" if "rpn" in metrics else ""
    if "minutes" in metrics: minutes = metrics["minutes"] * metrics["threads"]
    else: minutes = metrics["seconds"] / 60 * metrics["machine"]["cores"]
    machine = metrics.get("machine", {}).get("cpu", "not noted")
    (box, box50), (mask, mask50) = ((metrics[kind]["AP"], metrics[kind]["AP50"]) for kind in ("bbox", "segm"))
    return (f"| {name} | {minutes:.0f} | {machine} | {rpn} | {box:.3f} | {box50:.3f} | {classes} | "
            f"{mask:.3f} | {mask50:.3f} |")


RUNS = {  # a file of results: what it is
    "laptop_scenes": "scenes, three stages: `maskrcnn-course train`",
    "scenes_joint_torchvision_30": "scenes, torchvision's Mask R-CNN, jointly: "
                                   "`python benchmarks/scenes_vs_torchvision.py torchvision --minutes 15`",
    "scenes_joint_ours_54": "scenes, ours, jointly: "
                            "`python benchmarks/scenes_vs_torchvision.py --minutes 54`",
    "scenes_joint_torchvision_54": "scenes, torchvision's, jointly, beside it",
    "laptop_coco3": "232 photos of COCO, begun from scenes, jointly, 30 epochs with 288 × 384 pixels "
                    "(`--preset laptop`)",
    "photos_480_coco3": "the same, 45 epochs with 480 × 640 pixels (`--preset photos` as it was then)",
    "photos_coco3": "the same, 38 epochs with 576 × 768 pixels (see [data/README.md](data/README.md))",
}


def section():
    "The table of every result that is there."
    there = {stem for stem in RUNS if (ROOT / f"benchmarks/results/{stem}.json").is_file()}
    rows = [row(name, read(stem)) for stem, name in RUNS.items() if stem in there]
    trained, vote, larger = read("photos_coco3"), read("photos_vote"), read("photos_large_coco3")
    rows.append(row("the same weights, whose masks vote on the boxes, as `--preset photos` has it now",
                    trained | vote["val with"]))
    rows.append(row("the same again, looking at three sizes and their mirror images "
                    "(`maskrcnn-course evaluate runs/photos --tta`)", trained | vote["val tta"]))
    rows.append(row("from the 38 epochs 22 more with 768 × 1024 pixels, masks that vote, "
                    "and the mirror image asked as well (`--preset photos_large`)",
                    larger | dict(seconds=trained["seconds"] + larger["seconds"])))
    return "\n".join([
        START, "## What it reaches", "",
        "On two CPU cores, on images never trained on; of the scenes, also on kinds of vehicles, persons and "
        "animals never trained on. The table is",
        "written by `python benchmarks/readme.py` from the files in `benchmarks/results/`.", "",
        "| what | core-minutes | processor | RPN accuracy | box AP | box AP50 | vehicle / person / animal "
        "| mask AP | mask AP50 |",
        "|---|---|---|---|---|---|---|---|---|", *rows,
        *how_long(), photos(), *finetune(), END])


def finetune():
    "What a start from scenes is worth on photos with other classes, where benchmarks/finetune.py ran."
    path = ROOT / "benchmarks/results/finetune.json"
    if not path.is_file(): return []
    found, rows = json.loads(path.read_text()), []
    for classes, arms in found["sets"].items():
        for arm, r in arms.items():
            figures = " | ".join(f"{r[kind][ap]:.3f}" for kind in ("bbox", "segm") for ap in ("AP", "AP50"))
            rows.append(f"| {classes} | {arm} | {figures} |")
    return ["", f"Other classes: 232 photos, {found['epochs']} epochs of joint training on "
            f"{found['machine']['threads']} cores, begun from ImageNet's body or with `--start` from a run "
            "on the scenes; one seed (`python benchmarks/finetune.py`).", "",
            "| classes | start | box AP | box AP50 | mask AP | mask AP50 |",
            "|---|---|---|---|---|---|", *rows]


def how_long():
    "What the default training will take on the machines where benchmarks/minutes.py ran."
    path = ROOT / "benchmarks/results/minutes.json"
    if not path.is_file(): return []
    kinds = {"bf16": "bfloat16", "no": "float32"}
    def say(r):
        kind, m = kinds[r["mixed_precision"]], r["machine"]
        return f"{r['minutes']:.0f} minutes in {kind} on {m['threads']} cores of {m['cpu']}"
    said = "; ".join(say(r) for r in json.loads(path.read_text()).values())
    return ["", "How long the default training takes is worked out from timed steps "
            f"(`python benchmarks/minutes.py`): {said}."]


def photos():
    "Torchvision's Mask R-CNN and ours on photos, mean and spread of several seeds."
    rows, arms = [], {"torchvision": "torchvision's, jointly", "ours": "ours, jointly",
                      "stages": "ours, in three stages"}
    for arm, name in arms.items():
        paths = sorted((ROOT / "benchmarks/results").glob(f"photos_{arm}_?.json"))
        runs = [json.loads(path.read_text()) for path in paths]
        values = [[r[kind][number] for r in runs] for kind in ("bbox", "segm") for number in ("AP", "AP50")]
        minutes = median(r["core_seconds"] for r in runs) / 60
        spreads = " | ".join(f"{mean(v):.3f} ± {stdev(v):.3f}" for v in values)
        rows.append(f"| {name} | {len(runs)} | {minutes:.0f} | {spreads} |")
    return "\n".join([
        "",
        "The same photos, first weights, augmentation, optimiser, schedule and epochs for both, few enough "
        "for many runs (six; in three stages six for the RPN and three for each head: "
        "`python benchmarks/photos.py`); mean and spread of the runs, each with its own seed.",
        "What each part of the recipe is worth, and where AP is lost: [notebook 14](nbs/14_photos.ipynb).",
        "",
        "| photos | runs | core-minutes | box AP | box AP50 | mask AP | mask AP50 |",
        "|---|---|---|---|---|---|---|", *rows])


def speed():
    "The tables of every comparison, one for each machine."
    machines = {}
    for path in sorted((ROOT / "benchmarks/results").glob("vs_torchvision*.json")):
        for name, r in json.loads(path.read_text()).items():
            machines.setdefault(json.dumps(r["machine"]), {})[name] = r
    lines = [
        "Written by `python benchmarks/readme.py` from `results/vs_torchvision*.json`, which "
        "`python benchmarks/vs_torchvision.py` measured. Equal weights and inputs, taking turns, and equal "
        "answers",
        "(in bf16 equal within rounding, for torchvision's rounds boxes to 16 bits as well, "
        "and ours does not);",
        "the other side's time over ours, median and quartiles. Where a side was also compiled, its faster "
        "variant counts. Models are `maskrcnn_resnet50_fpn` with batch norm frozen."]
    for machine, measured in machines.items():
        m = json.loads(machine)
        threads = "one thread" if m["threads"] == 1 else f"{m['threads']} threads"
        lines += ["", f"On {threads} of {m['cpu']} ({versions(m)}):", "", *HEAD]
        lines += [comparison(name, r) for name, r in measured.items()]
    return "\n".join([*lines, *memory(), ""])


def memory():
    "Peak memory against the number of images, where benchmarks/memory.py ran."
    path = ROOT / "benchmarks/results/memory.json"
    if not path.is_file(): return []
    found = json.loads(path.read_text())
    rows = [[f"{int(n):,}", *(f"{mb:,.0f} MB" for mb in parts.values())] for n, parts in found.items()]
    return ["", "## Memory against the number of images", "",
            "`python benchmarks/memory.py` made up images of 64 × 64 with three objects each. Peak of a "
            "process above what it has after its imports:", "",
            "| images | writing the file | 100 training steps | evaluation of a twentieth of them |",
            "|---|---|---|---|", *(f"| {' | '.join(row)} |" for row in rows)]


HEAD = ["| case | times as fast | ours | the other | peak memory, ours / the other |",
        "|---|---|---|---|---|"]


def versions(m): return f"torch {m['torch'].split('+')[0]}, torchvision {m['torchvision'].split('+')[0]}"


def comparison(name, r):
    "A row of a table of comparisons."
    ours, theirs = r["compared"]
    memory = [r["peak_mb"][ours], r["peak_mb"][theirs]]
    def time(side):
        ms = r["ms"][side]
        return f"{ms:,.{0 if ms >= 10 else 1}f} ms" + " compiled" * ("compiled" in side)
    spread = f"**{r['ratio']:.2f}** ({r['quartiles'][0]:.2f} to {r['quartiles'][1]:.2f})"
    peak = f"{memory[0]:,.0f} / {memory[1]:,.0f} MB" if min(memory) > 1 else ""
    return f"| {name} | {spread} | {time(ours)} | {time(theirs)} | {peak} |"


def gpu(folder=ROOT / "benchmarks/results"):
    "What `benchmarks/gpu.sh` measured on a GPU: nothing as long as there are no results."
    def results(part):
        path = folder / f"gpu_{part}.json"
        return json.loads(path.read_text()) if path.is_file() else {}
    check, waits, measured = results("check"), results("waits"), results("measure")
    lines = []
    if measured.get("cases"):
        lines += ["`benchmarks/gpu.sh measure` wrote `results/gpu_measure.json`; the same rules as above."]
        by_machine = {}
        for name, r in measured["cases"].items():
            by_machine.setdefault(json.dumps(r["machine"]), {})[name] = r
        for machine, rows in by_machine.items():
            lines += ["", f"On {card(json.loads(machine))}:", "",
                      HEAD[0] + " GPU at work, ours / the other |", HEAD[1] + "---|"]
            for name, r in rows.items():
                busy = [f"{r['busy'][side]['gpu_ms'] / r['ms'][side]:.0%}"
                        for side in r["compared"] if "busy" in r]
                lines.append(f"{comparison(name, r)} {' / '.join(busy)} |")
    if measured.get("training"):
        on = card(measured["machine"])
        lines += ["", f"`maskrcnn-course train` on the scenes, on {on}; validation counts as time:", "",
                  "| preset | stage | epochs | loss, first and last epoch | images per second |",
                  "|---|---|---|---|---|"]
        for preset, stages in measured["training"].items():
            for name, t in stages.items():
                if name == "AP": continue
                losses = f"{t['first_loss']:.2f} → {t['last_loss']:.2f}"
                lines.append(f"| {preset} | {name} | {t['epochs']} | {losses} | "
                             f"{t['images_per_second']:.0f} |")
    if waits:
        lines += ["", f"How often Python waits for the GPU, on {card(waits['machine'])}: "
                  + "; ".join(f"{name} {w['count']}" for name, w in waits["waits"].items()) + "."]
    if check.get("steps"):
        states = [f"{name} {step['state']}" for name, step in check["steps"].items()]
        lines += ["", f"`benchmarks/gpu.sh check` on {card(check['machine'])}: " + "; ".join(states) + "."]
    return "\n".join(["", "## On a GPU", "", *lines, ""]) if lines else ""


def card(m): return f"{m.get('gpu', 'a CPU')} (driver {m.get('driver', '-')}, {versions(m)})"


def main():
    before, rest = (ROOT / "README.md").read_text().split(START)
    (ROOT / "README.md").write_text(before + section() + rest.split(END)[-1])
    title = "# Beside torchvision, pycocotools and faster-coco-eval\n\n"
    (ROOT / "benchmarks/README.md").write_text(title + speed() + gpu())


if __name__ == "__main__": main()
