"""Do pre-training, BiSSL and Core-tuning help to detect and to segment, too?

    python tests/bench_tasks.py              petals, three seeds of the whole chain, the scripts'
                                             own defaults: half an hour on two cores
    python tests/bench_tasks.py --seeds 1 --flags "--epochs 1"       a try

Each seed draws its own weights, labels and pretext. Writes tests/results/tasks-petals.csv, a line
for each run, and prints mean +- standard deviation; runs that --runs holds are not made again.
"""
import argparse
import json
import multiprocessing
import os
import shlex
from pathlib import Path

import numpy as np
import torch

import benches
import bissl
import core_tuning
import finetune
import simclr

CHAINS = (  # the task, the checkpoint that fine-tuning starts from, its script
    ("detect", "scratch", finetune), ("detect", "simclr", finetune), ("detect", "bissl", finetune),
    ("segment", "scratch", finetune), ("segment", "simclr", finetune),
    ("segment", "scratch", core_tuning), ("segment", "simclr", core_tuning))
METRICS = ("ap50", "ap", "ap75", "ap50_voc07", "miou", "mean_accuracy", "fwiou", "pixel_accuracy")


def once(script, out, argv):
    """What a run returns, from its log where it is finished."""
    done = Path(f"{out}.done")
    if not done.exists():
        result = script.main([*argv, "--out", str(out)])
        done.write_text(json.dumps(result))
    return json.loads(done.read_text())


def runs_of_seed(job):
    """The lines of the table that one seed gives."""
    args, seed = job
    torch.set_num_threads(1)
    folder = Path(args.runs) / f"seed{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    usual = ["--seed", str(seed), "--device", args.device]
    starts = {"scratch": []}
    pretext_flags = "--data petals --epochs 24 " + args.pretext_flags
    for name, script, more in (("simclr", simclr, pretext_flags),
                               ("bissl", bissl, "--task detect " + args.bissl_flags)):
        ckpt = starts["simclr"] if name == "bissl" else []
        once(script, folder / name, [*usual, *ckpt, *shlex.split(more)])
        starts[name] = ["--ckpt", str(folder / f"{name}.pt")]
    lines = []
    for task, start, script in CHAINS:
        method = script.__name__
        argv = ["--task", task, *shlex.split(args.flags)]
        result = once(script, folder / f"{task}-{start}-{method}", [*usual, *starts[start], *argv])
        line = dict(data="petals", task=task, start=start, method=method, seed=seed)
        for metric in METRICS:
            if f"test_{metric}" in result:
                line[metric] = round(result[f"test_{metric}"], 2)
        line["command"] = " ".join(["python", f"{method}.py", *argv])
        lines.append(dict(line, device=benches.device_name(args.device)))
    return lines


def parse(argv):
    p = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--seeds", type=int, default=3, help="seeds 0, 1, ... (default: 3)")
    p.add_argument("--jobs", type=int, default=os.cpu_count(), help="seeds at once, a thread each")
    p.add_argument("--device", default="cpu")
    p.add_argument("--runs", default="runs/tasks", help="folder of the runs' files")
    p.add_argument("--flags", default="", help="for the fine-tuning scripts")
    p.add_argument("--pretext-flags", default="", help="for simclr.py")
    p.add_argument("--bissl-flags", default="", help="for bissl.py")
    return p.parse_args(argv)


def main(argv=None):
    args = parse(argv)
    jobs = [(args, seed) for seed in range(args.seeds)]
    if args.jobs > 1:
        with multiprocessing.get_context("spawn").Pool(args.jobs) as pool:
            lines = sum(pool.map(runs_of_seed, jobs, chunksize=1), [])
    else:
        lines = sum(map(runs_of_seed, jobs), [])
    names = ["data", "task", "start", "method", "seed", *METRICS, "command", "device"]
    benches.write_table(lines, benches.RESULTS / "tasks-petals.csv", names)
    for task, start, script in CHAINS:
        metric = "ap50" if task == "detect" else "miou"
        values = [line[metric] for line in lines if (line["task"], line["start"], line["method"])
                  == (task, start, script.__name__)]
        print(f"{task}  {start}  {script.__name__}: {metric} {np.mean(values):.1f} +- "
              f"{benches.spread_of(values):.1f}")
    return lines


if __name__ == "__main__":
    main()
