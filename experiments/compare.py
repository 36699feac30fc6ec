"""D4IR against other sources of images: one student a source, all else alike.

    python -m experiments.compare --task desnow                   # results/compare-desnow.json, .md, .png
    python -m experiments.compare --task desnow --sweep strength  # results/strength-desnow.json, .md
    python -m experiments.compare --task desnow --seeds 1 --rows d4ir gan          # the others as far as they are done

The flags of d4ir.py that set photos, models and stages hold here too, with the same defaults. Every student has the
same network, steps, batch, crop and learning rate, and starts from the same seeds; made images are equally many. An
adapter, a set of images and the teacher's outputs for them are made once, for all seeds. What is finished in the folder
--out (runs/compare/TASK) is not done again.
"""
import argparse
import copy
import hashlib
import json
import os
import shlex
import statistics
import sys
import time
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

import torch
from PIL import Image, ImageDraw
from torch import nn
from torchvision.transforms.functional import center_crop, to_pil_image

import d4ir
from distill import Crops, distill
from evaluate import DEFINITIONS, METRICS, evaluate, find_pairs, read_image
from models import Restorer, save_restorer
from prompt_adapter import load_adapter
from synth import synthesize_folder

ROWS = {"original": "original data", "web-degraded": "web, degraded", "web-clean": "web, clean",
        "gan": "GAN", "sd-text": "SD, text", "no-contrast": "D4IR without contrast",
        "no-cross-crop": "D4IR without cross-crop", "no-content": "D4IR without content",
        "d4ir": "D4IR", "d4ir+web": "D4IR and web"}
SWEEPS = {"strength": (0.2, 0.4, 0.6, 0.8, 0.95), "guidance": (1.0, 2.0, 4.0, 8.0),
          "photos": (8, 32, 128, 512), "images": (32, 64, 128, 256, 512, 1024)}
OF_D4IR = {"no-content": ("adapter",), "d4ir+web": ("adapter", "synth")}                # what a row takes from D4IR's
NOTES = {
    "original": "the teacher's own training photos, degraded",
    "web-degraded": "the adapter's photos, as they are", "web-clean": "the photos that give the content, as they are",
    "gan": "a generator from noise, updated once for each of the student's updates, by Adam at {gan.lr:g}: "
           "-log |T(x) - S(x)| - {gan.variety:g} |G(a) - G(b)| / |a - b| + {gan.prior:g} |T(x) - x| "
           "(Fang et al. 2019; Mao et al. 2019; Zhang et al. 2021)",
    "sd-text": "{captions} (in turn, where there are several) in place of the adapter's prompts, which start at their mean",
    "no-contrast": "--adapter-contrast 0", "no-cross-crop": "--no-adapter-cross-crop",
    "no-content": "--strength 1 --no-anchor --no-veil, and a grey picture in place of the clean photos",
    "d4ir": "strength {strength:g}, guidance {guidance:g}, {images} images", "d4ir+web": "both lists of images together"}


# ---------------------------------------------------------------- data-free adversarial distillation

class Generator(nn.Module):
    """z (B,128), standard normal, to images (B,3,side,side) in [0,1]."""

    def __init__(self, side, channels=128):
        super().__init__()
        c, start = 2 * channels, -(-side // 8)
        self.side, self.shape = side, (c, start, start)
        self.start = nn.Linear(128, c * start ** 2)
        layers = [nn.BatchNorm2d(c)]
        for out in (channels, channels // 2, channels // 2):
            layers += [nn.Upsample(scale_factor=2), nn.Conv2d(c, out, 3, padding=1), nn.BatchNorm2d(out),
                       nn.LeakyReLU(0.2)]
            c = out
        self.layers = nn.Sequential(*layers, nn.Conv2d(c, 3, 3, padding=1), nn.BatchNorm2d(3), nn.Sigmoid())

    def forward(self, z):
        return self.layers(self.start(z).view(-1, *self.shape))[..., :self.side, :self.side]


class Adversary:
    """Batches (x, T(x)), (B,3,crop,crop) in [0,1], without end, of a generator that is trained in turn with the student:

        loss = -log ||T(x) - S(x)||_1 - variety ||G(a) - G(b)||_1 / ||a - b||_1 + prior ||T(x) - x||_1

    x = G(z), a and b neighbours in z. It widens the gap between teacher and student (DFAD: Fang et al. 2019), keeps its
    images varied (mode seeking: Mao et al. 2019), and near what the teacher gives back: without the last, the like of
    which Zhang et al. (2021) have for super-resolution, it finds noise that no photo has, and the student learns that.
    """
    lr, variety, prior = 5e-4, 1.0, 30.0

    def __init__(self, teacher, student, crop, batch, device, dtype, seed):
        torch.manual_seed(seed)
        self.generator = Generator(crop).to(device, memory_format=torch.channels_last)
        self.teacher, self.student, self.batch = teacher, student, batch
        self.device, self.dtype = device, dtype

    def __len__(self):
        return 1

    def __iter__(self):
        weights = list(self.generator.parameters())
        optimizer = torch.optim.Adam(weights, lr=self.lr, betas=(0.5, 0.999))
        while True:
            z = torch.randn(self.batch, 128, device=self.device)
            with torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not torch.float32):
                x = self.generator(z).float().contiguous(memory_format=torch.channels_last)
                taught = self.teacher(x).float().clamp(0, 1)
                gap = (taught - self.student(x).float()).abs().mean()
            varied = ((x - x.roll(1, 0)).abs().mean((1, 2, 3)) / ((z - z.roll(1, 0)).abs().mean(1) + 1e-6)).mean()
            loss = -(gap + 1e-6).log() - self.variety * varied + self.prior * (taught - x).abs().mean()
            optimizer.zero_grad(set_to_none=True)
            loss.backward(inputs=weights)                  # the student's gradients are its own loop's
            optimizer.step()
            yield x.detach(), taught.detach()


# ---------------------------------------------------------------- images and students of each source

class Captions:
    """What stands in the adapter's place for `sd-text`: captions' prompts, in turn."""

    def __init__(self, sd, task, tokens):
        self.prompts = sd.text_prompt(d4ir.CAPTIONS[task], tokens)

    def __call__(self, degraded):
        return self.prompts[torch.arange(len(degraded)) % len(self.prompts)]


class Bench:
    """What all rows share. Photos are loaded when they are first needed; each row has a folder in run.out."""

    def __init__(self, run, pairs, teacher, sd, original):
        self.run, self.pairs, self.teacher, self.sd, self.original = run, pairs, teacher, sd, original
        self.side = run.synth.size or sd.size              # px, of the images that are made
        self.crop = d4ir.crop_side(run, self.side)
        self.loaded = {}

    def photos(self, flag, side=None):
        """The photos of --degraded, --clean or --original, (3,H,W) uint8; by default as large as the images made."""
        side = side or self.side
        if (flag, side) not in self.loaded:
            folder = self.original if flag == "original" else getattr(self.run.args, flag)
            self.loaded[flag, side] = d4ir.load_photos(folder, side, self.run, f"--{flag}")
        return self.loaded[flag, side]

    def variant(self, name, adapter={}, synth={}):
        """The run, in a row's folder and with its settings."""
        run = copy.copy(self.run)
        run.out, run.adapter, run.synth = self.run.out / name, replace(run.adapter, **adapter), replace(run.synth, **synth)
        run.out.mkdir(parents=True, exist_ok=True)
        return run

    def adapter(self, name, degraded=None, **settings):
        """A row's adapter, trained on the photos of --degraded or on these."""
        run = self.variant(name, adapter=settings)
        path, photos = run.out / "adapter.safetensors", degraded or self.photos("degraded")
        if not path.exists():
            with clock(run.out, "adapter"):
                d4ir.run_adapter(run, self.sd, photos)
        return load_adapter(path, run.device)

    def made(self, name, adapter, clean=None, degraded=None, **settings):
        """A row's synthesized images, (3,H,W) uint8. adapter: degraded photos to prompts."""
        run = self.variant(name, synth=settings)
        photos = clean or self.photos("clean"), degraded or self.photos("degraded")
        files = [run.out / "synth" / f"{i:06d}.png" for i in range(run.synth.images)]
        if not all(file.exists() for file in files):
            with clock(run.out, "synth"):
                synthesize_folder(*photos, adapter, self.sd, run.synth, run.out / "synth", seed=run.args.seed)
        return [read_image(file) for file in files]

    def captions(self):
        return Captions(self.sd, self.run.args.task, self.run.adapter.tokens)

    def images(self, name):
        """The images of a row, (3,H,W) uint8; None for the GAN, which makes its own as it goes."""
        match name:
            case "original" | "web-degraded" | "web-clean":
                return self.photos(name.removeprefix("web-"), self.crop)
            case "gan":
                return None
            case "sd-text":
                return self.made(name, self.captions())
            case "no-contrast":
                return self.made(name, self.adapter(name, contrast=0.0))
            case "no-cross-crop":
                return self.made(name, self.adapter(name, cross_crop=False))
            case "no-content":
                grey = torch.full((3, self.side, self.side), 128, dtype=torch.uint8)
                return self.made(name, self.adapter("d4ir"), [grey], strength=1.0, anchor=False, veil=False)
            case "d4ir":
                return self.made(name, self.adapter(name))
            case "d4ir+web":
                return self.images("d4ir") + self.images("web-degraded")

    def done(self, name, seeds):
        first = self.run.args.seed
        return all((self.run.out / name / f"student-{i}.json").exists() for i in range(first, first + seeds))

    def students(self, name, images, seeds):
        """Distils and evaluates a student a seed on `images()`. Returns the metrics of each."""
        run, found, targets = self.variant(name), [], None
        make = None if self.done(name, seeds) else images()
        for seed in range(run.args.seed, run.args.seed + seeds):
            file, path = run.out / f"student-{seed}.json", run.out / f"student-{seed}.safetensors"
            if not file.exists():
                run.say(f"--- {name}, seed {seed}")
                with clock(run.out, f"student-{seed}"):
                    torch.manual_seed(seed)
                    student = Restorer(run.args.student_width, window=self.crop).to(run.device)
                    if make is None:
                        loader = Adversary(self.teacher, student, self.crop, run.distill.batch, run.device, run.dtype, seed)
                    else:
                        targets = targets or d4ir.kept_outputs(run, self.teacher, make)
                        loader = Crops(make, self.crop, run.distill.batch, targets, seed)
                    distill(self.teacher, student, loader, run.distill, device=run.device, dtype=run.dtype,
                            checkpoint=None if make is None else path.with_suffix(".pt"))
                save_restorer(student, path)
                strip(make or list(next(iter(loader))[0] * 255), self.crop).save(run.out / "sample.png")
                result = evaluate(student, self.pairs, tile=run.args.tile)
                d4ir.write_text(file, json.dumps({key: result[key] for key in METRICS}))
                path.with_suffix(".pt").unlink(missing_ok=True)
            found.append(json.loads(file.read_text(encoding="utf-8")))
        return found


@contextmanager
def clock(folder, what):
    """Adds the seconds that the block takes to the folder's seconds.json."""
    start = time.time()
    try:
        yield
    finally:
        past = seconds(folder)
        d4ir.write_text(folder / "seconds.json", json.dumps(past | {what: past.get(what, 0) + time.time() - start}))


def seconds(folder):
    file = folder / "seconds.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}


def strip(images, side, count=8):
    """A picture of the middle of `count` of the images, from the first to the last, (3,H,W) in 0..255."""
    picture = Image.new("RGB", (count * (side + 2), side), "white")
    for i, image in enumerate(images[j] for j in torch.linspace(0, len(images) - 1, count).int().unique().tolist()):
        picture.paste(to_pil_image(center_crop(image, side).byte().cpu()), (i * (side + 2), 0))
    return picture


def summary(found):
    """Mean and standard deviation over seeds of every value: {"psnr_rgb": {"mean", "std"}, ...}."""
    spread = lambda values: statistics.stdev(values) if len(values) > 1 else 0.0
    return {key: {"mean": statistics.fmean(f[key] for f in found), "std": spread([f[key] for f in found])}
            for key in found[0]}


def refuse_others(run, own):
    """Refuses a folder whose rows were made with other settings, a retrained teacher or another Stable Diffusion."""
    digest = lambda path: hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None
    unet = Path(run.args.sd, "unet")
    now = run.settings() | {"compare": {
        "original": str(own.original), "teacher's sha256": digest(Path(run.args.teacher.split("@")[-1])),
        "U-Net's sha256": digest(next(iter(sorted(unet.glob("*.safetensors"))), unet))}}
    file, now = run.out / "settings.json", json.loads(json.dumps(now))
    if file.exists():
        old = json.loads(file.read_text(encoding="utf-8"))
        differ = [f"{key} was {old.get(stage, {}).get(key)!r}, now {value!r}" for stage, part in now.items()
                  for key, value in part.items() if old.get(stage, {}).get(key) != value]
        if differ:
            raise ValueError(f"{run.out} was made with other settings: {'; '.join(differ)}. Give the same ones, or "
                             "another --out, or delete it")
    run.out.mkdir(parents=True, exist_ok=True)
    d4ir.write_text(file, json.dumps(now, indent=2))


def write_photos(folder, task, **counts):
    """Photos of the demo's, other ones or more than d4ir.py asks for: FOLDER/degraded, FOLDER/original."""
    import demo
    demo.write_photos(folder, task, tuple(counts), **counts)


# ---------------------------------------------------------------- the table and the sweeps

def compare(bench, names, seeds):
    """The rows of compare-TASK.json: those asked for, and others whose students are there."""
    run, rows = bench.run, []
    for name, model in (("input", None), ("teacher", bench.teacher)):
        result = evaluate(model, bench.pairs, tile=run.args.tile, label=name)
        rows.append({"source": name} | summary([{key: result[key] for key in METRICS}]))
    for name in ROWS:
        if name not in names and not bench.done(name, seeds):
            continue
        found = summary(bench.students(name, lambda: bench.images(name), seeds))
        own = seconds(run.out / "d4ir")
        took = {k: own[k] for k in OF_D4IR.get(name, ()) if k in own} | seconds(run.out / name)
        students = statistics.fmean(v for k, v in took.items() if k.startswith("student"))
        total = students + took.get("adapter", 0) + took.get("synth", 0)
        speed = {"images_per_s": run.synth.images / took["synth"]} if "synth" in took else {}
        captions = ", ".join(map(repr, d4ir.CAPTIONS[run.args.task]))
        note = NOTES[name].format(gan=Adversary, captions=captions, **asdict(run.synth))
        rows.append({"source": name} | found | speed | {"minutes": total / 60, "note": note})
    level = {row["source"]: row["psnr_rgb"]["mean"] for row in rows}
    if level.get("original", 0) > level["input"]:
        for row in rows:
            row["share"] = (row["psnr_rgb"]["mean"] - level["input"]) / (level["original"] - level["input"])
    return rows


def sweep(bench, what, seeds):
    """The values of WHAT-TASK.json: D4IR's student, and its rival where one depends on it too, at each of the values."""
    values, default = [], getattr(bench.run.synth, what, None)
    for value in SWEEPS[what]:
        at = lambda name: name if value == default else f"{name}-{what}-{value:g}"
        images = {}
        if what == "photos":
            every = bench.photos("degraded")
            if len(every) < value:
                bench.run.say(f"there are {len(every)} photos: {value} is left out")
                continue
            photos = every[::len(every) // value][:value]
            images["d4ir"] = lambda: bench.made(at("d4ir"), bench.adapter(at("d4ir"), photos), None, photos)
            images["web-degraded"] = lambda: photos
        elif value == default:
            images["d4ir"] = lambda: bench.images("d4ir")
        elif what == "images":
            images["d4ir"] = lambda: bench.made("images", bench.adapter("d4ir"), images=max(SWEEPS[what]))[:value]
        else:
            images["d4ir"] = lambda: bench.made(at("d4ir"), bench.adapter("d4ir"), **{what: value})
        if what in ("strength", "guidance"):
            images["sd-text"] = lambda: bench.made(at("sd-text"), bench.captions(), **{what: value})
        values.append({what: value} | {name: summary(bench.students(at(name), make, seeds))["psnr_rgb"]
                                       for name, make in images.items()})
    return values


def table(result):
    """The json's content as a Markdown page."""
    lines = [f"# {result['task']}: {result['n_images']} test photos, {result['seeds']} seeds", ""]
    number = lambda m, digits: f"{m['mean']:.{digits}f}" + (f" ± {m['std']:.{digits}f}" if m["std"] else "")
    if "rows" in result:
        lines += ["| source | PSNR RGB | SSIM RGB | PSNR Y | SSIM Y | share | images/s | minutes |", "|" + "---|" * 8]
        for row in result["rows"]:
            cells = [ROWS.get(row["source"], row["source"])]
            cells += [number(row[key], 2 if key.startswith("psnr") else 4) for key in METRICS]
            cells += [f"{row['share']:.0%}" if "share" in row else "",
                      f"{row['images_per_s']:.1f}" if row.get("images_per_s") else "",
                      f"{row['minutes']:.1f}" if "minutes" in row else ""]
            lines.append(f"| {' | '.join(cells)} |")
        lines += [""] + [f"- {ROWS[row['source']]}: {row['note']}" for row in result["rows"] if "note" in row]
        lines += ["- share: (student - input) / (student of original data - input), in dB of PSNR RGB"]
    else:
        what, columns = result["sweep"], list(dict.fromkeys(key for row in result["values"] for key in row))[1:]
        lines += [f"| {what} | {' | '.join(f'PSNR RGB, {ROWS[c]}' for c in columns)} |", "|" + "---|" * (1 + len(columns))]
        lines += [f"| {row[what]:g} | {' | '.join(number(row[c], 2) for c in columns)} |" for row in result["values"]]
    lines += ["", f"{DEFINITIONS}. Mean and standard deviation over the students' seeds; the adapters and the images are "
              f"of seed {result['seed']}. `{result['command']}`, {result['machine']}, {result['date']}."]
    return "\n".join(lines) + "\n"


def picture(run, names, path):
    """One row of images a source, its name before it."""
    strips = {name: Image.open(run.out / name / "sample.png") for name in names if name in ROWS}
    height = 4 + max(s.height for s in strips.values())
    sheet = Image.new("RGB", (150 + max(s.width for s in strips.values()), height * len(strips)), "white")
    for i, (name, part) in enumerate(strips.items()):
        ImageDraw.Draw(sheet).text((4, i * height + height // 2 - 6), ROWS[name], fill="black")
        sheet.paste(part, (150, i * height))
    sheet.quantize(256).save(path)                         # a third of the bytes


def main(argv=None):
    parser = d4ir.Parser(prog="experiments.compare", description=__doc__, allow_abbrev=False,
                         formatter_class=argparse.RawDescriptionHelpFormatter,
                         epilog="and the flags of d4ir.py (python d4ir.py --help), of which --task is required")
    parser.add_argument("--seeds", type=int, default=3, help="students a row (3)")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS), metavar="ROW",
                        help=f"some of {', '.join(ROWS)} (all)")
    parser.add_argument("--sweep", choices=SWEEPS, help="D4IR's student at several values of this instead")
    parser.add_argument("--original", type=Path, metavar="DIR",
                        help="the teacher's own training photos, degraded (the demo's, for the embedded teacher)")
    parser.add_argument("--results", type=Path, default=Path("results"), metavar="DIR")
    own, rest = parser.parse_known_args(argv)
    run = d4ir.Run(d4ir.parse(rest))
    args = run.args
    if args.out == Path("runs") / args.task:
        args.out = run.out = Path("runs/compare") / args.task
    if own.seeds < 1:
        parser.error(f"--seeds must be at least 1, not {own.seeds}")
    if args.stage or args.restart or run.ranks > 1:
        parser.error("--stage, --restart and torchrun are d4ir.py's alone")
    if own.original:
        own.original = own.original.resolve()
        if not own.original.is_dir():
            raise ValueError(f"--original {own.original}: no such folder")
    pairs, teacher = d4ir.look(run)
    sd = d4ir.load_diffusion(run)
    refuse_others(run, own)

    names, original, photos = list(own.rows), own.original, run.out / "demo" / args.task
    embedded = Path(args.teacher).resolve().parent == d4ir.WEIGHTS
    if own.sweep == "photos" and args.degraded is None:
        write_photos(photos / "many", args.task, degraded=max(SWEEPS["photos"]))
        args.degraded = photos / "many" / "degraded"
    if "original" in names and not own.sweep and not original:
        if embedded:
            write_photos(photos, args.task, original=run.synth.images)
            original = photos / "original"
        else:
            names.remove("original")
            run.say("no --original: the row of the original data, and the shares, are left out")
            if not names:
                raise ValueError("no row is left")
    d4ir.from_demo(run)
    pairs = pairs or find_pairs(args.test)
    if not pairs:
        raise ValueError(f"--test {args.test} has no ground truth")
    bench = Bench(run, pairs, teacher, sd, original)

    result = {"task": args.task, "seeds": own.seeds, "n_images": len(pairs)}
    if own.sweep:
        result |= {"sweep": own.sweep, "values": sweep(bench, own.sweep, own.seeds)}
    else:
        result["rows"] = compare(bench, names, own.seeds)
    cuda = run.device.type == "cuda"
    said = ["python", "-m", "experiments.compare", *(sys.argv[1:] if argv is None else argv)]
    result |= {"command": shlex.join(said), "date": time.strftime("%Y-%m-%d"), "seed": args.seed,
               "machine": torch.cuda.get_device_name(run.device) if cuda else f"{os.cpu_count()} CPU cores",
               "adapter": asdict(run.adapter), "synth": asdict(run.synth), "distill": asdict(run.distill)}
    own.results.mkdir(parents=True, exist_ok=True)
    path = own.results / f"{own.sweep or 'compare'}-{args.task}"
    d4ir.write_text(path.with_suffix(".json"), json.dumps(result, indent=1))
    d4ir.write_text(path.with_suffix(".md"), table(result))
    if not own.sweep:
        picture(run, [row["source"] for row in result["rows"]], path.with_suffix(".png"))
    run.say(table(result) + f"\nwritten: {path}.json, .md" + ("" if own.sweep else ", .png"))


if __name__ == "__main__":
    d4ir.command(main)
