"""D4IR: a big weather-restoration network into a small one, without its training data.

    python d4ir.py --task desnow                      # everything embedded: no download, no GPU
    python d4ir.py --task desnow --sd stable-diffusion-v1-5/stable-diffusion-v1-5 \\
        --degraded snow/ --clean good/ --teacher net.py:PromptIR@promptir.ckpt --test Snow100K-L/
    python d4ir.py --task desnow --stage restore --input photo.jpg --output out/
    torchrun --nproc_per_node=4 d4ir.py --task desnow ...             # the same on four GPUs

Four stages, in this order: adapter (DPA), synth (CCD), distill (PKD), evaluate. The same command
goes on where it was stopped. Wang, Luo, Xie, Qu: arXiv 2409.03455.
"""
import argparse
import csv
import importlib.util
import inspect
import json
import os
import platform
import re
import shutil
import signal
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, fields
from datetime import timedelta
from pathlib import Path

import diffusers
import huggingface_hub
import torch
import torch.distributed as dist
import torchvision
import transformers
from safetensors import SafetensorError
from torchvision.transforms.functional import resize
from tqdm import tqdm

from distill import Crops, DistillConfig, distill, teacher_outputs
from evaluate import (METRICS, evaluate, figure, find_pairs, levels, list_images, read_image,
                      report, restore, table)
from models import Restorer, first_line, load_restorer, load_stable_diffusion, save_restorer
from prompt_adapter import (AdapterConfig, CropPairs, PromptAdapter, load_adapter, save_adapter,
                            train_adapter)
from synth import (SCHEDULERS, SynthConfig, inputs, start_timestep, synthesize_folder,
                   write_png)

# What each stage leaves in the run folder; the first is there when it is finished.
PRODUCTS = {"adapter": ("adapter.safetensors", "adapter.pt"), "synth": ("synth.png", "synth"),
            "distill": ("student.safetensors", "student.pt", "student.pt2", "student.onnx"),
            "evaluate": ("metrics.json", "metrics.md", "metrics.csv", "figure.png", "restored")}
# The captions at whose mean the prompts start; our choice.
CAPTIONS = {"derain": ["a photo in heavy rain"], "dehaze": ["a photo in heavy haze"],
            "desnow": ["a photo in heavy snow"]}
CAPTIONS["all"] = sum(CAPTIONS.values(), [])
# A task's own defaults, where they are not the dataclasses'; our choice.
OF_TASK = {"dehaze": dict(veil=True, guidance=8.0), "all": dict(distill_steps=4500)}
CONFIGS = {AdapterConfig: "adapter-", SynthConfig: "", DistillConfig: "distill-"}
WEIGHTS = Path(__file__).resolve().parent / "weights"
LARGEST = 1024                          # px: photos whose shorter side is longer are reduced


# ---------------------------------------------------------------- the command line

class Parser(argparse.ArgumentParser):
    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message}\n")


def flags_of(config):
    """(flag, field, help) of a stage's config; the help is the comment beside the field."""
    comments = dict(re.findall(r"^    (\w+): .*?# (.*)$", inspect.getsource(config), re.M))
    for f in fields(config):
        prefix = "" if f.name == "tokens" else CONFIGS[config]
        yield prefix + f.name.replace("_", "-"), f, comments[f.name]


def parse(argv):
    parser = Parser(prog="d4ir.py", description=__doc__,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--task", required=True, choices=("derain", "dehaze", "desnow", "all"),
        help="what the student is for; all: one multi-weather student")
    add("--stage", nargs="+", choices=(*PRODUCTS, "restore", "export"),
        help="one or more of the four; without it all. On their own: restore, export")
    add("--sd", default=str(WEIGHTS / "mini-sd"), metavar="SD",
        help="Stable Diffusion 1.x or 2.x: a diffusers folder or hub id (the embedded mini-SD)")
    add("--degraded", type=Path, metavar="DIR", help="web photos in bad weather (the demo's)")
    add("--clean", type=Path, metavar="DIR", help="web photos in good weather (the demo's)")
    add("--teacher", default=str(WEIGHTS / "teacher.safetensors"), metavar="SPEC",
        help="a .safetensors of this project or FILE.py:NAME@WEIGHTS (the embedded teacher)")
    add("--teacher-multiple", type=int, default=1, metavar="N",
        help="pad what a FILE.py network gets to a multiple of N (1)")
    add("--student-width", type=int, metavar="N",
        help="the student's channels (half the teacher's; 32 for a FILE.py teacher)")
    add("--test", type=Path, metavar="DIR", help="a paired benchmark folder (the demo's)")
    add("--out", type=Path, metavar="DIR", help="the run folder (runs/TASK)")
    add("--restart", action="store_true", help="do the stages anew, from the first of --stage on")
    add("--device", help="cpu, cuda, cuda:1 ... (cuda if there is one)")
    add("--precision", choices=("bf16", "fp16", "fp32"),
        help="of Stable Diffusion and of autocast; metrics are always in fp32 (bf16; fp32 on a CPU "
             "without bf16 instructions, where bf16 is ten times slower)")
    add("--seed", type=int, default=0, help="(0)")
    add("--tile", type=int, default=1024, metavar="PX",
        help="photos larger than this are restored in tiles; 0: never (1024)")
    add("--input", type=Path, metavar="PATH", help="restore: a photo or a folder of photos")
    add("--model", metavar="SPEC", help="restore: the network (OUT/student.safetensors)")
    add("--output", type=Path, metavar="DIR", help="restore: where the PNG files go")
    least = {"teacher-multiple": 1, "student-width": 1, "seed": 0, "tile": 0}
    for config in CONFIGS:
        group = parser.add_argument_group(config.__name__, config.__doc__)
        for flag, f, comment in flags_of(config):
            kind = dict(type=type(f.default))
            if isinstance(f.default, bool):
                kind = dict(action=argparse.BooleanOptionalAction)
            else:
                least[flag] = 1 if isinstance(f.default, int) and f.default else 0
            comment = f"{comment} ({f.default})".replace("%", "%%")
            group.add_argument(f"--{flag}", default=f.default, help=comment, **kind)
    parser.set_defaults(**OF_TASK.get(parser.parse_args(argv).task, {}))
    args = parser.parse_args(argv)
    for flag, bound in least.items():
        value = getattr(args, flag.replace("-", "_"))
        if not isinstance(value, (str, type(None))) and value < bound:
            parser.error(f"--{flag} must be at least {bound}, not {value}")
    if args.scheduler not in SCHEDULERS:
        parser.error(f"--scheduler must be one of {', '.join(SCHEDULERS)}, not {args.scheduler!r}")
    if {"restore", "export"} & set(args.stage or ()) and len(args.stage) > 1:
        parser.error("--stage restore and --stage export go on their own")
    if args.stage == ["restore"] and not (args.input and args.output):
        parser.error("--stage restore needs --input and --output")
    args.out = args.out or Path("runs") / args.task
    return args


# ---------------------------------------------------------------- what every stage is handed

class Run:
    """The settings, the device, and this process's rank."""

    def __init__(self, args):
        self.args, self.out = args, args.out
        self.adapter, self.synth, self.distill = (
            config(**{f.name: getattr(args, flag.replace("-", "_"))
                      for flag, f, _ in flags_of(config)}) for config in CONFIGS)
        self.rank, self.ranks = (int(os.environ.get(*x)) for x in (("RANK", 0), ("WORLD_SIZE", 1)))
        self.main = self.rank == 0
        wanted = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
        if wanted == "cuda":
            wanted = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
        try:
            self.device = torch.device(wanted)
            torch.zeros(1, device=self.device)
        except (RuntimeError, AssertionError) as error:
            raise ValueError(f"--device {wanted}: {first_line(error)}") from None
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        cpu = getattr(torch.cpu, "get_capabilities", dict)()           # torch before 2.10: {}
        fast = self.device.type != "cpu" or any(map(cpu.get, ("avx512_bf16", "amx_bf16", "bf16")))
        args.precision = args.precision or ("bf16" if fast else "fp32")
        self.dtype = dict(bf16=torch.bfloat16, fp16=torch.float16,
                          fp32=torch.float32)[args.precision]
        if self.ranks > 1:
            backend = "nccl" if self.device.type == "cuda" else "gloo"
            dist.init_process_group(backend, timeout=timedelta(hours=6))

    def say(self, text):
        if self.main:
            print(text, flush=True)

    def wait(self):
        if self.ranks > 1:
            dist.barrier()

    def finished(self, stage):
        return (self.out / PRODUCTS[stage][0]).exists()

    def begun(self, stage):
        return any((self.out / name).exists() for name in PRODUCTS[stage])

    def settings(self):
        """What each stage depends on."""
        args = self.args
        path = lambda p: str(Path(p).resolve()) if p and Path(p).exists() else p and str(p)
        common = dict(task=args.task, precision=args.precision, seed=args.seed)
        return {"adapter": common | dict(sd=path(args.sd), degraded=path(args.degraded),
                                         size=args.size) | asdict(self.adapter),
                "synth": dict(clean=path(args.clean)) | asdict(self.synth),
                "distill": dict(teacher=path(args.teacher), teacher_multiple=args.teacher_multiple,
                                student_width=args.student_width) | asdict(self.distill),
                "evaluate": dict(test=path(args.test), tile=args.tile)}


def settle(run, stages):
    """Refuses a run folder whose begun stages have other settings; writes config.json."""
    file, now, old = run.out / "config.json", run.settings(), {}
    anew = list(PRODUCTS)[list(PRODUCTS).index(stages[0]):] if run.args.restart else []
    kept = [stage for stage in PRODUCTS if run.begun(stage) and stage not in anew]
    try:
        old = json.loads(file.read_text(encoding="utf-8"))
        old = {stage: dict(old[stage]) for stage in PRODUCTS}      # what isn't ours raises here
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        if kept or any(map(run.begun, PRODUCTS)) or file.exists():
            raise ValueError(f"{run.out} holds files, but no config.json of this program says what "
                             "they were made with: give another --out") from None
    differ = [f"{key} of {stage} was {old[stage].get(key)!r}, now {value!r}"
              for stage in kept if stage != "evaluate" for key, value in now[stage].items()
              if old[stage].get(key) != value]
    if differ:
        raise ValueError(f"{run.out} was made with other settings: {'; '.join(differ)}. Give the "
                         "same ones, or another --out, or --restart to begin anew")
    if "evaluate" not in stages:
        now["evaluate"] = old["evaluate"] if old else now["evaluate"]
    elif run.args.stage or old and old["evaluate"] != now["evaluate"]:
        anew.append("evaluate")
    run.wait()                                             # all have looked; now it changes
    if run.main:
        if anew == ["evaluate"] and not run.args.restart and run.finished("evaluate"):
            shutil.rmtree(run.out / "previous", ignore_errors=True)
            (run.out / "previous").mkdir()
            for path in filter(Path.exists, (run.out / name for name in PRODUCTS["evaluate"])):
                os.replace(path, run.out / "previous" / path.name)
        for name in (name for stage in anew for name in PRODUCTS[stage]):
            path = run.out / name
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        run.out.mkdir(parents=True, exist_ok=True)
        versions = {m.__name__: m.__version__
                    for m in (torch, torchvision, diffusers, transformers)}
        versions |= {name: sys.modules[name].__version__ for name in ("numpy", "PIL")}
        versions["python"] = platform.python_version()
        write_text(file, json.dumps(now | dict(versions=versions, device=str(run.device),
                                               processes=run.ranks), indent=2))
    run.wait()


def write_text(path, text):
    Path(f"{path}.tmp").write_text(text, encoding="utf-8")
    os.replace(f"{path}.tmp", path)


def from_demo(run):
    """What was left out comes from the demo, whose photos are read like anybody's."""
    args = run.args
    missing = [flag for flag in ("degraded", "clean", "test") if getattr(args, flag) is None]
    embedded = missing + [flag for flag in ("sd", "teacher")
                          if getattr(args, flag).startswith(str(WEIGHTS))]
    if embedded:
        run.say("from the embedded demo: " + ", ".join(f"--{flag}" for flag in embedded))
    if missing and run.main:
        try:
            import demo
        except ImportError:
            raise ValueError(f"no demo.py: give --{' and --'.join(missing)}") from None
        demo.write_photos(run.out / "demo" / args.task, args.task, missing)
    for flag in missing:
        setattr(args, flag, run.out / "demo" / args.task / flag)
    run.wait()


def load_photos(folder, side, run, flag):
    """All readable photos below a folder: (3,H,W) uint8, at least `side` px high and wide."""
    files = list_images(folder, recursive=True)
    if not files:
        raise ValueError(f"{flag} {folder}: no image file in it (png, jpg, bmp, webp, tif)")
    small = []

    def load(file):
        try:
            photo = read_image(file)
        except ValueError as error:
            return run.say(f"skipped: {error}")
        shorter = min(photo.shape[1:])
        small.append(shorter < side)
        wanted = min(max(side, shorter), max(side, LARGEST))
        return photo if wanted == shorter else resize(photo, wanted, antialias=True)

    with ThreadPoolExecutor(os.cpu_count()) as threads:
        photos = list(tqdm(threads.map(load, files), f"{flag[2:]:8s}", len(files),
                           disable=None if run.main else True))
    photos = [photo for photo in photos if photo is not None]
    if not photos:
        raise ValueError(f"{flag} {folder}: none of its {len(files)} image files can be read")
    if any(small):
        run.say(f"{flag}: {sum(small)} of {len(photos)} photos are smaller than the crop of {side} "
                "px and were resized up")
    return photos


# ---------------------------------------------------------------- the stages

def run_adapter(run, sd, degraded):
    torch.manual_seed(run.args.seed)
    base = sd.text_prompt(CAPTIONS[run.args.task], run.adapter.tokens).mean(0, keepdim=True)
    adapter = PromptAdapter(sd.width, base.shape[1], base=base)
    seed = run.args.seed + 1000 * run.rank
    loader = CropPairs(degraded, sd, run.synth.size or sd.size, run.adapter.batch, seed)
    train_adapter(adapter, sd, loader, run.adapter, seed=seed, checkpoint=run.out / "adapter.pt")
    if run.main:
        save_adapter(adapter, run.out / "adapter.safetensors")
        (run.out / "adapter.pt").unlink(missing_ok=True)


def run_synth(run, sd, degraded, clean):
    adapter = load_adapter(run.out / "adapter.safetensors", run.device)
    synthesize_folder(clean, degraded, adapter, sd, run.synth, run.out / "synth",
                      seed=run.args.seed, rank=run.rank, ranks=run.ranks)
    run.wait()
    if run.main:
        shown = range(min(5, run.synth.images))
        x_c, x_d = inputs(clean, degraded, run.synth.size or sd.size, run.args.seed, shown)
        made = [read_image(run.out / "synth" / f"{i:06d}.png") / 255 for i in shown]
        figure({"clean": x_c, "degraded (its weather is asked for)": x_d, "synthesized": made},
               run.out / "synth.png")


def crop_side(run, side):
    """px: the side of the student's training crops, from images of this side."""
    return run.distill.crop or min(256, 2 * side // 3)


def kept_outputs(run, teacher, images):
    """T(x) of whole images, once; None where it is to be computed for every crop."""
    if run.distill.keep_teacher:
        return teacher_outputs(teacher, images, run.device, run.dtype, min(8, run.distill.batch))


def run_distill(run, teacher):
    files = list_images(run.out / "synth")[run.rank::run.ranks]
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        images = list(threads.map(read_image, files))
    smallest = min((min(image.shape[1:]) for image in images), default=0)
    crop = crop_side(run, smallest)
    if not 0 < crop <= smallest:
        raise ValueError(f"--distill-crop {crop} is larger than the synthesized images, {smallest} "
                         f"px, or there are fewer than {run.ranks}")
    targets = kept_outputs(run, teacher, images)
    torch.manual_seed(run.args.seed)
    student = Restorer(run.args.student_width, window=crop)
    loader = Crops(images, crop, run.distill.batch, targets, run.args.seed + 1000 * run.rank)
    distill(teacher, student, loader, run.distill, device=run.device, dtype=run.dtype,
            checkpoint=run.out / "student.pt")
    if run.main:
        save_restorer(student, run.out / "student.safetensors")
        (run.out / "student.pt").unlink(missing_ok=True)


def run_evaluate(run, teacher, pairs):
    """metrics.json, .md and .csv, figure.png; without ground truth, the student's outputs."""
    args, student = run.args, load_restorer(run.out / "student.safetensors", run.device)
    if not pairs:
        run.say(f"{args.test} has no ground truth: the student's outputs are written to "
                f"{run.out / 'restored'}")
        return restore_files(student, args.test, run.out / "restored", args.tile)
    models = {"input": None, "teacher": teacher, "student": student}
    found = {who: evaluate(model, pairs, tile=args.tile, label=f"{who:8s}")
             for who, model in models.items()}
    metrics = {"task": args.task} | report(models, found, pairs) | {"tile": args.tile}
    with open(run.out / "metrics.csv.tmp", "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["set", "image"] + [f"{who}_{key}" for who in found for key in METRICS])
        for pair, *rows in zip(pairs, *(result["images"] for result in found.values())):
            writer.writerow([pair.set, pair.degraded.name]
                            + [f"{row[key]:.5f}" for row in rows for key in METRICS])
    os.replace(run.out / "metrics.csv.tmp", run.out / "metrics.csv")
    columns = {who: [] for who in (*models, "ground truth")}
    for i in sorted({i * (len(pairs) - 1) // 5 for i in range(6)}):
        degraded, truth, _ = pairs[i].read()
        shown = [degraded if model is None else restore(model, degraded, args.tile)
                 for model in models.values()] + [truth]
        for column, image in zip(columns.values(), shown):
            column.append(image if max(image.shape) <= 512 else resize(image, 256, antialias=True))
    figure(columns, run.out / "figure.png")
    write_text(run.out / "metrics.md", table(metrics))
    write_text(run.out / "metrics.json", json.dumps(metrics, indent=2))
    run.say(table(metrics))


def restore_files(model, source, folder, tile):
    """Writes a model's outputs for a photo, or all below a folder, as PNG files."""
    files = list_images(source, recursive=True) if source.is_dir() else [source]
    root, done, inside = source if source.is_dir() else source.parent, 0, folder.resolve()
    if source.resolve() in inside.parents:                 # what was restored before
        files = [file for file in files if inside not in file.resolve().parents]
    if not files:
        raise ValueError(f"{source}: no image file in it (png, jpg, bmp, webp, tif)")
    targets = [folder / file.relative_to(root).with_suffix(".png") for file in files]
    wanted = Counter(targets)
    if clash := {t.resolve() for t in targets} & {file.resolve() for file in files}:
        raise ValueError(f"{clash.pop()} is one of the photos to restore: give another --output")
    for file, target in zip(tqdm(files, "restore ", disable=None), targets):
        if wanted[target] > 1:                             # photo.jpg beside photo.png
            target = target.with_name(f"{file.name}.png")
        try:
            photo = read_image(file)
        except ValueError as error:
            print(f"skipped: {error}", flush=True)
            continue
        image = levels(restore(model, photo / 255, tile)).byte()
        target.parent.mkdir(parents=True, exist_ok=True)
        write_png(image, target)
        done += 1
    if not done:
        raise ValueError(f"{source}: none of its photos can be read")


def run_restore(run):
    args = run.args
    if not args.input.exists():
        raise ValueError(f"--input {args.input}: no such file or folder")
    spec = args.model or run.out / "student.safetensors"
    model = load_restorer(spec, run.device, args.teacher_multiple)
    restore_files(model, args.input, args.output, args.tile)


def run_export(run):
    """student.pt2: a torch.export program for any height and width that are multiples of 16 (the
    caller pads: torch.export can't follow a padding that may be 0); student.onnx where onnx is."""
    student = load_restorer(run.out / "student.safetensors")
    m, example = student.multiple, torch.rand(1, 3, 80, 96)
    sizes = {2: m * torch.export.Dim("rows", min=2, max=1024),
             3: m * torch.export.Dim("columns", min=2, max=1024)}
    program = torch.export.export(student, (example,), dynamic_shapes={"image": sizes})
    torch.export.save(program, run.out / "student.tmp.pt2")
    os.replace(run.out / "student.tmp.pt2", run.out / "student.pt2")
    run.say(f"written: {run.out / 'student.pt2'}")
    if not all(importlib.util.find_spec(name) for name in ("onnx", "onnxscript")):
        return run.say("no student.onnx: the packages onnx and onnxscript are not installed")
    torch.onnx.export(program, (), run.out / "student.tmp.onnx", dynamo=True, external_data=False,
                      input_names=["image"], output_names=["restored"], verbose=False)
    os.replace(run.out / "student.tmp.onnx", run.out / "student.onnx")
    run.say(f"written: {run.out / 'student.onnx'}")


def look(run):
    """What is wrong is said before the long work: the folders, the pairs, the teacher. Returns the
    pairs of --test (None without it) and the teacher; settles the student's width."""
    args = run.args
    for flag in ("degraded", "clean", "test"):
        folder = getattr(args, flag)
        if folder is not None and not folder.is_dir():
            raise ValueError(f"--{flag} {folder}: no such folder")
    pairs = find_pairs(args.test) if args.test else None
    teacher = load_restorer(args.teacher, run.device, args.teacher_multiple)
    x = torch.zeros(1, 3, 101, 67, device=run.device)      # no side is a multiple of anything
    with torch.no_grad():
        teacher(x)
        try:
            with torch.autocast(run.device.type, run.dtype, enabled=run.dtype != torch.float32):
                teacher(x)
        except ValueError as error:
            reason = first_line(error.__cause__ or error)
            raise ValueError(f"the teacher can't work in {args.precision} ({reason}): give "
                             "--precision fp32") from None
    own = isinstance(teacher, Restorer)
    args.student_width = args.student_width or (max(1, teacher.config["width"] // 2) if own else 32)
    return pairs, teacher


def load_diffusion(run):
    """The Stable Diffusion, once the settings have been held against it."""
    sd, args = load_stable_diffusion(run.args.sd, run.device, run.dtype), run.args
    start_timestep(sd, args.strength, args.steps)
    sd.null_prompt(args.tokens)
    size = args.size or sd.size
    if size % (8 * sd.factor):
        raise ValueError(f"--size must be a multiple of {8 * sd.factor} px, not {size}")
    if args.distill_crop > size:
        raise ValueError(f"--distill-crop {args.distill_crop} is larger than the images, {size} px")
    return sd


def main(argv=None):
    args = parse(argv)
    run = Run(args)
    if args.stage in (["restore"], ["export"]):
        alone = {"restore": run_restore, "export": run_export}[args.stage[0]]
        return alone(run) if run.main else None

    pairs, teacher = look(run)
    stages = [stage for stage in PRODUCTS if stage in (args.stage or PRODUCTS)]
    for need, stage in zip(PRODUCTS, list(PRODUCTS)[1:]):
        lost = args.restart and stage != stages[0]             # --restart would delete it
        if stage in stages and need not in stages and (lost or not run.finished(need)):
            raise ValueError(f"--stage {stage} needs {run.out / PRODUCTS[need][0]}: run --stage "
                             f"{need} first")
    sd = None
    if any(s in ("adapter", "synth") and (args.restart or not run.finished(s)) for s in stages):
        sd = load_diffusion(run)
    settle(run, stages)
    from_demo(run)
    pairs = find_pairs(args.test) if pairs is None else pairs
    photos = []
    for stage in stages:
        if run.finished(stage):
            run.say(f"{stage}: done already ({run.out / PRODUCTS[stage][0]})")
            continue
        run.say(f"--- {stage}")
        if stage in ("adapter", "synth"):
            for flag in ("degraded", "clean")[len(photos):1 + (stage == "synth")]:
                side = args.size or sd.size
                photos.append(load_photos(getattr(args, flag), side, run, f"--{flag}"))
        if stage == "adapter":
            run_adapter(run, sd, *photos)
        elif stage == "synth":
            run_synth(run, sd, *photos)
        elif stage == "distill":
            sd, photos = None, []                          # their memory is needed no more
            run_distill(run, teacher)
        elif run.main:
            run_evaluate(run, teacher, pairs)
        if stage != "evaluate":                            # may take hours; nothing follows
            run.wait()
    run.say(f"done: {run.out}")


def stop(number, frame):
    raise KeyboardInterrupt


def command(main):
    """Runs a main as a command: what its user can mend is said in one line, exit code 2."""
    prog = Path(sys.argv[0]).name
    signal.signal(signal.SIGTERM, stop)
    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()
    huggingface_hub.utils.enable_progress_bars()           # of a download of gigabytes
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("stopped; what is finished is kept: the same command, without --restart, goes on")
    except torch.OutOfMemoryError as error:
        sys.stderr.write(f"{prog}: error: out of memory: lower --adapter-batch, --batch, "
                         f"--distill-batch or --tile ({first_line(error)})\n")
        sys.exit(2)
    except (ValueError, OSError, SafetensorError) as error:
        sys.stderr.write(f"{prog}: error: {' '.join(str(error).split())}\n")
        sys.exit(2)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    command(main)
