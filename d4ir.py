"""D4IR: a big weather-restoration network into a small one, without its training data.

    python d4ir.py --task desnow                                    # everything embedded: no download, no GPU needed
    python d4ir.py --task desnow --sd stable-diffusion-v1-5/stable-diffusion-v1-5 --degraded snow/ --clean good/ \\
                   --teacher promptir.py:PromptIR@promptir.ckpt --test Snow100K-L/
    python d4ir.py --task desnow --stage restore --input photo.jpg --model runs/desnow/student.safetensors --output out/
    torchrun --nproc_per_node=4 d4ir.py --task desnow ...           # the same on four GPUs; batches are each process's

Four stages, in this order: adapter (DPA), synth (CCD), distill (PKD), evaluate. The same command goes on where it was
stopped. Pei Wang, Xiaotong Luo, Yuan Xie, Yanyun Qu: arXiv 2409.03455.
"""
import argparse
import csv
import inspect
import json
import os
import platform
import re
import shutil
import signal
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, fields
from datetime import timedelta
from pathlib import Path

import diffusers
import torch
import torch.distributed as dist
import transformers
from torchvision.transforms.functional import resize, to_pil_image
from tqdm import tqdm

from distill import Crops, DistillConfig, distill, teacher_outputs
from evaluate import (DEFINITIONS, METRICS, cost, evaluate, figure, find_pairs, list_images, means, natural, read_image,
                      restore, table)
from models import Restorer, load_restorer, load_stable_diffusion, save_restorer
from prompt_adapter import AdapterConfig, CropPairs, PromptAdapter, load_adapter, save_adapter, train_adapter
from synth import SCHEDULERS, SynthConfig, inputs, start_timestep, synthesize_folder

TASKS = ("derain", "dehaze", "desnow", "all")
STAGES = ("adapter", "synth", "distill", "evaluate")
WEIGHTS = Path(__file__).resolve().parent / "weights"
LARGEST = 1024                          # px: web photos whose shorter side is longer are reduced to it (memory; our choice)
PLAIN = {"tokens"}                      # fields of AdapterConfig whose flag has no prefix
FREE = ("test", "tile", "versions")     # settings that may differ when a run goes on


# ---------------------------------------------------------------- the command line, from the configs' fields

class Parser(argparse.ArgumentParser):
    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message}\n")


def flags_of(config):
    """(flag, field, help) for every field of a stage's config; the help is the comment beside the field."""
    comments = dict(re.findall(r"^    (\w+): .*?# (.*)$", inspect.getsource(config), re.M))
    prefix = {AdapterConfig: "adapter-", SynthConfig: "", DistillConfig: "distill-"}[config]
    for f in fields(config):
        yield ("" if f.name in PLAIN else prefix) + f.name.replace("_", "-"), f, comments[f.name]


def parse(argv):
    parser = Parser(prog="d4ir.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--task", required=True, choices=TASKS, help="what the student is for; all: one multi-weather student")
    add("--stage", nargs="+", choices=STAGES + ("restore", "export"), help="one or more of the four; without it all four. On their own: restore, export")
    add("--sd", default=str(WEIGHTS / "mini-sd"), help="Stable Diffusion 1.x or 2.x: a diffusers folder or hub id (the embedded mini-SD)")
    add("--degraded", type=Path, metavar="DIR", help="web photos in bad weather (the demo's)")
    add("--clean", type=Path, metavar="DIR", help="web photos in good weather, unpaired (the demo's)")
    add("--teacher", default=str(WEIGHTS / "teacher.safetensors"), metavar="SPEC", help="a .safetensors of this project or FILE.py:NAME@WEIGHTS (the embedded teacher)")
    add("--teacher-multiple", type=int, default=1, metavar="N", help="pad the input of a FILE.py teacher to a multiple of this (1)")
    add("--student-width", type=int, metavar="N", help="the student's channels (half the teacher's; 32 for a FILE.py teacher)")
    add("--test", type=Path, metavar="DIR", help="a paired benchmark folder (the demo's)")
    add("--out", type=Path, metavar="DIR", help="the run folder (runs/TASK)")
    add("--restart", action="store_true", help="empty the run folder first")
    add("--device", help="cpu, cuda, cuda:1 ... (cuda if there is one)")
    add("--precision", choices=("bf16", "fp16", "fp32"), default="bf16", help="of Stable Diffusion and of autocast; metrics are always in fp32 (bf16)")
    add("--seed", type=int, default=0)
    add("--tile", type=int, default=1024, metavar="PX", help="photos larger than this are restored in tiles; 0: never (1024)")
    add("--input", type=Path, metavar="PATH", help="restore: a photo or a folder of photos")
    add("--model", metavar="FILE", help="restore: the network (OUT/student.safetensors)")
    add("--output", type=Path, metavar="DIR", help="restore: where the PNG files go")
    for config in (AdapterConfig, SynthConfig, DistillConfig):
        group = parser.add_argument_group(config.__name__, config.__doc__.split("\n")[0])
        for flag, f, comment in flags_of(config):
            kind = {"action": argparse.BooleanOptionalAction} if isinstance(f.default, bool) else {"type": type(f.default)}
            group.add_argument(f"--{flag}", default=f.default, help=f"{comment} ({f.default})".replace("%", "%%"), **kind)
    args = parser.parse_args(argv)
    for config in (AdapterConfig, SynthConfig, DistillConfig):
        for flag, f, _ in flags_of(config):
            value = getattr(args, flag.replace("-", "_"))
            if isinstance(value, (int, float)) and not isinstance(value, bool) and (value < 0 or value == 0 and f.default != 0 and isinstance(f.default, int)):
                parser.error(f"--{flag} must be {'at least 1' if isinstance(f.default, int) and f.default else 'no less than 0'}, not {value}")
    if args.scheduler not in SCHEDULERS:
        parser.error(f"--scheduler must be one of {', '.join(SCHEDULERS)}, not {args.scheduler!r}")
    alone = {"restore", "export"} & set(args.stage or ())
    if alone and len(args.stage) > 1:
        parser.error(f"--stage {alone.pop()} goes on its own")
    if args.stage == ["restore"] and not (args.input and args.output):
        parser.error("--stage restore needs --input and --output")
    args.out = args.out or Path("runs") / args.task
    return args


def config_of(config, args):
    return config(**{f.name: getattr(args, flag.replace("-", "_")) for flag, f, _ in flags_of(config)})


# ---------------------------------------------------------------- processes, photos, settings

class Run:
    """What every stage is handed: the resolved settings, the device, this process's rank."""

    def __init__(self, args):
        self.args, self.out = args, args.out
        self.adapter, self.synth, self.distill = (config_of(c, args) for c in (AdapterConfig, SynthConfig, DistillConfig))
        self.rank, self.ranks = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        wanted = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
        if wanted == "cuda" and self.ranks > 1:
            wanted = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
        try:
            self.device = torch.device(wanted)
            torch.zeros(1, device=self.device)
        except (RuntimeError, AssertionError) as error:
            raise ValueError(f"--device {wanted}: {str(error).splitlines()[0]}") from None
        self.dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[args.precision]
        if self.ranks > 1:
            dist.init_process_group("nccl" if self.device.type == "cuda" else "gloo", timeout=timedelta(hours=6))
        self.main = self.rank == 0

    def say(self, text):
        if self.main:
            print(text, flush=True)

    def wait(self):
        if self.ranks > 1:
            dist.barrier()


def load_photos(folder, side, run, flag):
    """All readable photos of a folder, sub-folders too: list of (3,H,W) uint8, at least `side` px high and wide."""
    files = list_images(folder, recursive=True) if folder.is_dir() else None
    if not files:
        raise ValueError(f"{flag} {folder}: " + ("no such folder" if files is None else "no image file in it (png, jpg, bmp, webp, tif)"))

    def load(file):
        try:
            photo = read_image(file)
        except ValueError as error:
            return str(error)
        shorter = min(photo.shape[1:])
        wanted = side if shorter < side else min(shorter, max(side, LARGEST))
        return (photo, False) if wanted == shorter else (resize(photo, wanted, antialias=True), shorter < side)

    with ThreadPoolExecutor(os.cpu_count()) as threads:
        loaded = list(tqdm(threads.map(load, files), f"{flag[2:]:8s}", len(files), disable=None if run.main else True))
    for problem in (x for x in loaded if isinstance(x, str)):
        run.say(f"skipped: {problem}")
    photos = [x for x in loaded if not isinstance(x, str)]
    if not photos:
        raise ValueError(f"{flag} {folder}: none of its {len(files)} image files can be read")
    if small := sum(up for _, up in photos):
        run.say(f"{flag}: {small} of {len(photos)} photos are smaller than the crop of {side} px and were resized up")
    return [photo for photo, _ in photos]


def settle(run):
    """The run folder: what is resolved is written to config.json; a folder made with other settings is refused."""
    args, file = run.args, run.out / "config.json"
    versions = {name: sys.modules[name].__version__ for name in ("torch", "torchvision", "diffusers", "transformers", "numpy", "PIL") if name in sys.modules}
    path = lambda p: None if p is None else str(Path(p).resolve()) if Path(p).exists() else str(p)
    settings = {"task": args.task, "sd": path(args.sd), "degraded": path(args.degraded), "clean": path(args.clean),
                "teacher": path(args.teacher), "teacher_multiple": args.teacher_multiple, "student_width": args.student_width,
                "test": path(args.test), "tile": args.tile, "precision": args.precision, "seed": args.seed,
                "processes": run.ranks, "adapter": asdict(run.adapter), "synth": asdict(run.synth), "distill": asdict(run.distill),
                "versions": {"python": platform.python_version(), **versions}}
    old = {}
    if file.exists() and not args.restart:
        try:
            old = json.loads(file.read_text())
        except ValueError:
            raise ValueError(f"{file} is not readable; --restart begins anew") from None
        flat = lambda s: {(f"{k}.{j}" if isinstance(v, dict) else k): w for k, v in s.items() if k not in FREE
                          for j, w in (v.items() if isinstance(v, dict) else [(k, v)])}
        before, now = flat(old), flat(settings)
        differ = [f"{k} was {before.get(k)!r}, now {now.get(k)!r}" for k in sorted(before.keys() | now.keys()) if before.get(k) != now.get(k)]
        if differ:
            raise ValueError(f"{run.out} was made with other settings: {'; '.join(differ)}. Give another --out, or --restart to begin anew")
    run.wait()
    if run.main:
        if args.restart and file.exists():                 # only what a run of ours wrote
            shutil.rmtree(run.out)
        elif args.restart and run.out.is_dir() and any(run.out.iterdir()):
            raise ValueError(f"{run.out} holds no run of this program (no config.json): --restart won't empty it")
        if old and (old["test"], old["tile"]) != (settings["test"], settings["tile"]):
            (run.out / "metrics.json").unlink(missing_ok=True)
        run.out.mkdir(parents=True, exist_ok=True)
        write_text(file, json.dumps(settings, indent=2))
    run.wait()


def write_text(path, text):
    path.with_suffix(".tmp").write_text(text, encoding="utf-8")
    os.replace(path.with_suffix(".tmp"), path)


def from_demo(run):
    """What was left out comes from the embedded demo: its photos are written to OUT/demo and read like anybody's."""
    args = run.args
    missing = [flag for flag in ("degraded", "clean", "test") if getattr(args, flag) is None]
    embedded = missing + [flag for flag in ("sd", "teacher") if getattr(args, flag).startswith(str(WEIGHTS))]
    if embedded:
        run.say("from the embedded demo: " + ", ".join(f"--{flag}" for flag in embedded))
    if missing and run.main:
        try:
            import demo
        except ImportError:
            raise ValueError("there is no demo.py: give " + ", ".join(f"--{flag}" for flag in missing)) from None
        demo.write_photos(run.out / "demo", args.task, missing)
    for flag in missing:
        setattr(args, flag, run.out / "demo" / flag)
    run.wait()


# ---------------------------------------------------------------- the stages

def run_adapter(run, sd, degraded):
    adapter = PromptAdapter(sd.width, run.adapter.tokens)
    loader = CropPairs(degraded, sd, run.synth.size or sd.size, run.adapter.batch, run.args.seed + 1000 * run.rank)
    train_adapter(adapter, sd, loader, run.adapter, seed=run.args.seed + run.rank, checkpoint=run.out / "adapter.pt")
    if run.main:
        save_adapter(adapter, run.out / "adapter.safetensors")
        (run.out / "adapter.pt").unlink(missing_ok=True)


def run_synth(run, sd, clean, degraded):
    adapter = load_adapter(run.out / "adapter.safetensors", run.device)
    synthesize_folder(clean, degraded, adapter, sd, run.synth, run.out / "synth", seed=run.args.seed, rank=run.rank, ranks=run.ranks)
    run.wait()
    if run.main:
        shown = range(min(8, run.synth.images))
        x_c, x_d = inputs(clean, degraded, run.synth.size or sd.size, shown, run.args.seed)
        made = [read_image(run.out / "synth" / f"{i:06d}.png") / 255 for i in shown]
        figure({"clean": list(x_c), "degraded (prompt)": list(x_d), "synthesized": made}, run.out / "synth.png")


def run_distill(run, teacher):
    images = [read_image(p) for p in list_images(run.out / "synth")][run.rank::run.ranks]
    if not images:
        raise ValueError(f"{run.out / 'synth'} holds fewer images than there are processes")
    crop = run.distill.crop or min(256, 2 * min(images[0].shape[1:]) // 3)
    if crop > min(min(image.shape[1:]) for image in images):
        raise ValueError(f"--distill-crop {crop} is larger than the synthesized images")
    targets = teacher_outputs(teacher, images, run.device, run.dtype) if run.distill.keep_teacher else None
    torch.manual_seed(run.args.seed)
    student = Restorer(run.args.student_width)
    distill(teacher, student, Crops(images, crop, run.distill.batch, targets, run.args.seed + 1000 * run.rank), run.distill,
            device=run.device, dtype=run.dtype, checkpoint=run.out / "student.pt")
    if run.main:
        save_restorer(student, run.out / "student.safetensors")
        (run.out / "student.pt").unlink(missing_ok=True)


def run_evaluate(run, teacher, pairs):
    """metrics.json, .md and .csv, figure.png; where the test folder has no ground truth, the student's outputs alone."""
    args, models = run.args, {"input": None, "teacher": teacher, "student": load_restorer(run.out / "student.safetensors", run.device)}
    if not pairs:
        run.say(f"{args.test} has no ground truth: the student's outputs are written to {run.out / 'restored'}")
        return restore_files(models["student"], list_images(args.test, recursive=True), run.out / "restored", args.tile)
    found = {who: evaluate(model, pairs, tile=args.tile, label=f"{who:8s}") for who, model in models.items()}
    rows = {who: result["images"] for who, result in found.items()}
    sets = list(dict.fromkeys(pair.set for pair in pairs))
    part = lambda name: {who: means([row for row in rows[who] if row["set"] == name]) for who in rows}
    price = {who: cost(models[who]) for who in ("teacher", "student")}
    metrics = {"task": args.task, "test_set": " + ".join(sets), "n_images": len(pairs)}
    metrics |= {who: {k: found[who][k] for k in METRICS} | price.get(who, {}) for who in models}
    metrics["ratio"] = {k: price["teacher"][k] / price["student"][k] for k in price["student"]}
    if len(sets) > 1:
        metrics["sets"] = {name: {"n_images": sum(pair.set == name for pair in pairs)} | part(name) for name in sets}
    metrics["definitions"], metrics["cost_at"] = DEFINITIONS, f"256x256, batch 1, float32, on {run.device.type}"
    if cropped := found["input"]["cropped"]:
        metrics["note"] = f"The ground truth of {cropped} photos was larger than its degraded photo and was centre-cropped to it."
    write_text(run.out / "metrics.md", table(metrics))
    with open(run.out / "metrics.csv.tmp", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["set", "image"] + [f"{who}_{k}" for who in rows for k in METRICS])
        for i, pair in enumerate(pairs):
            writer.writerow([pair.set, pair.degraded.name] + [f"{rows[who][i][k]:.5f}" for who in rows for k in METRICS])
    os.replace(run.out / "metrics.csv.tmp", run.out / "metrics.csv")
    columns = {who: [] for who in (*models, "ground truth")}
    for pair in pairs[::max(1, len(pairs) // 6)][:6]:
        degraded, truth, _ = pair.read()
        for who, model in models.items():
            columns[who].append(degraded if model is None else restore(model, degraded, args.tile))
        columns["ground truth"].append(truth)
    figure(columns, run.out / "figure.png")
    write_text(run.out / "metrics.json", json.dumps(metrics, indent=2))
    run.say((run.out / "metrics.md").read_text())


def restore_files(model, files, folder, tile):
    """Writes the model's outputs for photos as PNG files of the same names; unreadable ones are named and skipped."""
    folder.mkdir(parents=True, exist_ok=True)
    names, done = [file.stem for file in files], 0
    for file in tqdm(files, "restore ", disable=None):
        try:
            photo = read_image(file)
        except ValueError as error:
            print(f"skipped: {error}", flush=True)
            continue
        name = file.stem if names.count(file.stem) == 1 else file.name        # photo.jpg beside photo.png
        image = restore(model, photo.float().div_(255), tile)
        to_pil_image(image.mul_(255).round_().to(torch.uint8)).save(folder / f"{name}.tmp", "PNG")
        os.replace(folder / f"{name}.tmp", folder / f"{name}.png")
        done += 1
    if not done:
        raise ValueError("none of the photos can be read")


def run_restore(run):
    args = run.args
    if not args.input.exists():
        raise ValueError(f"--input {args.input}: no such file or folder")
    files = sorted(list_images(args.input), key=natural) if args.input.is_dir() else [args.input]
    if not files:
        raise ValueError(f"--input {args.input}: no image file in it (png, jpg, bmp, webp, tif)")
    model = load_restorer(args.model or run.out / "student.safetensors", run.device, args.teacher_multiple)
    restore_files(model, files, args.output, args.tile)


def run_export(run):
    """OUT/student.pt2: a torch.export program for any height and width that are multiples of 8; student.onnx where onnx is."""
    student = load_restorer(run.out / "student.safetensors")
    m = student.multiple                                   # the caller pads: torch.export can't follow a padding by 0 or more
    sizes = {"image": {2: m * torch.export.Dim("rows", min=2, max=2048), 3: m * torch.export.Dim("columns", min=2, max=2048)}}
    example = torch.rand(1, 3, 9 * m, 12 * m)
    program = torch.export.export(student, (example,), dynamic_shapes=sizes)
    torch.export.save(program, run.out / "student.tmp.pt2")
    os.replace(run.out / "student.tmp.pt2", run.out / "student.pt2")
    run.say(f"written: {run.out / 'student.pt2'}")
    try:
        import onnx, onnxscript                            # noqa: E401, F401  both are needed by torch.onnx
    except ImportError:
        return run.say("no student.onnx: the packages onnx and onnxscript are not installed")
    torch.onnx.export(student, (example,), run.out / "student.tmp.onnx", dynamo=True, dynamic_shapes=sizes, external_data=False,
                      input_names=["image"], output_names=["restored"])
    os.replace(run.out / "student.tmp.onnx", run.out / "student.onnx")
    run.say(f"written: {run.out / 'student.onnx'}")


def main(argv=None):
    args = parse(argv)
    run = Run(args)
    if args.stage in (["restore"], ["export"]):
        return {"restore": run_restore, "export": run_export}[args.stage[0]](run)
    for flag in ("degraded", "clean", "test"):
        folder = getattr(args, flag)
        if folder is not None and not folder.is_dir():
            raise ValueError(f"--{flag} {folder}: no such folder")
    pairs = find_pairs(args.test) if args.test else None   # what is wrong is said before the long work
    teacher = load_restorer(args.teacher, run.device, args.teacher_multiple)
    with torch.no_grad():
        teacher(torch.zeros(1, 3, 64, 64, device=run.device))
    embedded = isinstance(teacher, Restorer)
    args.student_width = args.student_width or (max(1, teacher.config["width"] // 2) if embedded else 32)
    settle(run)
    finished = {"adapter": run.out / "adapter.safetensors", "synth": run.out / "synth.png",
                "distill": run.out / "student.safetensors", "evaluate": run.out / "metrics.json"}
    stages = [s for s in STAGES if s in (args.stage or STAGES)]
    left = [s for s in stages if not finished[s].exists() or s == "evaluate" and args.stage]
    for stage in STAGES[:STAGES.index(stages[0])]:
        if not finished[stage].exists():
            raise ValueError(f"--stage {stages[0]} needs {finished[stage]}: run --stage {stage} first")
    for stage in stages:
        if stage not in left:
            run.say(f"{stage}: done already ({finished[stage]})")
    from_demo(run)
    pairs = find_pairs(args.test) if pairs is None else pairs
    if {"adapter", "synth"} & set(left):
        sd = load_stable_diffusion(args.sd, run.device, run.dtype)
        start_timestep(sd, args.strength, args.steps)
        sd.null_prompt(args.tokens)
        side = args.size or sd.size
        if side % 8 or side < 16:
            raise ValueError(f"--size must be a multiple of 8 px, at least 16, not {side}")
        degraded = load_photos(args.degraded, side, run, "--degraded")
        clean = load_photos(args.clean, side, run, "--clean") if "synth" in left else None
    for stage in left:
        run.say(f"--- {stage}")
        {"adapter": lambda: run_adapter(run, sd, degraded), "synth": lambda: run_synth(run, sd, clean, degraded),
         "distill": lambda: run_distill(run, teacher),
         "evaluate": lambda: run_evaluate(run, teacher, pairs) if run.main else None}[stage]()
        run.wait()
    run.say(f"done: {run.out}")


def stop(number, frame):
    raise KeyboardInterrupt


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, stop)
    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("stopped; the same command goes on from here")
    except torch.OutOfMemoryError as error:
        print(f"d4ir.py: error: out of memory: lower --adapter-batch, --batch, --distill-batch or --tile ({str(error).splitlines()[0]})", file=sys.stderr)
        sys.exit(2)
    except (ValueError, OSError) as error:
        print(f"d4ir.py: error: {error}", file=sys.stderr)
        sys.exit(2)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
