"""D4IR against other sources of images: one student a source, all else alike.

    python -m experiments.compare --task desnow                   # results/compare-desnow.json, .md, .png
    python -m experiments.compare --task desnow --sweep strength  # results/strength-desnow.json, .md
    python -m experiments.compare --task desnow --seeds 1 --rows d4ir gan ...      # some rows only

All flags of d4ir.py hold here too, and have the same defaults. Every student has the same network, steps, batch,
crop and learning rate, and starts from the same seeds; made images are equally many. An adapter, a set of images and
the teacher's outputs for them are made once, for all seeds. What is finished in the folder --out (runs/compare/TASK)
is not done again.
"""
import argparse
import copy
import itertools
import json
import os
import shlex
import statistics
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import torch
from PIL import Image, ImageDraw
from torch import nn
from torchvision.transforms.functional import center_crop, to_pil_image

import d4ir
from distill import Crops, distill, teacher_outputs
from evaluate import DEFINITIONS, METRICS, evaluate, find_pairs, list_images, read_image
from models import Restorer, load_restorer, load_stable_diffusion, save_restorer
from prompt_adapter import load_adapter
from synth import synthesize_folder

ROWS = {"original": "original data", "web-degraded": "web, degraded", "web-clean": "web, clean",
        "gan": "GAN", "sd-text": "SD, text", "no-contrast": "D4IR without contrast",
        "no-cross-crop": "D4IR without cross-crop", "no-content": "D4IR without content",
        "d4ir": "D4IR", "d4ir+web": "D4IR and web"}
SWEEPS = {"strength": (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8), "guidance": (1.0, 1.5, 2.0, 3.0, 4.0),
          "photos": (8, 32, 128, 512), "images": (32, 64, 128, 256, 512, 1024)}
CAPTIONS = {"derain": ("rain",), "dehaze": ("haze",), "desnow": ("snow",), "all": ("rain", "haze", "snow")}
NOTES = {
    "original": "the teacher's own training photos, degraded",
    "web-degraded": "the adapter's photos, as they are", "web-clean": "the photos that give the content, as they are",
    "gan": "a generator from noise (5 M parameters), one update for each of the student's, by Adam at {lr}: "
           "-log ||T(x) - S(x)||_1 - {variety} ||G(a) - G(b)||_1 / ||a - b||_1 (Fang et al. 2019; Mao et al. 2019)",
    "sd-text": "'a photo in light | moderate | heavy {weather}', in turn, in place of the adapter's prompts",
    "no-contrast": "--adapter-contrast 0", "no-cross-crop": "--no-adapter-cross-crop",
    "no-content": "--strength 1 --no-detail", "d4ir": "the defaults", "d4ir+web": "both lists of images together"}


# ---------------------------------------------------------------- data-free adversarial distillation

class Generator(nn.Module):
    """z (B,128), standard normal, to images (B,3,side,side) in [0,1]; side a multiple of 8."""

    def __init__(self, side, channels=128):
        super().__init__()
        self.start, c = nn.Linear(128, 2 * channels * (side // 8) ** 2), 2 * channels
        self.shape = (c, side // 8, side // 8)
        layers = [nn.BatchNorm2d(c)]
        for out in (channels, channels // 2, channels // 2):
            layers += [nn.Upsample(scale_factor=2), nn.Conv2d(c, out, 3, padding=1), nn.BatchNorm2d(out),
                       nn.LeakyReLU(0.2)]
            c = out
        self.layers = nn.Sequential(*layers, nn.Conv2d(c, 3, 3, padding=1), nn.BatchNorm2d(3), nn.Sigmoid())

    def forward(self, z):
        return self.layers(self.start(z).view(-1, *self.shape))


class Adversary:
    """Batches x (B,3,crop,crop) in [0,1], without end, of a generator that is trained in turn with the student:

        loss = -log ||T(x) - S(x)||_1 - variety ||G(a) - G(b)||_1 / ||a - b||_1,   x = G(z), a and b halves of z

    It widens the gap between teacher and student (DFAD: Fang et al. 2019) and keeps its images varied (mode seeking:
    Mao et al. 2019).
    """
    lr, variety = 1e-3, 1.0

    def __init__(self, teacher, student, crop, batch, device, dtype, seed):
        torch.manual_seed(seed)
        self.generator = Generator(crop).to(device, memory_format=torch.channels_last)
        self.teacher, self.student, self.batch = teacher, student, batch
        self.device, self.dtype = device, dtype

    def __len__(self):
        return 1

    def __iter__(self):
        optimizer = torch.optim.Adam(self.generator.parameters(), lr=self.lr, betas=(0.5, 0.999))
        while True:
            z = torch.randn(self.batch, 128, device=self.device)
            with torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not torch.float32):
                x = self.generator(z).float().contiguous(memory_format=torch.channels_last)
                gap = (self.teacher(x).float().clamp(0, 1) - self.student(x).float()).abs().mean()
            (a, b), (za, zb) = x.chunk(2), z.chunk(2)
            varied = ((a - b).abs().mean((1, 2, 3)) / (za - zb).abs().mean(1)).mean()
            loss = -(gap + 1e-6).log() - self.variety * varied
            optimizer.zero_grad(set_to_none=True)
            loss.backward()                                # the student's gradients are thrown away by its own loop
            optimizer.step()
            yield x.detach()


# ---------------------------------------------------------------- images of each source

class Captions:
    """What stands in the adapter's place for `sd-text`: captions' prompts, in turn."""

    def __init__(self, sd, task):
        said = [f"a photo in {amount} {weather}" for amount in ("light", "moderate", "heavy")
                for weather in CAPTIONS[task]]
        self.prompts = itertools.cycle(sd.text_prompt(said).unbind())

    def __call__(self, degraded):
        return torch.stack([next(self.prompts) for _ in degraded])


class Bench:
    """The photos, the models and the folder that all rows share; each is loaded when it is first needed."""

    def __init__(self, run, pairs, teacher, original):
        self.run, self.pairs, self.teacher, self.original = run, pairs, teacher, original
        self.sd, self.loaded = None, {}

    def model(self):
        if self.sd is None:
            self.sd = load_stable_diffusion(self.run.args.sd, self.run.device, self.run.dtype)
        return self.sd

    def photos(self, flag, folder=None):
        """The photos of --degraded, --clean or another folder, (3,H,W) uint8."""
        if flag not in self.loaded:
            folder = folder or getattr(self.run.args, flag)
            self.loaded[flag] = d4ir.load_photos(folder, self.side(), self.run, f"--{flag}")
        return self.loaded[flag]

    def side(self):
        return self.run.synth.size or self.model().size

    def variant(self, name, adapter={}, synth={}):
        """The same run in a folder of its own, with other settings."""
        run = copy.copy(self.run)
        run.out, run.adapter = self.run.out / name, replace(run.adapter, **adapter)
        run.synth = replace(run.synth, **synth)
        run.out.mkdir(parents=True, exist_ok=True)
        return run

    def adapter(self, name, degraded=None, **changes):
        """The trained adapter of a row."""
        run = self.variant(name, adapter=changes)
        path = run.out / "adapter.safetensors"
        if not path.exists():
            start = time.time()
            d4ir.run_adapter(run, self.model(), degraded or self.photos("degraded"))
            note(run.out, adapter_seconds=time.time() - start)
        return load_adapter(path, run.device)

    def made(self, name, adapter, degraded=None, **changes):
        """The synthesized images of a row, (3,H,W) uint8. adapter: degraded photos to prompts."""
        run = self.variant(name, synth=changes)
        there, start = len(list_images(run.out / "synth")) if (run.out / "synth").exists() else 0, time.time()
        if there < run.synth.images:
            synthesize_folder(self.photos("clean"), degraded or self.photos("degraded"), adapter, self.model(), run.synth,
                              run.out / "synth", seed=run.args.seed)
            note(run.out, images_per_s=(run.synth.images - there) / (time.time() - start))
        return [read_image(path) for path in list_images(run.out / "synth")[:run.synth.images]]

    def images(self, name):
        """The images of a row of the table, (3,H,W) uint8; None for the GAN, which makes its own as it goes."""
        match name:
            case "original":
                return self.photos("original", self.original)
            case "web-degraded":
                return self.photos("degraded")
            case "web-clean":
                return self.photos("clean")
            case "gan":
                return None
            case "sd-text":
                return self.made(name, Captions(self.model(), self.run.args.task))
            case "no-contrast":
                return self.made(name, self.adapter(name, contrast=0.0))
            case "no-cross-crop":
                return self.made(name, self.adapter(name, cross_crop=False))
            case "no-content":
                return self.made(name, self.adapter("d4ir"), strength=1.0, detail=False)
            case "d4ir":
                return self.made(name, self.adapter(name))
            case "d4ir+web":
                return self.images("d4ir") + self.photos("degraded")

    # ------------------------------------------------------------ students

    def students(self, name, images, seeds):
        """Distils and evaluates a student a seed. Returns the metrics of each, {"psnr_rgb", ..., "seconds"}."""
        run, found, targets = self.variant(name), [], None
        crop = run.distill.crop or min(256, 2 * self.side() // 3)
        for seed in range(run.args.seed, run.args.seed + seeds):
            file, path = run.out / f"student-{seed}.json", run.out / f"student-{seed}.safetensors"
            if not file.exists():
                run.say(f"--- {name}, seed {seed}")
                torch.manual_seed(seed)
                student, start = Restorer(run.args.student_width, window=crop).to(run.device), time.time()
                if images is None:
                    loader = Adversary(self.teacher, student, crop, run.distill.batch, run.device, run.dtype, seed)
                else:
                    targets = targets or teacher_outputs(self.teacher, images, run.device, run.dtype)
                    loader = Crops(images, crop, run.distill.batch, targets, seed)
                distill(self.teacher, student, loader, run.distill, device=run.device, dtype=run.dtype,
                        checkpoint=None if images is None else path.with_suffix(".pt"))
                save_restorer(student, path)
                seconds = time.time() - start
                shown = list(next(iter(loader)) * 255) if images is None else images
                strip(shown, crop).save(run.out / "sample.png")
                result = evaluate(student, self.pairs, tile=run.args.tile)
                d4ir.write_text(file, json.dumps({key: result[key] for key in METRICS} | {"seconds": seconds}))
                path.with_suffix(".pt").unlink(missing_ok=True)
            found.append(json.loads(file.read_text(encoding="utf-8")))
        return found


def strip(images, side, count=8):
    """A picture of the middle of `count` of the images, (3,H,W) in 0..255."""
    picture = Image.new("RGB", (count * (side + 2), side), "white")
    for i, image in enumerate(images[j * len(images) // count] for j in range(min(count, len(images)))):
        picture.paste(to_pil_image(center_crop(image, side).byte().cpu()), (i * (side + 2), 0))
    return picture


def note(folder, **values):
    """Adds to the folder's made.json what the making of its images has taken."""
    file = folder / "made.json"
    d4ir.write_text(file, json.dumps(noted(folder) | values))


def noted(folder):
    file = folder / "made.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}


def summary(found):
    """Mean and standard deviation over seeds of every value: {"psnr_rgb": {"mean", "std"}, ...}."""
    spread = lambda values: statistics.stdev(values) if len(values) > 1 else 0.0
    return {key: {"mean": statistics.fmean(f[key] for f in found), "std": spread([f[key] for f in found])}
            for key in found[0]}


def refuse_others(run, settings):
    """Refuses a folder whose students were made with other settings."""
    file, now = run.out / "settings.json", json.loads(json.dumps(settings))
    if file.exists():
        old = json.loads(file.read_text(encoding="utf-8"))
        differ = [f"{key} was {old.get(stage, {}).get(key)!r}, now {value!r}" for stage, part in now.items()
                  for key, value in part.items() if old.get(stage, {}).get(key) != value]
        if differ:
            raise ValueError(f"{run.out} was made with other settings: {'; '.join(differ)}. Give the same ones, or "
                             "another --out, or delete it")
    run.out.mkdir(parents=True, exist_ok=True)
    d4ir.write_text(file, json.dumps(now, indent=2))


def write_photos(run, name, **counts):
    """Photos of the demo's, other ones or more than d4ir.py asks for."""
    import demo
    demo.write_photos((run.out / "demo" / run.args.task / name).parent, run.args.task, tuple(counts), **counts)


# ---------------------------------------------------------------- the table and the sweeps

def compare(bench, names, seeds):
    """The rows of compare-TASK.json."""
    run, rows = bench.run, []
    for name, model in (("input", None), ("teacher", bench.teacher)):
        file = run.out / f"{name}.json"
        if not file.exists():
            result = evaluate(model, bench.pairs, tile=run.args.tile, label=name)
            d4ir.write_text(file, json.dumps({key: result[key] for key in METRICS}))
        rows.append({"source": name} | summary([json.loads(file.read_text(encoding="utf-8"))]))
    for name in names:
        done = all((run.out / name / f"student-{run.args.seed + i}.json").exists() for i in range(seeds))
        found = summary(bench.students(name, None if done else bench.images(name), seeds))
        made, seconds = noted(run.out / name), found.pop("seconds")
        own = noted(run.out / "d4ir") if name in ("no-content", "d4ir+web") else {}       # the adapter is D4IR's
        speed = made.get("images_per_s", own.get("images_per_s") if name == "d4ir+web" else None)
        total = seconds["mean"] + made.get("adapter_seconds", own.get("adapter_seconds", 0))
        total += run.synth.images / speed if speed else 0
        rows.append({"source": name} | found | {"images_per_s": speed, "minutes": total / 60, "note": notes(name, run)})
    by_name = {row["source"]: row for row in rows}
    if "original" in by_name:
        low, high = (by_name[name]["psnr_rgb"]["mean"] for name in ("input", "original"))
        for row in rows:
            row["share"] = (row["psnr_rgb"]["mean"] - low) / (high - low)
    return rows


def sweep(bench, what, seeds):
    """The rows of WHAT-TASK.json: D4IR's student at each value of one setting."""
    rows, default = [], getattr(bench.run.synth, what, None)
    for value in SWEEPS[what]:
        name = "d4ir" if value == default else f"{what}-{value:g}"
        row = {what: value}
        if what == "photos":
            photos = bench.photos("degraded")[:value]
            if len(photos) < value:
                bench.run.say(f"{what}: there are {len(photos)} photos; {value} is left out")
                continue
            images = bench.made(name, bench.adapter(name, photos), photos)
            row["web-degraded"] = summary(bench.students(f"{name}-web", photos, seeds))["psnr_rgb"]
        elif what == "images":
            images = bench.made("images", bench.adapter("d4ir"), images=max(SWEEPS[what]))[:value]
        else:
            images = bench.made(name, bench.adapter("d4ir"), **{what: value})
        row["d4ir"] = summary(bench.students(name, images, seeds))["psnr_rgb"]
        rows.append(row)
    return rows


def notes(name, run):
    weather = " | ".join(CAPTIONS[run.args.task])
    return NOTES[name].format(lr=Adversary.lr, variety=Adversary.variety, weather=weather)


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
        what, columns = result["sweep"], list(result["values"][0])[1:]
        lines += [f"| {what} | {' | '.join(f'PSNR RGB, {ROWS[c]}' for c in columns)} |", "|" + "---|" * (1 + len(columns))]
        lines += [f"| {row[what]:g} | {' | '.join(number(row[c], 2) for c in columns)} |" for row in result["values"]]
    lines += ["", f"{DEFINITIONS}. Mean and standard deviation over the students' seeds; the adapters and the images are "
              f"of seed {result['seed']}. `{result['command']}`, {result['machine']}, {result['date']}."]
    return "\n".join(lines) + "\n"


def picture(run, names, path):
    """One row of images a source, its name before it."""
    strips = {name: Image.open(run.out / name / "sample.png") for name in names}
    height = 4 + max(s.height for s in strips.values())
    sheet = Image.new("RGB", (150 + max(s.width for s in strips.values()), height * len(strips)), "white")
    for i, (name, part) in enumerate(strips.items()):
        ImageDraw.Draw(sheet).text((4, i * height + height // 2 - 6), ROWS[name], fill="black")
        sheet.paste(part, (150, i * height))
    sheet.save(path)


def main(argv=None):
    parser = d4ir.Parser(prog="experiments.compare", description=__doc__, allow_abbrev=False,
                         formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, help="students a row (3)")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS), metavar="ROW",
                        help=f"some of {', '.join(ROWS)} (all)")
    parser.add_argument("--sweep", choices=SWEEPS, help="D4IR's student at several values of this instead")
    parser.add_argument("--original", type=Path, metavar="DIR",
                        help="the teacher's own training photos, degraded (the demo's, for the embedded teacher)")
    parser.add_argument("--results", type=Path, default=Path("results"), metavar="DIR")
    own, rest = parser.parse_known_args(argv)
    if own.seeds < 1:
        parser.error(f"--seeds must be at least 1, not {own.seeds}")
    if not any(flag.split("=")[0] == "--out" for flag in rest):
        rest += ["--out", str(Path("runs/compare") / d4ir.parse(rest).task)]
    run = d4ir.Run(d4ir.parse(rest))
    if run.args.stage or run.ranks > 1:
        parser.error("--stage and torchrun are d4ir.py's alone")
    refuse_others(run, {"original": {"original": str(own.original)}} | run.settings())
    names = [name for name in ROWS if name in own.rows]
    if own.original is None and "original" in names:
        if run.args.teacher.startswith(str(d4ir.WEIGHTS)):
            own.original = run.out / "demo" / run.args.task / "original"
            write_photos(run, "original", original=run.synth.images)
        else:
            names.remove("original")
            run.say("no --original: the row of the original data, and the shares, are left out")
    if own.sweep == "photos" and run.args.degraded is None:
        write_photos(run, "many/degraded", degraded=max(SWEEPS["photos"]))
        run.args.degraded = run.out / "demo" / run.args.task / "many" / "degraded"
    d4ir.from_demo(run)
    teacher = load_restorer(run.args.teacher, run.device, run.args.teacher_multiple)
    width = teacher.config["width"] // 2 if isinstance(teacher, Restorer) else 32
    run.args.student_width = run.args.student_width or max(1, width)
    bench = Bench(run, find_pairs(run.args.test), teacher, own.original)

    result = {"task": run.args.task, "seeds": own.seeds, "n_images": len(bench.pairs)}
    if own.sweep:
        result |= {"sweep": own.sweep, "values": sweep(bench, own.sweep, own.seeds)}
    else:
        result["rows"] = compare(bench, names, own.seeds)
    cuda = run.device.type == "cuda"
    machine = torch.cuda.get_device_name(run.device) if cuda else f"{os.cpu_count()} CPU cores"
    result |= {"command": shlex.join(["python", "-m", "experiments.compare", *(sys.argv[1:] if argv is None else argv)]),
               "machine": machine, "date": time.strftime("%Y-%m-%d"), "seed": run.args.seed,
               "adapter": asdict(run.adapter), "synth": asdict(run.synth), "distill": asdict(run.distill)}
    own.results.mkdir(parents=True, exist_ok=True)
    path = own.results / f"{own.sweep or 'compare'}-{run.args.task}"
    d4ir.write_text(path.with_suffix(".json"), json.dumps(result, indent=1))
    d4ir.write_text(path.with_suffix(".md"), table(result))
    if not own.sweep:
        picture(run, names, path.with_suffix(".png"))
    run.say(table(result) + f"\nwritten: {path}.json, .md" + ("" if own.sweep else ", .png"))


if __name__ == "__main__":
    d4ir.command(main)
