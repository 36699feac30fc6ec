"""D4IR: distils a large image-restoration network into a small one without its training data.

    python d4ir.py --task desnow                      # bundled demo: no download, no GPU
    python d4ir.py --task desnow --no-additions --out runs/paper      # the paper's method alone
    python d4ir.py --task desnow --sd stable-diffusion-v1-5/stable-diffusion-v1-5 \\
        --degraded snow/ --clean good/ --teacher net.py:PromptIR@promptir.ckpt \\
        --test Snow100K-L/ --out runs/snow100k
    python d4ir.py --task desnow --stage restore --input photo.jpg --output out/
    torchrun --nproc_per_node=4 d4ir.py --task desnow ...             # the same on four GPUs

Stages: adapter (DPA), synth (CCD), distill (PKD), evaluate. Rerun a command to resume it.
An independent implementation of arXiv 2409.03455 (Wang, Luo, Xie, Qu).
"""
import argparse
import hashlib
import inspect
import json
import math
import multiprocessing
import os
import platform
import re
import shutil
import signal
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, fields
from datetime import timedelta
from functools import cached_property
from importlib.metadata import version
from pathlib import Path

import diffusers
import huggingface_hub
import torch
import torch.distributed as dist
import transformers
from safetensors import SafetensorError
from torchvision.transforms.functional import center_crop, resize
from tqdm import tqdm

from distill import (Crops, DistillConfig, distill, on_disk, select_best, teacher_gains,
                     teacher_outputs)
from evaluate import (comparison_figure, evaluate, figure, find_pairs, list_images, plot_losses,
                      read_image, report, restore, restore_folder, table, write_csv)
from models import (Restorer, export_restorer, first_line, has_bf16, load_restorer,
                    load_stable_diffusion, save_restorer)
from prompt_adapter import (AdapterConfig, CropPairs, PromptAdapter, load_adapter, residuals,
                            save_adapter, train_adapter, update_norms)
from synth import SynthConfig, choose_timesteps, draw_crops, synthesize_folder, synthesize_photos

try:
    import fcntl
except ImportError:                     # Windows
    fcntl = None
try:
    import demo
    demo.WEIGHTS                        # an emptied folder still counts as a package
except (ImportError, AttributeError):   # the method works without demo/
    demo = None


@dataclass(frozen=True)
class Task:
    """Task-specific settings. All values are our choice."""
    captions: tuple                     # for the captions baseline, chosen on the demo's test set
    weather: tuple                      # kinds of weather, for demo photos and plain captions
    demo_settings: dict = field(default_factory=dict)       # override demo.SETTINGS

    def plain_captions(self):
        """Captions that name only the weather; the addition `caption_base` uses their mean."""
        return [f"a photo in {weather}" for weather in self.weather]


TASKS = {
    "derain": Task(("a photo in heavy rain",), ("rain",)),
    "dehaze": Task(("a photo in heavy haze",), ("haze",),
                   dict(guidance=8.0, anchor=False, negative_prompt="", distill_select=1.0)),
    "desnow": Task(("a photo in heavy snow",), ("snow",)),
    "all": Task(("a photo in heavy rain", "a photo in heavy haze", "a photo in heavy snow"),
                ("haze", "rain", "snow"), dict(distill_steps=4500, distill_select=1.0)),
}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# Files of each stage in the run folder; the first one exists once the stage is finished (evaluate:
# only with ground truth).
PRODUCTS = {"adapter": ("adapter.safetensors", "adapter.pt", "adapter.png", "log.jsonl"),
            "synth": ("synth.png", "synth"),
            "distill": ("student.safetensors", "student.pt", "losses.png", "student.pt2",
                        "student.onnx"),
            "evaluate": ("metrics.json", "metrics.md", "metrics.csv", "figure.png", "restored",
                         "input.json", "teacher.json", "student.json")}


# ---------------------------------------------------------------- the method: four stages

def main(argv=None):
    """Runs the stages in order, skipping finished ones. Returns the Run."""
    run = Run(parse(argv))
    if not run.stages:                                      # restore, export
        if run.is_main:
            STANDALONE[run.args.stage[0]](run)
        return run
    check_inputs(run)
    check_run_folder(run)
    write_demo_photos(run)
    run.log("additions: " + (", ".join(run.additions()) or "none (the paper's method)"))
    for stage in run.stages:
        if run.is_finished(stage):
            run.log(f"{stage}: already finished ({run.out / PRODUCTS[stage][0]})")
            continue
        run.log(f"--- {stage}")
        STAGES[stage](run)
    run.log(f"finished: {run.out}")
    return run


def adapter_stage(run):
    """DPA: trains the adapter (degraded photo to prompt), or copies the one given by --adapter."""
    sd, config, seed = run.sd, run.adapter, run.args.seed + 1000 * run.rank
    if run.args.adapter_file:
        adapter = load_adapter(run.args.adapter_file, run.device)
    else:
        torch.manual_seed(run.args.seed)
        base = sd.null_prompt(config.tokens)                # (1,N,d)
        if config.caption_base:                             # addition
            captions = TASKS[run.args.task].plain_captions()
            base = sd.text_prompt(captions, config.tokens).mean(0, keepdim=True)
        adapter = PromptAdapter(sd.width, base.shape[1], base=base, centered=config.caption_base,
                                residual=config.residual)
        loader = CropPairs(run.degraded, sd, config.crop or run.size, config.batch, seed,
                           inputs=run.adapter_inputs(adapter))
        train_adapter(adapter, sd, loader, config, seed=seed, checkpoint=run.out / "adapter.pt",
                      log=run.log_losses)
        if config.residual or config.caption_base:          # additions
            update_norms(adapter, loader, config.steps)
    if run.is_main:
        adapter_figure(run, adapter)
        save_adapter(adapter, run.out / "adapter.safetensors")
        (run.out / "adapter.pt").unlink(missing_ok=True)
    run.barrier()


def synth_stage(run):
    """CCD: synthesizes degraded photos from clean ones, conditioned on the adapter's prompts."""
    adapter, folder = load_adapter(run.out / "adapter.safetensors", run.device), run.out / "synth"
    synthesize_folder(run.clean, run.adapter_inputs(adapter), adapter, run.sd, run.synth, folder,
                      seed=run.args.seed, rank=run.rank, world_size=run.world_size)
    run.barrier()
    if run.is_main:
        shown = range(min(5, run.synth.images))
        clean = draw_crops(run.clean, run.size, run.args.seed, shown, 0)
        degraded = draw_crops(run.degraded, run.size, run.args.seed, shown, 1)
        images = [read_image(folder / f"{i:06d}.png") / 255 for i in shown]
        figure({"clean": clean, "degraded (reference for the weather)": degraded,
                "synthesized": images}, run.out / "synth.png")
    run.barrier()


def distill_stage(run):
    """PKD: trains the student on the teacher's outputs for the synthesized photos."""
    run.release("sd", "degraded", "residuals")
    files = list_images(run.out / "synth")[run.rank::run.world_size]
    if not files:
        raise ValueError(f"there are fewer synthesized images than processes ({run.world_size})")
    images, targets = on_disk(map(read_image, files), run.out), None                # (N,3,H,W)
    run.size = images.shape[-1]                             # saves loading Stable Diffusion for it
    crop = run.distill.crop_size(run.size)
    outputs = teacher_outputs(run.teacher, images, run.device, run.dtype, files)    # a generator
    if run.distill.keep_teacher:
        outputs = targets = on_disk(outputs, run.out)                               # (N,3,H,W)
    if run.distill.select < 1:                              # addition; of this process's images
        gains = teacher_gains(images, outputs, clean_crops(run, files, run.clean))
        chosen = select_best(gains, run.distill.select)
        images = [images[i] for i in chosen]
        targets = targets if targets is None else [targets[i] for i in chosen]
    run.release("clean")
    loader = Crops(images, crop, run.distill.batch, targets, run.args.seed + 1000 * run.rank)
    torch.manual_seed(run.args.seed)
    student = run.new_student(crop)
    distill(run.teacher, student, loader, run.distill, device=run.device, dtype=run.dtype,
            checkpoint=run.out / "student.pt", log=run.log_losses)
    if run.is_main:
        plot_losses(run.out / "log.jsonl", run.out / "losses.png")
        save_restorer(student, run.out / "student.safetensors")
        (run.out / "student.pt").unlink(missing_ok=True)
    run.barrier()


def evaluate_stage(run):
    """Evaluates teacher and student; without ground truth, only writes the student's outputs."""
    if not run.is_main:
        return
    args, student = run.args, load_restorer(run.out / "student.safetensors", run.device)
    if not run.pairs:
        run.log(f"{args.test} has no ground truth: writing the student's outputs to "
                f"{run.out / 'restored'}")
        return restore_folder(student, args.test, run.out / "restored", args.tile)
    models = {"input": None, "teacher": run.teacher, "student": student}
    files = {name: run.out / f"{name}.json" for name in models}
    for name, file in files.items():                        # saved one by one: a rerun resumes
        if not file.exists():
            result = evaluate(models[name], run.pairs, tile=args.tile, label=name)
            write_text(file, json.dumps(result))
    results = {name: json.loads(file.read_text(encoding="utf-8")) for name, file in files.items()}
    metrics = {"task": args.task} | report(models, results) | {"tile": args.tile}
    write_csv(results, run.out / "metrics.csv")
    comparison_figure(models, run.pairs, run.out / "figure.png", args.tile)
    write_text(run.out / "metrics.md", table(metrics))
    write_text(run.out / "metrics.json", json.dumps(metrics, indent=2))
    for file in files.values():
        file.unlink()
    run.log(table(metrics))


STAGES = {"adapter": adapter_stage, "synth": synth_stage, "distill": distill_stage,
          "evaluate": evaluate_stage}


# ---------------------------------------------------------------- what the stages need

@torch.no_grad()
def adapter_figure(run, adapter):
    """adapter.png: one clean photo with one noise sample, denoised with the plain captions and with
    the prompts of several degraded photos."""
    seed = run.args.seed
    degraded = draw_crops(run.degraded, run.size, seed, range(5), 1)            # (5,3,H,W)
    inputs = draw_crops(run.adapter_inputs(adapter), run.size, seed, range(5), 1)
    clean = draw_crops(run.clean, run.size, seed, [0], 0)                       # (1,3,H,W)
    captions = run.sd.text_prompt(TASKS[run.args.task].plain_captions(), adapter.base.shape[1])
    captions = captions[torch.arange(5) % len(captions)]                        # (5,N,d)
    figure({"clean": clean.expand_as(degraded), "degraded": degraded,
            "from a plain caption": synthesize_each(run, clean, captions),
            "from the learned prompt": synthesize_each(run, clean, adapter(inputs.to(run.device)))},
           run.out / "adapter.png")


def synthesize_each(run, clean, prompts):
    """Images (3,H,W) of one clean photo (1,3,H,W) and one noise sample, for each of the prompts
    (n,N,d)."""
    return [synthesize_photos(clean, prompt[None], run.sd, run.synth,
                              torch.Generator().manual_seed(run.args.seed))[0]
            for prompt in prompts]


def clean_crops(run, files, clean):
    """The clean crops (3,H,W) in [0,1] that the synthesized images (000000.png, ...) were made
    from. clean: the photos that provided the content."""
    return (draw_crops(clean, run.size, run.args.seed, [int(file.stem)], 0)[0] for file in files)


def load_photos(folder, size, run, flag):
    """All readable photos below a folder, (3,H,W) uint8, scaled by `fit_photo`. Raises
    ValueError if there is none."""
    files, small = list_images(folder, recursive=True), []

    def load(file):
        try:
            photo = read_image(file)
        except ValueError as error:
            run.log(f"skipped: {error}")
            return None
        if min(photo.shape[1:]) < size:
            small.append(file)
        return fit_photo(photo, run.args.photo_size, size)

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as threads:
        photos = list(tqdm(threads.map(load, files), flag[2:], len(files), disable=None))
    photos = [photo for photo in photos if photo is not None]
    if not photos:
        raise ValueError(f"{flag} {folder}: none of its {len(files)} image files can be read")
    if small:
        run.log(f"{flag}: {len(small)} of {len(photos)} photos are smaller than the {size} px "
                "crop and were upscaled")
    return photos


def fit_photo(photo, longest, crop):
    """Resizes a photo (3,H,W): its longer side is at most `longest` px, its shorter side at least
    `crop` px, by upscaling if needed. Photos too elongated for both are centre-cropped first."""
    height, width = photo.shape[1:]
    scale = max(min(1, longest / max(height, width)), crop / min(height, width))
    limit = math.ceil(longest / scale)
    photo = center_crop(photo, [min(height, limit), min(width, limit)])
    sides = [min(max(crop, round(scale * side)), longest) for side in photo.shape[1:]]
    return resize(photo, sides)


def restore_stage(run):
    """--stage restore: writes a network's outputs for the photos of --input."""
    args = run.args
    if not args.input.exists():
        raise ValueError(f"--input {args.input}: no such file or folder")
    model = load_restorer(args.model or run.out / "student.safetensors", run.device,
                          args.teacher_multiple)
    restore_folder(model, args.input, args.output, args.tile)


def export_stage(run):
    """--stage export: writes the student as a torch.export program and, if onnx is installed, as
    an ONNX model."""
    student = load_restorer(run.out / "student.safetensors")
    for path in export_restorer(student, run.out):
        run.log(f"written: {path}")


STANDALONE = {"restore": restore_stage, "export": export_stage}


# ---------------------------------------------------------------- the command line

class Parser(argparse.ArgumentParser):
    def error(self, message):           # one line, without the usage
        self.exit(2, f"{self.prog}: error: {message}\n")


# The config of each stage, and the prefix of its options.
CONFIGS = {AdapterConfig: "adapter_", SynthConfig: "", DistillConfig: "distill_"}


def options(config):
    """(option, field, comment) for every field of a stage's config, as in ("adapter_lr", ...)."""
    comments = dict(re.findall(r"^    (\w+): .*?# (.*)$", inspect.getsource(config), re.M))
    for f in fields(config):
        prefix = "" if f.name == "tokens" else CONFIGS[config]
        yield prefix + f.name, f, comments[f.name]


def additions_off():
    """{option: value that switches it off}, for all additions."""
    return {name: config.ADDITIONS[f.name] for config in CONFIGS
            for name, f, _ in options(config) if f.name in config.ADDITIONS}


def to_flag(name):
    """adapter_lr to --adapter-lr."""
    return "--" + name.replace("_", "-")


def number(kind, least, most=math.inf):
    """An argparse type: a finite int or float from `least` to `most`."""
    def convert(text):
        value = kind(text)
        if not (math.isfinite(value) and least <= value <= most):
            upper = "" if most == math.inf else f" and at most {most}"
            raise argparse.ArgumentTypeError(
                f"must be finite and at least {least}{upper}, not {text}")
        return value
    convert.__name__ = kind.__name__                        # for argparse's own message
    return convert


def make_parser():
    mini_sd = demo and str(demo.WEIGHTS / "mini-sd")
    teacher = demo and str(demo.WEIGHTS / "teacher.safetensors")
    parser = Parser(prog="d4ir.py", description=__doc__, epilog="Defaults are in parentheses.",
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--task", required=True, choices=TASKS, help="all: one student for all kinds of weather")
    add("--stage", nargs="+", choices=(*STAGES, *STANDALONE),
        help="one or more of the four stages (all four), or restore, or export")
    add("--sd", default=mini_sd, metavar="SD",
        help="Stable Diffusion 1.x or 2.x: diffusers folder or hub id (the demo's mini-SD)")
    add("--degraded", type=Path, metavar="DIR", help="web photos in bad weather (the demo's)")
    add("--clean", type=Path, metavar="DIR", help="web photos in good weather (the demo's)")
    add("--photo-size", type=number(int, 1), default=1024, metavar="PX",
        help="longer side to which larger photos of --degraded and --clean are downscaled: rain "
             "and snow should have the same scale as in the teacher's training photos (1024)")
    add("--adapter", dest="adapter_file", type=Path, metavar="FILE",
        help="use the adapter.safetensors of another run instead of training one; its prompt "
             "width must match --sd and, if it uses residuals, its teacher must match --teacher; "
             "--tokens and --adapter-* are ignored")
    add("--teacher", default=teacher, metavar="SPEC",
        help="a .safetensors file of this project, or FILE.py:NAME@WEIGHTS (the demo's teacher)")
    add("--teacher-multiple", type=number(int, 1), default=1, metavar="N",
        help="pad the input of a FILE.py network to a multiple of N px (1)")
    add("--student-width", type=number(int, 1), default=16, metavar="N",
        help="channels of the student at its first level (16)")
    add("--student-block", choices=("residual", "nafnet"), default="residual",
        help="the student's blocks: nafnet is slower but has fewer parameters (residual)")
    add("--test", type=Path, metavar="DIR", help="paired benchmark folder (the demo's)")
    add("--out", type=Path, metavar="DIR", help="run folder (runs/TASK)")
    add("--restart", action="store_true",
        help="first delete the results of the earliest stage in --stage and of all later ones")
    add("--no-additions", action="store_true",
        help=f"the paper's method alone: switch off {', '.join(map(to_flag, additions_off()))}")
    add("--device", help="cpu, cuda, cuda:1 ... (cuda if available)")
    add("--precision", choices=DTYPES,
        help="precision of Stable Diffusion and autocast; metrics use fp32 (bf16; fp32 on a "
             "device without bf16)")
    add("--seed", type=number(int, 0, 2 ** 32 - 1), default=0, help="random seed (0)")
    add("--tile", type=number(int, 0), default=1024, metavar="PX",
        help="restore larger photos in overlapping tiles of this size; 0: never (1024)")
    add("--input", type=Path, metavar="PATH", help="restore: a photo or a folder of photos")
    add("--model", metavar="SPEC", help="restore: the network (OUT/student.safetensors)")
    add("--output", type=Path, metavar="DIR", help="restore: folder for the PNG files")
    for config in CONFIGS:
        group = parser.add_argument_group(config.__name__, config.__doc__)
        for name, f, comment in options(config):
            if isinstance(f.default, bool):
                kind = dict(action=argparse.BooleanOptionalAction)
            elif isinstance(f.default, str):
                kind = dict(type=str)
            else:                                           # ints: 0 only if it is the default
                least = 1 if f.type is int and f.default else 0
                kind = dict(type=number(f.type, least))
            default = repr(f.default)
            if demo and name in demo.SETTINGS:
                default += f"; demo: {demo.SETTINGS[name]!r}"
            for task, entry in TASKS.items():
                if name in entry.demo_settings:
                    default += f"; demo, {task}: {entry.demo_settings[name]!r}"
            group.add_argument(to_flag(name), default=f.default, **kind,
                               help=f"{comment} ({default})".replace("%", "%%"))
    return parser


def parse(argv):
    """Parses the command line. With the demo's Stable Diffusion, the demo's settings are the
    defaults (demo.SETTINGS and the task's own)."""
    parser, off = make_parser(), additions_off()
    args = parser.parse_args(argv)
    if demo and Path(args.sd).resolve() == (demo.WEIGHTS / "mini-sd").resolve():
        parser.set_defaults(**demo.SETTINGS | TASKS[args.task].demo_settings)
    if args.no_additions:
        parser.set_defaults(**off)
    args = parser.parse_args(argv)
    on = [to_flag(name) for name, value in off.items() if getattr(args, name) != value]
    if args.no_additions and on:
        parser.error(f"--no-additions cannot be combined with {on[0]}")
    standalone = set(STANDALONE) & set(args.stage or ())
    missing = [to_flag(name) for name in ("sd", "teacher", "degraded", "clean", "test")
               if getattr(args, name) is None]
    if demo is None and missing and not standalone:
        parser.error(f"demo/ is missing; specify {' and '.join(missing)}")
    if standalone and len(args.stage) > 1:
        parser.error("--stage restore and --stage export cannot be combined with other stages")
    if args.stage == ["restore"] and not (args.input and args.output):
        parser.error("--stage restore needs --input and --output")
    args.out = args.out or Path("runs") / args.task
    return args


# ---------------------------------------------------------------- the run and its folder

class Run:
    """Settings, device, rank of this process, and what the stages share, loaded on first use."""

    def __init__(self, args):
        self.args, self.out = args, args.out
        self.stages = [stage for stage in STAGES if stage in (args.stage or STAGES)]
        self.adapter, self.synth, self.distill = (
            config(**{f.name: getattr(args, name) for name, f, _ in options(config)})
            for config in CONFIGS)
        self.rank = int(os.environ.get("RANK", 0))
        self.world_size = int(os.environ.get("WORLD_SIZE", 1))
        self.is_main = self.rank == 0
        self.device = choose_device(args.device)
        args.precision = args.precision or ("bf16" if has_bf16(self.device) else "fp32")
        self.dtype = DTYPES[args.precision]
        if self.world_size > 1:
            backend = "nccl" if self.device.type == "cuda" else "gloo"
            dist.init_process_group(backend, timeout=timedelta(hours=6))

    @cached_property
    def sd(self):
        return load_stable_diffusion(self.args.sd, self.device, self.dtype)

    @cached_property
    def teacher(self):
        return load_restorer(self.args.teacher, self.device, self.args.teacher_multiple)

    @cached_property
    def clean(self):
        return load_photos(self.args.clean, self.size, self, "--clean")

    @cached_property
    def degraded(self):
        return load_photos(self.args.degraded, self.size, self, "--degraded")

    @cached_property
    def residuals(self):
        """Addition: what the teacher removes from each degraded photo."""
        return residuals(self.degraded, lambda x: restore(self.teacher, x))

    def adapter_inputs(self, adapter):
        """An adapter's inputs: the degraded photos or (addition `residual`) their residuals."""
        return self.residuals if adapter.config["residual"] else self.degraded

    @cached_property
    def pairs(self):
        return find_pairs(self.args.test)

    def new_student(self, crop):
        """An untrained student, for training crops of `crop` px."""
        return Restorer(self.args.student_width, window=crop, block=self.args.student_block,
                        norm=True)

    @cached_property
    def size(self):
        """px, side of the synthesized images."""
        return self.args.size or self.sd.size

    def release(self, *names):
        """Frees the memory of what later stages do not need."""
        for name in names:
            self.__dict__.pop(name, None)

    def additions(self):
        """Names of the additions that are switched on."""
        file = self.args.adapter_file
        adapter = [f"those in {file}"] if file else self.adapter.active_additions()
        return adapter + self.synth.active_additions() + self.distill.active_additions()

    def log(self, text):
        if self.is_main:
            print(text, flush=True)

    def log_losses(self, report):
        """Appends a training report to log.jsonl; without a terminal, also prints it."""
        with open(self.out / "log.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(report) + "\n")
        if not sys.stderr.isatty():                         # no progress bar
            self.log("  ".join(f"{key} {value:.4g}" if isinstance(value, float)
                               else f"{key} {value}" for key, value in report.items()))

    def barrier(self):
        if self.world_size > 1:
            dist.barrier()

    def is_finished(self, stage):
        return (self.out / PRODUCTS[stage][0]).exists()

    def has_started(self, stage):
        return any((self.out / name).exists() for name in PRODUCTS[stage])

    def settings(self):
        """{stage: the settings that its outputs depend on}."""
        args, adapter_sha256, residual = self.args, None, self.adapter.residual
        if args.adapter_file:
            adapter_sha256 = hashlib.sha256(args.adapter_file.read_bytes()).hexdigest()
            residual = load_adapter(args.adapter_file).config["residual"]
        adapter = dict(task=args.task, precision=args.precision, seed=args.seed,
                       sd=absolute(args.sd), degraded=absolute(args.degraded), size=args.size,
                       photo_size=args.photo_size, adapter_sha256=adapter_sha256)
        if residual:                                        # the input depends on the teacher
            adapter |= dict(teacher=absolute(args.teacher), teacher_multiple=args.teacher_multiple)
        synth = dict(clean=absolute(args.clean), photo_size=args.photo_size)
        distill = dict(teacher=absolute(args.teacher), teacher_multiple=args.teacher_multiple,
                       student_width=args.student_width, student_block=args.student_block)
        return {"adapter": adapter | asdict(self.adapter), "synth": synth | asdict(self.synth),
                "distill": distill | asdict(self.distill),
                "evaluate": dict(test=absolute(args.test), tile=args.tile)}


def choose_device(name):
    """The device of --device, or of this process. Raises ValueError if it cannot be used."""
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda":
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {name}: {first_line(error)}") from None
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device


def absolute(path):
    """A path as a string, absolute if it exists; hub ids and None stay as they are."""
    if path is None:
        return None
    return os.path.realpath(path) if os.path.exists(path) else str(path)


def check_inputs(run):
    """Raises ValueError for invalid inputs, before any expensive work."""
    args = run.args
    for previous, stage in zip(STAGES, list(STAGES)[1:]):
        if stage in run.stages and previous not in run.stages:
            deleted = args.restart and stage != run.stages[0]
            if deleted or not run.is_finished(previous):
                raise ValueError(f"--stage {stage} needs {run.out / PRODUCTS[previous][0]}: run "
                                 f"--stage {previous} first")
    for name in ("degraded", "clean", "test"):
        folder = getattr(args, name)
        if folder is None:                                  # the demo's
            continue
        if not folder.is_dir():
            raise ValueError(f"--{name} {folder}: no such folder")
        if args.out.resolve().is_relative_to(folder.resolve()):
            raise ValueError(f"--out {args.out} is in --{name} {folder}, and images written "
                             "there would be read as photos: choose another --out")
        if name != "test" and not list_images(folder, recursive=True):
            raise ValueError(f"--{name} {folder}: no image file (png, jpg, bmp, webp, tif)")
    if args.test:
        run.pairs                                           # raises ValueError for unmatched photos
    check_teacher(run)
    if any(stage in run.stages and (args.restart or not run.is_finished(stage))
           for stage in ("adapter", "synth")):
        check_diffusion(run)
    elif "distill" in run.stages:
        for file in list_images(run.out / "synth")[:1]:
            check_crop("--distill-crop", args.distill_crop, min(read_image(file).shape[1:]))


def check_teacher(run):
    """Raises ValueError if the teacher fails on an image with odd side lengths, in float32 or in
    --precision."""
    args, teacher = run.args, run.teacher
    x = torch.linspace(0, 1, 3 * 101 * 67, device=run.device).view(1, 3, 101, 67)
    with torch.no_grad():
        outputs = {"fp32": teacher(x)}
        try:
            with torch.autocast(run.device.type, run.dtype, enabled=run.dtype != torch.float32):
                outputs[args.precision] = teacher(x)
        except ValueError as error:
            reason = first_line(error.__cause__ or error)
            raise ValueError(f"the teacher does not support {args.precision} ({reason}): use "
                             "--precision fp32") from None
    for precision, output in outputs.items():
        if not output.isfinite().all():
            raise ValueError(f"--teacher {args.teacher}: in {precision}, its output for a test "
                             "image is not finite")


def check_diffusion(run):
    """Raises ValueError if the adapter or synth settings do not fit the Stable Diffusion model.
    Warns if it looks like a few-step model and the settings do not suit one."""
    args, sd, size = run.args, run.sd, run.size
    choose_timesteps(len(sd.alphas_cumprod), args.strength, args.steps)
    sd.null_prompt(args.tokens)
    for flag, side in (("--size", size), ("--adapter-crop", args.adapter_crop)):
        if side % (8 * sd.factor):
            raise ValueError(f"{flag} must be a multiple of {8 * sd.factor} px, not {side}")
    if args.photo_size < size:
        raise ValueError(f"--photo-size {args.photo_size} is smaller than the images ({size} px)")
    check_crop("--adapter-crop", args.adapter_crop, size)
    check_crop("--distill-crop", args.distill_crop, size)
    if args.adapter_file:
        check_adapter(run, args.adapter_file)
    suits_few_steps = (args.scheduler == "ddim" and args.guidance == 1
                       and args.strength == args.steps / 4)
    if sd.timestep_spacing == "trailing" and not suits_few_steps:
        run.log(f"warning: {args.sd} uses trailing timestep spacing, as few-step models do. If it "
                "is one (such as sd-turbo), use --scheduler ddim --guidance 1 --steps K "
                "--strength K/4, with K from 1 to 4")


def check_crop(flag, crop, size):
    """Raises ValueError if crops of `crop` px do not fit into images of `size` px."""
    if crop > size:
        raise ValueError(f"{flag} {crop} is larger than the images ({size} px)")


def check_adapter(run, file):
    """Raises ValueError if an adapter of another run does not fit the Stable Diffusion model."""
    if file.resolve() == (run.out / "adapter.safetensors").resolve():
        raise ValueError(f"--adapter {file} is in the run folder: choose another --out")
    adapter, sd = load_adapter(file).config, run.sd
    if adapter["width"] != sd.width or not 2 <= adapter["tokens"] <= sd.max_tokens:
        raise ValueError(f"--adapter {file}: its prompts have {adapter['tokens']} tokens of width "
                         f"{adapter['width']}, but {run.args.sd} takes 2 to {sd.max_tokens} of "
                         f"width {sd.width}")
    if run.args.no_additions and (adapter["residual"] or adapter["centered"]):
        raise ValueError(f"--adapter {file} was trained with additions: --no-additions needs one "
                         "without")


def check_run_folder(run):
    """Rejects a run folder made with different settings, removes what --restart reruns, and writes
    config.json."""
    settings = run.settings()
    old = read_settings(run) or settings
    if "evaluate" not in run.stages:
        settings["evaluate"] = old["evaluate"]
    names = list(STAGES)
    redo = names[names.index(run.stages[0]):] if run.args.restart else []
    kept = [stage for stage in STAGES if run.has_started(stage) and stage not in redo]
    changed = [(stage, f"{key} of {stage} was {old[stage].get(key)!r}, now {value!r}")
               for stage in kept for key, value in settings[stage].items()
               if old[stage].get(key) != value]
    if changed:
        differences = "; ".join(text for _, text in changed)
        raise ValueError(f"{run.out} was made with different settings: {differences}. Use the same "
                         "settings, another --out, or --restart to redo all stages (to redo only "
                         f"those affected, --restart --stage {changed[0][0]} ...)")
    run.barrier()                                           # every process has checked
    if run.is_main:
        run.out.mkdir(parents=True, exist_ok=True)
        run.lock = lock_folder(run.out)
        # Last stage first: an interruption must not leave an old student beside a new adapter.
        for path in (run.out / name for stage in reversed(redo) for name in PRODUCTS[stage]):
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
        versions = {name: version(name) for name in
                    ("torchvision", "diffusers", "transformers", "numpy", "pillow")}
        versions |= {"torch": torch.__version__, "python": platform.python_version()}
        write_text(run.out / "config.json", json.dumps(settings | dict(
            additions=run.additions(), versions=versions, device=str(run.device),
            processes=run.world_size), indent=2))
    run.barrier()


def read_settings(run):
    """{stage: settings} in the folder's config.json; None for a new folder. Raises ValueError if
    stages have started but their settings cannot be read."""
    file = run.out / "config.json"
    if not file.exists() and not any(map(run.has_started, STAGES)):
        return None
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
        return {stage: dict(settings[stage]) for stage in STAGES}
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        raise ValueError(f"{run.out} contains files but no valid config.json; choose "
                         "another --out") from None


def lock_folder(folder):
    """Locks the run folder and deletes the temporary files of a killed process. The lock is held
    until the returned file is closed or this process exits. Raises ValueError if another process
    holds it."""
    file = open(folder / "lock", "a+", encoding="utf-8")
    file.seek(0)
    last = file.read()                                      # the last process that used the folder
    try:
        if fcntl:                                           # forked workers do not inherit the lock
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        raise ValueError(f"{folder} is in use by process {last}: wait until it ends, or choose "
                         "another --out") from None
    except OSError:                                         # a file system without locks
        pass
    for path in folder.rglob("*.tmp") if last else ():
        path.unlink()
    file.truncate(0)
    file.write(f"{os.getpid()} on {platform.node()}")
    file.flush()
    return file


def write_demo_photos(run):
    """Writes demo images into the run folder for every photo folder that was not specified."""
    args = run.args
    missing = [name for name in ("degraded", "clean", "test") if getattr(args, name) is None]
    bundled = [name for name in ("sd", "teacher")
               if demo and str(demo.WEIGHTS) in getattr(args, name)]
    if missing or bundled:
        run.log("using the bundled demo for: --" + ", --".join(missing + bundled))
    folder = run.out / "demo" / args.task
    if missing and run.is_main:
        from demo import photos
        photos.write_photos(folder, TASKS[args.task].weather, missing)
    for name in missing:
        setattr(args, name, folder / name)
    run.barrier()


def write_text(path, text):
    """Writes a text file under a temporary name first."""
    Path(f"{path}.tmp").write_text(text, encoding="utf-8", errors="backslashreplace")
    os.replace(f"{path}.tmp", path)


def interrupt(number, frame):
    """Handles SIGINT and SIGTERM. Exiting is safe at any point, because every file is first
    written under a temporary name."""
    for worker in multiprocessing.active_children():        # they would report broken pipes
        worker.terminate()
    sys.stderr.write("\n" * sys.stderr.isatty()             # below a progress bar
                     + "interrupted; rerun the same command, without --restart, to resume\n")
    sys.stderr.flush()
    os._exit(128 + number)                                  # an exception could be swallowed


def silence_libraries():
    """Hides the messages and progress bars of diffusers and transformers."""
    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()


def run_command(main):
    """Runs main. User errors print one line to stderr and exit with code 2; SIGINT and SIGTERM exit
    with 130 and 143."""
    prog = Path(sys.argv[0]).name
    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) != signal.SIG_IGN:      # ignored in background jobs
            signal.signal(number, interrupt)
    sys.stdout.reconfigure(errors="backslashreplace")       # for file names in any encoding
    silence_libraries()
    huggingface_hub.utils.enable_progress_bars()            # for downloads
    try:
        main()
    except (RuntimeError, MemoryError) as error:
        if not (isinstance(error, (torch.OutOfMemoryError, MemoryError))
                or "can't allocate memory" in str(error)):      # torch's on a CPU
            raise
        sys.stderr.write(f"{prog}: error: out of memory: lower --adapter-batch, --batch, "
                         f"--distill-batch or --tile ({first_line(error)})\n")
        sys.exit(2)
    except (ValueError, OSError, SafetensorError) as error:
        sys.stderr.write(f"{prog}: error: {' '.join(str(error).split())}\n")
        sys.exit(2)
    if dist.is_initialized():           # not after an error: other processes may be waiting
        dist.destroy_process_group()


if __name__ == "__main__":
    run_command(main)
