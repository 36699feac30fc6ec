"""Compares D4IR with other sources of training images and with its own ablations.

    python -m experiments.compare --task desnow                   # results/compare-desnow.*
    python -m experiments.compare --task desnow --rows additions --results results/additions
    python -m experiments.compare --task desnow --sweep strength  # results/strength-desnow.*

Takes the flags of d4ir.py for photos, models and stages, with the same defaults. All students have
the same network, steps, batch, crop, learning rate and seeds; all synthesized sets have the same
number of images. Adapters, images and teacher outputs are made once per row and used for all
seeds. Finished work in --out (runs/compare/TASK) is kept.
"""
import copy
import hashlib
import json
import statistics
import time
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Callable

import torch
from PIL import Image, ImageDraw
from torchvision.transforms.functional import center_crop, to_pil_image

import d4ir
from distill import (Crops, DistillConfig, distill, select_best, teacher_gains,
                     teacher_outputs)
from evaluate import DEFINITIONS, METRICS, by_set, evaluate, means, read_image
from experiments.common import machine_name, make_parser, provenance
from experiments.gan import Adversary
from models import save_restorer
from prompt_adapter import AdapterConfig, load_adapter
from synth import SynthConfig, synthesize_folder


# ---------------------------------------------------------------- the rows

@dataclass(frozen=True)
class Row:
    """One source of training images. To add a baseline that is a list of images, add one entry to
    ROWS."""
    title: str
    note: str                           # may use {captions}, {plain}, {used}, SynthConfig's fields
    images: Callable = None             # bench -> list of (3,H,W) uint8; unset in ablations
    adapter: dict = field(default_factory=dict)     # ablations: settings that differ from D4IR's
    synth: dict = field(default_factory=dict)
    distill: dict = field(default_factory=dict)
    reuses: tuple = ()                  # stages reused from the row d4ir: "adapter", "synth"


def ablation(part, note, adapter={}, synth={}, distill={}):
    """D4IR with other settings. Its adapter is reused unless the adapter's settings differ."""
    return Row(f"D4IR without {part}", note, adapter=adapter, synth=synth, distill=distill,
               reuses=() if adapter else ("adapter",))


ROWS = {
    "original": Row("original data", "the teacher's own training photos, degraded",
                    lambda bench: bench.photos("original", bench.crop)),
    "web-degraded": Row("web photos in bad weather", "the photos that the adapter is trained on",
                        lambda bench: bench.photos("degraded", bench.crop)),
    "web-clean": Row("web photos in good weather", "the photos that provide the content",
                     lambda bench: bench.photos("clean", bench.crop)),
    "gan": Row("GAN", "data-free adversarial distillation, experiments/gan.py",
               lambda bench: None),
    "sd-text": Row("captions", "{captions} in place of the adapter's prompts",
                   lambda bench: bench.synthesize("sd-text", bench.captions())),
    "sd-plain": Row("plain captions", "{plain} in place of the adapter's prompts",
                    lambda bench: bench.synthesize("sd-plain", bench.captions(plain=True))),
    "sd-text-no-additions": Row(
        "captions without additions", "{captions} in place of the adapter's prompts; no additions",
        lambda bench: bench.synthesize("sd-text-no-additions", bench.captions(),
                                       distill=DistillConfig.ADDITIONS, **SynthConfig.ADDITIONS)),
    "no-additions": ablation("additions", "--no-additions: our reading of the paper's method",
                             AdapterConfig.ADDITIONS, SynthConfig.ADDITIONS,
                             DistillConfig.ADDITIONS),
    "no-anchor": ablation("anchor", "--no-anchor", synth=dict(anchor=False)),
    "no-negative": ablation("negative prompt", "--negative-prompt ''",
                            synth=dict(negative_prompt="")),
    "no-base": ablation("caption base", "--no-adapter-caption-base: prompts start at the null "
                        "prompt and are not centred", dict(caption_base=False)),
    "no-penalty": ablation("penalty", "--adapter-penalty 0: prompts vary freely",
                           dict(penalty=0.0)),
    "no-residual": ablation(
        "residual", "--no-adapter-residual --adapter-weather-weight 0: the input is the photo",
        dict(residual=False, weather_weight=0.0)),
    "no-weather-weight": ablation("weather weight", "--adapter-weather-weight 0",
                                  dict(weather_weight=0.0)),
    "no-selection": ablation("selection", "--distill-select 1: all images",
                             distill=dict(select=1.0)),
    "no-contrast": ablation("contrastive loss", "--adapter-contrast 0", dict(contrast=0.0)),
    "no-content": Row("D4IR without content", "a grey image in place of the clean photos",
                      lambda bench: bench.synthesize("no-content", bench.adapter("d4ir"),
                                                     clean=[bench.grey()]), reuses=("adapter",)),
    "d4ir": Row("D4IR", "strength {strength:g}, guidance {guidance:g}, {images} images{used}",
                lambda bench: bench.synthesize("d4ir", bench.adapter("d4ir"))),
    "d4ir+web": Row("D4IR images and web photos in bad weather", "both lists",
                    lambda bench: (bench.images("d4ir") + bench.images("web-degraded")),
                    reuses=("adapter", "synth")),
}
GROUPS = {"additions": ("original", "sd-text", "sd-text-no-additions", "no-additions", "no-anchor",
                        "no-negative", "no-base", "no-penalty", "no-residual", "no-weather-weight",
                        "no-selection", "no-content", "d4ir")}
SWEEPS = {"strength": (0.2, 0.4, 0.6, 0.8, 0.95), "guidance": (1.0, 2.0, 4.0, 8.0),
          "steps": (1, 2, 4, 6, 10, 20), "photos": (8, 32, 128, 512),
          "images": (32, 64, 128, 256, 512, 1024)}


class Captions:
    """Drop-in replacement for the adapter: the embeddings of captions, in turn."""

    config = {"residual": False}

    def __init__(self, sd, captions, tokens):
        self.prompts = sd.text_prompt(list(captions), tokens)

    def __call__(self, degraded):
        return self.prompts[torch.arange(len(degraded)) % len(self.prompts)]


# ---------------------------------------------------------------- images and students of a row

class Bench:
    """What the rows share. Every row has a folder of its own in run.out."""

    def __init__(self, run, original):
        self.run, self.original = run, original
        self.crop = run.distill.crop_size(run.size)
        self.loaded = {}

    def photos(self, flag, size):
        """The photos of --degraded, --clean or --original, (3,H,W) uint8, at least `size` px."""
        if (flag, size) not in self.loaded:
            folder = self.original if flag == "original" else getattr(self.run.args, flag)
            if folder is None:                              # those of the demo's teacher
                if not self.has_original():
                    raise ValueError("the training photos of this teacher are unknown")
                parent = self.run.out / "demo" / self.run.args.task
                write_demo_photos(parent, self.run.args.task, original=self.run.synth.images)
                folder = parent / "original"
            self.loaded[flag, size] = d4ir.load_photos(folder, size, self.run, f"--{flag}")
        return self.loaded[flag, size]

    def has_original(self):
        """Whether the teacher's training photos are known: --original, or the demo's teacher."""
        teacher = Path(self.run.args.teacher).resolve()
        return bool(self.original or d4ir.demo and teacher.parent == d4ir.demo.WEIGHTS)

    def grey(self):
        return torch.full((3, self.run.size, self.run.size), 128, dtype=torch.uint8)

    def variant(self, name, adapter={}, synth={}, distill={}):
        """The run in a row's folder, with the row's settings."""
        run = copy.copy(self.run)
        run.out = self.run.out / name
        run.adapter, run.synth = replace(run.adapter, **adapter), replace(run.synth, **synth)
        run.distill = replace(run.distill, **distill)
        run.out.mkdir(parents=True, exist_ok=True)
        return run

    def load_photos(self, run, degraded, residual):
        """Gives a variant its photos; degraded: in place of --degraded. residual: whether it also
        needs their residuals, which are computed once for all rows."""
        run.clean = self.photos("clean", run.size)
        run.degraded = degraded or self.photos("degraded", run.size)
        run.release("residuals")
        if residual and not degraded:
            self.run.degraded = run.degraded
            run.residuals = self.run.residuals

    def adapter(self, name, degraded=None, synth={}, **settings):
        """A row's adapter, trained on the photos of --degraded or on the given ones. synth: of the
        images in its adapter.png."""
        run = self.variant(name, adapter=settings, synth=synth)
        path = run.out / "adapter.safetensors"
        if not path.exists():
            with timed(run.out, "adapter"):
                self.load_photos(run, degraded, run.adapter.residual)
                d4ir.adapter_stage(run)
        return load_adapter(path, run.device)

    def captions(self, plain=False):
        task = d4ir.TASKS[self.run.args.task]
        captions = task.plain_captions() if plain else task.captions
        return Captions(self.run.sd, captions, self.run.adapter.tokens)

    def synthesize(self, name, adapter, clean=None, degraded=None, distill={}, **settings):
        """A row's synthesized images, (3,H,W) uint8: those selected by the teacher's gain.
        adapter: degraded photos to prompts. settings: of SynthConfig; distill: of DistillConfig."""
        run = self.variant(name, synth=settings, distill=distill)
        clean = clean or self.photos("clean", run.size)
        files = [run.out / "synth" / f"{i:06d}.png" for i in range(run.synth.images)]
        if not all(file.exists() for file in files):
            with timed(run.out, "synth"):
                self.load_photos(run, degraded, adapter.config["residual"])
                synthesize_folder(clean, run.adapter_inputs(adapter), adapter, run.sd, run.synth,
                                  run.out / "synth", seed=run.args.seed)
        images, file = [read_image(path) for path in files], run.out / "gains.json"
        if not file.exists():                       # for the selection, and the column "gain"
            outputs = teacher_outputs(run.teacher, images, run.device, run.dtype, files)
            gains = teacher_gains(images, outputs, d4ir.clean_crops(run, files, clean))
            d4ir.write_text(file, json.dumps(gains))
        gains = json.loads(file.read_text(encoding="utf-8"))
        if run.distill.select < 1:                              # addition
            chosen = select_best(gains, run.distill.select)
            images, gains = [images[i] for i in chosen], [gains[i] for i in chosen]
        d4ir.write_text(run.out / "gain.json", json.dumps(statistics.fmean(gains)))
        return images

    def images(self, name):
        """The images of a row, (3,H,W) uint8; None for the GAN, trained alongside the student."""
        row = ROWS[name]
        if row.images is not None:
            return row.images(self)
        own = dict(synth=row.synth, **row.adapter) if row.adapter else {}
        adapter = self.adapter(name if row.adapter else "d4ir", **own)
        return self.synthesize(name, adapter, distill=row.distill, **row.synth)

    def is_no_op(self, name):
        """True for an ablation that changes none of the task's settings."""
        row, run = ROWS[name], self.run
        changes = [(getattr(config, key), value) for config, settings in
                   ((run.adapter, row.adapter), (run.synth, row.synth), (run.distill, row.distill))
                   for key, value in settings.items()]
        return bool(changes) and all(old == new for old, new in changes)

    def is_finished(self, name, seeds):
        first = self.run.args.seed
        return all((self.run.out / name / f"student-{seed}.json").exists()
                   for seed in range(first, first + seeds))

    def students(self, name, images, seeds, train=None):
        """Distils and evaluates one student per seed on images(). Returns the metrics of each.
        train: in place of `Bench.train`, with the same arguments."""
        run = self.variant(name, distill=ROWS[name].distill if name in ROWS else {})
        results, targets = [], None
        images = None if self.is_finished(name, seeds) else images()
        for seed in range(run.args.seed, run.args.seed + seeds):
            file, path = run.out / f"student-{seed}.json", run.out / f"student-{seed}.safetensors"
            if not file.exists():
                run.log(f"--- {name}, seed {seed}")
                with timed(run.out, f"student-{seed}"):
                    if images is not None and run.distill.keep_teacher and targets is None:
                        targets = list(teacher_outputs(run.teacher, images, run.device,
                                                       run.dtype))
                    student, sample = (train or self.train)(run, images, targets, seed)
                save_restorer(student, path)
                strip(sample, self.crop).save(run.out / "sample.png")
                result = evaluate(student, run.pairs, tile=run.args.tile)
                d4ir.write_text(file, json.dumps(test_metrics(result)))
                path.with_suffix(".pt").unlink(missing_ok=True)
            results.append(json.loads(file.read_text(encoding="utf-8")))
        return results

    def train(self, run, images, targets, seed):
        """A student of one seed, and sample images (3,H,W) in 0..255 of what it was trained on."""
        torch.manual_seed(seed)
        crop = run.distill.crop_size(run.size)
        student = run.new_student(crop).to(run.device)
        options = dict(device=run.device, dtype=run.dtype, log=run.log_losses)
        if images is None:
            loader = Adversary(run.teacher, student, crop, run.distill.batch, run.device,
                               run.dtype, seed)
            distill(run.teacher, student, loader, run.distill, **options)
            return student, list(next(iter(loader))[0] * 255)
        loader = Crops(images, crop, run.distill.batch, targets, seed)
        distill(run.teacher, student, loader, run.distill, **options,
                checkpoint=run.out / f"student-{seed}.pt")
        return student, images


@contextmanager
def timed(folder, name):
    """Adds the seconds of a block to the folder's seconds.json."""
    start = time.time()
    try:
        yield
    finally:
        past = seconds(folder)
        total = past.get(name, 0) + time.time() - start
        d4ir.write_text(folder / "seconds.json", json.dumps(past | {name: total}))


def seconds(folder):
    file = folder / "seconds.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}


def read_gain(folder):
    """{"gain": the teacher's gain on the folder's synthesized images}; {} if it has none."""
    file = folder / "gain.json"
    return {"gain": json.loads(file.read_text(encoding="utf-8"))} if file.exists() else {}


def strip(images, side, count=8):
    """One picture of the centres of up to `count` images, spread over the list."""
    picture = Image.new("RGB", (count * (side + 2), side), "white")
    chosen = torch.linspace(0, len(images) - 1, count).int().unique().tolist()
    for i, index in enumerate(chosen):
        crop = center_crop(images[index], side).byte().cpu()
        picture.paste(to_pil_image(crop), (i * (side + 2), 0))
    return picture


def test_metrics(result):
    """The four metrics and, with several test sets, PSNR RGB of each: {"psnr_rgb, SET": ...}."""
    metrics, sets = {key: result[key] for key in METRICS}, by_set(result["images"])
    if len(sets) > 1:
        metrics |= {f"psnr_rgb, {name}": means(rows)["psnr_rgb"] for name, rows in sets.items()}
    return metrics


def summary(results):
    """{"psnr_rgb": {"mean", "std"}, ...} over the results of several seeds."""
    stats = {}
    for key in results[0]:
        values = [result[key] for result in results]
        std = statistics.stdev(values) if len(values) > 1 else 0.0
        stats[key] = {"mean": statistics.fmean(values), "std": std}
    return stats


# ---------------------------------------------------------------- the table and the sweeps

def compare(bench, names, seeds):
    """The rows of compare-TASK.json: the requested ones, and others that are finished."""
    run, rows = bench.run, []
    for name, model in (("input", None), ("teacher", run.teacher)):
        file = run.out / f"{name}.json"
        if not file.exists():
            result = evaluate(model, run.pairs, tile=run.args.tile, label=name)
            d4ir.write_text(file, json.dumps(test_metrics(result)))
        rows.append({"source": name} | summary([json.loads(file.read_text(encoding="utf-8"))]))
    for name, row in ROWS.items():
        if bench.is_no_op(name) or not (name in names or bench.is_finished(name, seeds)):
            continue
        stats = summary(bench.students(name, lambda: bench.images(name), seeds))
        own, shared = seconds(run.out / name), seconds(run.out / "d4ir")
        durations = {key: shared[key] for key in row.reuses if key in shared} | own
        per_student = statistics.fmean(
            durations[key] for key in durations if key.startswith("student"))
        total = per_student + durations.get("adapter", 0) + durations.get("synth", 0)
        task = d4ir.TASKS[run.args.task]
        quoted = {"captions": task.captions, "plain": task.plain_captions()}
        quoted = {key: ", ".join(map(repr, texts)) for key, texts in quoted.items()}
        share = run.distill.select
        used = f", of which the best {share:.0%} are used" if share < 1 else ""
        stats |= {"minutes": total / 60,
                  "note": row.note.format(**quoted, used=used, **asdict(run.synth))}
        if "synth" in durations:
            stats["images_per_s"] = run.synth.images / durations["synth"]
        rows.append({"source": name, "seeds": seeds} | stats | read_gain(run.out / name))
    psnr = {row["source"]: row["psnr_rgb"]["mean"] for row in rows}
    if psnr.get("original", 0) > psnr["input"]:
        for row in rows:
            gain = row["psnr_rgb"]["mean"] - psnr["input"]
            row["share"] = gain / (psnr["original"] - psnr["input"])
    return rows


def sweep(bench, what, seeds):
    """The values of WHAT-TASK.json: PSNR of D4IR's student, and of a baseline's, at each value."""
    values, default = [], getattr(bench.run.synth, what, None)
    for value in SWEEPS[what]:
        suffix = "" if value == default else f"-{what}-{value:g}"
        images = {}
        if what == "photos":
            photos = bench.photos("degraded", bench.run.size)
            if len(photos) < value:
                bench.run.log(f"only {len(photos)} photos: skipping {value}")
                continue
            photos = photos[::len(photos) // value][:value]
            adapter = lambda: bench.adapter("d4ir" + suffix, photos)
            images["d4ir"] = lambda: bench.synthesize("d4ir" + suffix, adapter(), None, photos)
            images["web-degraded"] = lambda: photos
        elif value == default:
            images["d4ir"] = lambda: bench.images("d4ir")
        else:
            images["d4ir"] = lambda: bench.synthesize("d4ir" + suffix, bench.adapter("d4ir"),
                                                      **{what: value})
        if what in ("strength", "guidance"):
            images["sd-text"] = lambda: bench.synthesize("sd-text" + suffix, bench.captions(),
                                                         **{what: value})
        row = {what: value} | {
            name: summary(bench.students(name + suffix, make, seeds))["psnr_rgb"]
            for name, make in images.items()}
        values.append(row | read_gain(bench.run.out / ("d4ir" + suffix)))
    return values


GAIN = "- gain: PSNR(T(x), x_c) - PSNR(x, x_c) in dB, the mean over the images that are used"


def markdown(result):
    """The content of a result's JSON file as a Markdown page."""
    lines = [f"# {result['task']}: {result['n_images']} test photos, {result['seeds']} seed(s)", ""]
    number = lambda m, digits: f"{m['mean']:.{digits}f}" + (
        f" ± {m['std']:.{digits}f}" if m["std"] else "")
    if "rows" in result:
        sets = [key for key in result["rows"][0] if ", " in key]
        titles = ["PSNR RGB", "SSIM RGB", "PSNR Y", "SSIM Y",
                  *(key.replace("psnr_rgb", "PSNR RGB") for key in sets),
                  "share", "gain", "images/s", "minutes"]
        lines += [f"| source | {' | '.join(titles)} |", "|---" * (1 + len(titles)) + "|"]
        for row in result["rows"]:
            name = row["source"]
            cells = [ROWS[name].title if name in ROWS else name]
            cells += [number(row[key], 2 if key.startswith("psnr") else 4)
                      for key in (*METRICS, *sets)]
            cells += [f"{row['share']:.0%}" if "share" in row else "",
                      f"{row['gain']:.2f}" if "gain" in row else "",
                      f"{row['images_per_s']:.1f}" if "images_per_s" in row else "",
                      f"{row['minutes']:.1f}" if "minutes" in row else ""]
            lines.append(f"| {' | '.join(cells)} |")
        lines += [""] + [f"- {ROWS[row['source']].title}: {row['note']}"
                         for row in result["rows"] if "note" in row]
        lines += ["- share: (student - input) / (student trained on the original data - input), "
                  "in PSNR RGB", GAIN]
    else:
        what = result["sweep"]
        columns = {key: f"PSNR RGB, {ROWS[key].title}" for key in result["values"][0]
                   if key in ROWS}
        lines += [f"| {what} | {' | '.join(columns.values())} | gain, D4IR |",
                  "|---" * (2 + len(columns)) + "|"]
        for row in result["values"]:
            cells = [f"{row[what]:g}", *(number(row[column], 2) for column in columns),
                     f"{row['gain']:.2f}" if "gain" in row else ""]
            lines.append(f"| {' | '.join(cells)} |")
        lines += ["", GAIN]
    lines += ["", f"{DEFINITIONS}. Mean and standard deviation over the students' seeds; adapters "
              f"and images have seed {result['seed']}. `{result['command']}`, "
              f"{result['machine']}, {result['date']}."]
    return "\n".join(lines) + "\n"


def sample_sheet(run, names, path):
    """A picture with the title and some images of every row."""
    strips = {name: Image.open(run.out / name / "sample.png") for name in names if name in ROWS}
    height = 4 + max(image.height for image in strips.values())
    width = 220 + max(image.width for image in strips.values())
    sheet = Image.new("RGB", (width, height * len(strips)), "white")
    for i, (name, image) in enumerate(strips.items()):
        label = ROWS[name].title.replace("(", "\n(")
        ImageDraw.Draw(sheet).text((4, i * height + height // 2 - 6), label, fill="black")
        sheet.paste(image, (220, i * height))
    sheet.quantize(256).save(path)                         # a third of the file size


# ---------------------------------------------------------------- the command line

def check_settings(run, original):
    """Rejects a folder whose rows were made with different settings or weights."""
    digest = lambda path: hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None
    unet = Path(run.args.sd, "unet")
    weights = next(iter(sorted(unet.glob("*.safetensors"))), unet)
    settings = run.settings() | {"compare": {
        "original": str(original), "U-Net's sha256": digest(weights),
        "teacher's sha256": digest(Path(run.args.teacher.split("@")[-1]))}}
    file, settings = run.out / "settings.json", json.loads(json.dumps(settings))
    if file.exists():
        old = json.loads(file.read_text(encoding="utf-8"))
        differences = [f"{key} was {old.get(stage, {}).get(key)!r}, now {value!r}"
                       for stage, part in settings.items() for key, value in part.items()
                       if old.get(stage, {}).get(key) != value]
        if differences:
            raise ValueError(f"{run.out} was made with different settings: "
                             f"{'; '.join(differences)}. Use the same settings or another --out, "
                             "or delete the folder")
    run.out.mkdir(parents=True, exist_ok=True)
    run.lock = d4ir.lock_folder(run.out)
    d4ir.write_text(file, json.dumps(settings, indent=2))


def write_demo_photos(folder, task, **counts):
    """Demo photos that d4ir.py does not need: FOLDER/degraded (more of them), FOLDER/original."""
    from demo import photos
    photos.write_photos(folder, d4ir.TASKS[task].weather, tuple(counts), **counts)


def make_bench(arguments, original=None, many_photos=False):
    """The Bench for these flags of d4ir.py; by default, --out is runs/compare/TASK.

    original: folder of the teacher's training photos, degraded. many_photos: with the demo, as many
    degraded photos as the sweep over photos needs.
    """
    run = d4ir.Run(d4ir.parse(arguments))
    args = run.args
    if args.out == Path("runs") / args.task:
        args.out = run.out = Path("runs/compare") / args.task
    if args.stage or args.restart or args.adapter_file or run.world_size > 1:
        raise ValueError("--stage, --restart, --adapter and torchrun are for d4ir.py only")
    original = original and original.resolve()
    if original and not original.is_dir():
        raise ValueError(f"--original {original}: no such folder")
    d4ir.check_inputs(run)
    check_settings(run, original)
    if many_photos and args.degraded is None:
        folder = run.out / "demo" / args.task / "many"
        write_demo_photos(folder, args.task, degraded=max(SWEEPS["photos"]))
        args.degraded = folder / "degraded"
    d4ir.write_demo_photos(run)
    if not run.pairs:
        raise ValueError(f"--test {args.test} has no ground truth")
    return Bench(run, original)


def main(argv=None):
    parser = make_parser("compare", __doc__, seeds="students per row")
    parser.add_argument("--rows", nargs="+", choices=(*ROWS, *GROUPS), default=list(ROWS),
                        metavar="ROW", help=f"one or more of {', '.join((*GROUPS, *ROWS))} (all)")
    parser.add_argument("--sweep", choices=SWEEPS, help="sweep a setting instead of the rows")
    parser.add_argument("--original", type=Path, metavar="DIR",
                        help="degraded training photos of the teacher (the demo's)")
    own, rest = parser.parse_known_args(argv)
    bench = make_bench(rest, own.original, own.sweep == "photos")
    run, args = bench.run, bench.run.args
    names = [name for row in own.rows for name in GROUPS.get(row, (row,))]
    if "original" in names and not own.sweep and not bench.has_original():
        names.remove("original")
        run.log("no --original: skipping the row 'original data' and the column 'share'")

    result = {"task": args.task, "seeds": own.seeds, "n_images": len(run.pairs)}
    if own.sweep:
        result |= {"sweep": own.sweep, "values": sweep(bench, own.sweep, own.seeds)}
    else:
        result["rows"] = compare(bench, names, own.seeds)
    result |= provenance("compare", argv) | {
        "seed": args.seed, "machine": machine_name(run.device), "adapter": asdict(run.adapter),
        "synth": asdict(run.synth), "distill": asdict(run.distill)}
    own.results.mkdir(parents=True, exist_ok=True)
    path = own.results / f"{own.sweep or 'compare'}-{args.task}"
    d4ir.write_text(path.with_suffix(".json"), json.dumps(result, indent=1))
    d4ir.write_text(path.with_suffix(".md"), markdown(result))
    if not own.sweep:
        sample_sheet(run, [row["source"] for row in result["rows"]], path.with_suffix(".png"))
    run.log(markdown(result) + f"\nwritten: {path}.*")


if __name__ == "__main__":
    d4ir.run_command(main)
