"""Restoration quality (PSNR, SSIM) and computational cost.

    PSNR = 10 log10(255^2 / MSE)                                            dB
    SSIM = mean of (2 mu_a mu_b + C1)(2 s_ab + C2) / ((mu_a^2 + mu_b^2 + C1)(s_a^2 + s_b^2 + C2)),
           Gaussian window 11x11, sigma 1.5, K1 0.01, K2 0.03, peak 255, valid region only
           (Wang et al. 2004)
    Y    = 16 + 65.481 R + 128.553 G + 24.966 B, R, G, B in [0,1]           BT.601, as in MATLAB

Outputs are first clamped and rounded to 8 bits, as in a saved PNG. Photos are evaluated at full
size; only a ground truth up to 32 px larger than its photo is centre-cropped. RGB: the MSE is over
all channels, SSIM is the mean over them. Y is computed from the rounded RGB and not rounded again.
A set's value is the mean over its photos. For the same outputs, PSNR of Y is typically 1.3 to 2 dB
higher than that of RGB.
"""
import csv
import json
import math
import os
import re
import statistics
import time
import weakref
from collections import Counter
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageOps
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import (FlopCounterMode, flop_registry, sdpa_backward_flop,
                                      sdpa_flop)
from torchvision.transforms.functional import center_crop, pil_to_tensor, resize, to_pil_image
from tqdm import tqdm

METRICS = ("psnr_rgb", "ssim_rgb", "psnr_y", "ssim_y")
COSTS = ("params", "gmacs", "ms", "peak_mb")
DEFINITIONS = ("PSNR in dB, peak 255; SSIM with an 11x11 Gaussian window, sigma 1.5, K1 0.01, "
               "K2 0.03, valid region; outputs rounded to 8 bits; whole photos; Y is BT.601 as in "
               "MATLAB (16..235) of the rounded RGB; means over photos")


# ---------------------------------------------------------------- metrics

def to_255(image):
    """(...,C,H,W) in [0,1] to [0,255], clamped. RGB is rounded, as in a saved PNG; luma (one
    channel) is not."""
    image = image.float().clamp(0, 1) * 255
    return image.round_() if image.shape[-3] == 3 else image


def rgb_to_y(image):
    """RGB (...,3,H,W) in [0,1] to luma (...,1,H,W) in [16/255, 235/255]: BT.601, as in MATLAB."""
    r, g, b = image.unbind(-3)
    return ((65.481 * r + 128.553 * g + 24.966 * b + 16) / 255).unsqueeze(-3)


def psnr(a, b):
    """PSNR in dB between two images (C,H,W) or (B,C,H,W) in [0,1], averaged over B; inf if they are
    equal. RGB is rounded to 8 bits; luma is not. Raises ValueError if the shapes differ."""
    a, b = check_images(a, b)
    mse = (to_255(a) - to_255(b)).square_().mean((1, 2, 3), dtype=torch.float64)            # (B,)
    return float((10 * torch.log10(255 ** 2 / mse)).mean())


def ssim(a, b):
    """SSIM (Wang et al. 2004) between two images (C,H,W) or (B,C,H,W) in [0,1], averaged over
    channels and B. RGB is rounded to 8 bits; luma is not. Raises ValueError if the shapes differ or
    a side is shorter than 11 px."""
    a, b = check_images(a, b)
    if min(a.shape[-2:]) < 11:
        raise ValueError(f"SSIM needs at least 11x11 px, not {tuple(a.shape[-2:])}")
    window = [math.exp(-i ** 2 / (2 * 1.5 ** 2)) for i in range(-5, 6)]
    window = [w / sum(window) for w in window]

    def blur(x):                                           # (B,1,H,W) to (B,1,H-10,W-10)
        for dim in (-2, -1):
            length = x.shape[dim] - 10
            x = sum(w * x.narrow(dim, i, length) for i, w in enumerate(window))
        return x

    c1, c2, values = (0.01 * 255) ** 2, (0.03 * 255) ** 2, []
    for x, y in zip(to_255(a).split(1, 1), to_255(b).split(1, 1)):         # by channel saves memory
        x, y = x.double(), y.double()                                       # (B,1,H,W)
        mx, my = blur(x), blur(y)
        vx, vy, cov = blur(x * x) - mx ** 2, blur(y * y) - my ** 2, blur(x * y) - mx * my
        values.append(float(((2 * mx * my + c1) * (2 * cov + c2)
                             / ((mx ** 2 + my ** 2 + c1) * (vx + vy + c2))).mean()))
    return statistics.fmean(values)


def check_images(a, b):
    """Two images of the same shape as (B,C,H,W). Raises ValueError for others, and for integers."""
    if a.shape != b.shape or a.dim() not in (3, 4):
        raise ValueError("expected two images of the same shape, (C,H,W) or (B,C,H,W), not "
                         f"{tuple(a.shape)} and {tuple(b.shape)}")
    if not (a.is_floating_point() and b.is_floating_point()):
        raise ValueError(f"images must be floats in [0,1], not {a.dtype} and {b.dtype}")
    return (a, b) if a.dim() == 4 else (a[None], b[None])


def measure(image, truth):
    """All four metrics of an image (3,H,W) in [0,1] against its ground truth, as a dict."""
    y, y_truth = rgb_to_y(to_255(image) / 255), rgb_to_y(to_255(truth) / 255)
    return dict(psnr_rgb=psnr(image, truth), ssim_rgb=ssim(image, truth),
                psnr_y=psnr(y, y_truth), ssim_y=ssim(y, y_truth))


def evaluate(model, pairs, *, tile=1024, label="evaluate"):
    """The metrics of a model in eval mode, averaged over a list of Pair; of the degraded photos if
    model is None. tile: see `restore`. label: of the progress bar.

    Returns {"psnr_rgb", "ssim_rgb", "psnr_y", "ssim_y", "n_images", "cropped", "images"}: means
    over the photos; how many ground truths were centre-cropped; set, file name and metrics of each
    photo. Raises ValueError if there are no pairs.
    """
    rows, cropped, device = [], 0, "cpu" if model is None else device_of(model)
    for pair in tqdm(pairs, label, disable=None):
        degraded, truth, was_cropped = pair.read()
        degraded, truth = degraded.to(device), truth.to(device)     # for the metrics, too
        output = degraded if model is None else restore(model, degraded, tile)
        rows.append({"set": pair.set, "image": pair.degraded.name} | measure(output, truth))
        cropped += was_cropped
    if not rows:
        raise ValueError("there are no pairs to evaluate")
    return means(rows) | {"n_images": len(rows), "cropped": cropped, "images": rows}


def means(rows):
    """The means of the four metrics over photos."""
    return {key: statistics.fmean(row[key] for row in rows) for key in METRICS}


# ---------------------------------------------------------------- restoring

@torch.no_grad()
def restore(model, image, tile=1024, overlap=64):
    """Runs a model in eval mode on one photo (3,H,W) in [0,1], in float32. Returns the output.

    tile: px; photos larger than this are restored in overlapping tiles, blended linearly; 0:
      never. overlap: px, at most a quarter of the tile.
    """
    device = device_of(model)

    def run(x):
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):    # no TF32, as on a CPU
            x = x[None].to(device, memory_format=torch.channels_last)
            return model(x)[0].float().clamp(0, 1).to(image.device)

    height, width = image.shape[-2:]
    if not tile or max(height, width) <= tile:
        return run(image)
    overlap = min(overlap, tile // 4)
    output, weight = torch.zeros_like(image), torch.zeros_like(image[:1])
    for top, bottom, fade_y in spans(height, tile, overlap):
        for left, right, fade_x in spans(width, tile, overlap):
            fade = (fade_y[:, None] * fade_x).to(image.device)              # (tile,tile)
            output[:, top:bottom, left:right] += run(image[:, top:bottom, left:right]) * fade
            weight[:, top:bottom, left:right] += fade
    return output.div_(weight)


def device_of(model):
    """The device of a model's weights; the CPU if it has none."""
    return next(chain(model.parameters(), model.buffers()), torch.empty(0)).device


def spans(length, tile, overlap):
    """(start, end, weights) of evenly spaced tiles that cover a length, px; the weights fade in and
    out linearly where two tiles overlap."""
    if length <= tile:
        return [(0, length, torch.ones(length))]
    count = math.ceil((length - overlap) / (tile - overlap))
    fade_in, whole = (torch.arange(1, tile + 1) / (overlap + 1)).clamp(max=1), torch.ones(tile)
    tiles = []
    for i in range(count):
        start = round(i * (length - tile) / (count - 1))
        left = fade_in if i > 0 else whole
        right = fade_in.flip(0) if i < count - 1 else whole
        tiles.append((start, start + tile, left * right))
    return tiles


def restore_folder(model, source, folder, tile=1024):
    """Restores a photo, or all photos below a folder, into `folder` as PNG files.

    Subfolders are kept: source/a/b.jpg becomes folder/a/b.png. If source/a also contains b.png, the
    outputs are b.jpg.png and b.png.png. Unreadable photos are skipped with a message, and photos
    below `folder` are ignored. Raises ValueError if there is no photo, none can be read, or one
    would be overwritten.
    """
    source, folder = Path(source), Path(folder)
    root = source if source.is_dir() else source.parent
    files = list_images(source, recursive=True) if source.is_dir() else [source]
    if source.resolve() in folder.resolve().parents:       # outputs of an earlier call
        files = [file for file in files if folder.resolve() not in file.resolve().parents]
    if not files:
        raise ValueError(f"{source}: no image file in it (png, jpg, bmp, webp, tif)")
    targets = [folder / file.relative_to(root).with_suffix(".png") for file in files]
    overwritten = {path.resolve() for path in targets} & {file.resolve() for file in files}
    if overwritten:
        raise ValueError(f"{overwritten.pop()} is one of the photos: choose another --output")
    uses, written = Counter(targets), 0
    for file, target in zip(tqdm(files, "restore", disable=None), targets):
        if uses[target] > 1:                               # b.jpg beside b.png
            target = target.with_name(f"{file.name}.png")
        try:
            photo = read_image(file)
        except ValueError as error:
            print(f"skipped: {error}", flush=True)
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        write_png(to_pil_image(to_255(restore(model, photo / 255, tile)).byte()), target)
        written += 1
    if not written:
        raise ValueError(f"{source}: none of its photos can be read")


# ---------------------------------------------------------------- cost

# torch's FLOP counter lacks the attention kernels of CPUs.
aten = torch.ops.aten
flop_registry[aten._scaled_dot_product_flash_attention_for_cpu] = sdpa_flop
flop_registry[aten._scaled_dot_product_flash_attention_for_cpu_backward] = sdpa_backward_flop


@torch.no_grad()
def cost(model, size=256, runs=5):
    """The cost of a model for one photo of size x size px, in float32, on the model's device.

    Returns {"params", "gmacs", "ms", "peak_mb"}: parameters; 1e9 multiply-adds of all convolutions,
    matrix products and attention; median milliseconds; peak MB of weights and activations, without
    the temporary memory of libraries such as cuDNN.
    """
    x = torch.rand(1, 3, size, size, device=device_of(model))
    x = x.contiguous(memory_format=torch.channels_last)
    flops, times = FlopCounterMode(display=False), []
    memory = LiveTensors([x, *model.parameters(), *model.buffers()])
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        with flops, memory:
            model(x)
        for _ in range(runs):
            start = synchronized_clock(x.device)
            model(x)
            times.append(1000 * (synchronized_clock(x.device) - start))
    return dict(params=sum(p.numel() for p in model.parameters()),
                gmacs=flops.get_total_flops() / 2e9, ms=statistics.median(times),
                peak_mb=memory.peak / 2 ** 20)


def synchronized_clock(device):
    """The time in seconds, after a GPU has finished its pending work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


class LiveTensors(TorchDispatchMode):
    """Tracks the bytes of live tensors: the given ones and all that operators return inside the
    block. `peak` is the maximum."""

    def __init__(self, tensors):
        super().__init__()
        self.sizes = weakref.WeakKeyDictionary()           # {storage: bytes}, of live storages only
        self.peak = 0
        self.add(tensors)

    def add(self, tensors):
        for tensor in tensors:
            storage = tensor.untyped_storage()             # views share it
            self.sizes[storage] = storage.nbytes()
        self.peak = max(self.peak, sum(self.sizes.values()))

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        self.add([leaf for leaf in tree_leaves(output) if torch.is_tensor(leaf)])
        return output


# ---------------------------------------------------------------- photos and paired folders

EXTENSIONS = {".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff"}
DEGRADED = {"input", "rainy", "rain", "hazy", "in", "synthetic", "snow", "lq", "degraded"}
TRUTH = {"target", "norain", "clear", "gt"}
# From the name of a degraded photo to that of its ground truth, without extensions.
RULES = (lambda stem: stem,                                # the same name
         lambda stem: "no" + stem,                         # rain-001 to norain-001 (Rain100L)
         lambda stem: stem.split("_")[0])                  # 0001_0.8_0.2 to 0001 (SOTS)


def read_image(path):
    """A photo (grey, palette, transparent, 16-bit, CMYK, rotated by its EXIF) as (3,H,W) uint8 RGB.
    Raises ValueError, with the file's name, if it cannot be read."""
    try:
        with Image.open(path) as image:
            image = ImageOps.exif_transpose(image)
            if image.mode.startswith(("I", "F")):          # grey: 16 bits, or floats in [0,1]
                scale = 255 if image.mode == "F" else 1 / 257
                image = np.asarray(image, np.float64) * scale
                image = Image.fromarray(image.round().clip(0, 255).astype(np.uint8))
            return pil_to_tensor(image.convert("RGB"))
    except Exception as error:                             # Pillow raises many exception types
        reason = " ".join(str(error).split())
        raise ValueError(f"{path}: not a readable image ({reason})") from None


def list_images(folder, recursive=False):
    """The image files in a folder in natural order (2.png before 10.png), without hidden files and
    folders."""
    images, visited = [], set()
    for path, subfolders, names in os.walk(folder, followlinks=True):
        if os.path.realpath(path) in visited:              # already, through a symlink
            subfolders.clear()
            continue
        visited.add(os.path.realpath(path))
        subfolders[:] = [name for name in subfolders if recursive and not name.startswith(".")]
        images += [Path(path, name) for name in names if not name.startswith(".")
                   and os.path.splitext(name)[1].lower() in EXTENSIONS]
    natural = lambda path: [int(part) if part.isdecimal() else part
                            for part in re.split(r"(\d+)", str(path))]
    return sorted(sorted(images), key=natural)             # 01.png always before 1.png


@dataclass
class Pair:
    """A degraded photo, its ground truth, and the name of the set that they belong to."""
    degraded: Path
    truth: Path
    set: str

    def read(self):
        """Returns both photos, (3,H,W) in [0,1], and whether the truth was centre-cropped. Raises
        ValueError if the truth is smaller or more than 32 px larger than the degraded photo."""
        degraded, truth = read_image(self.degraded), read_image(self.truth)
        height, width = degraded.shape[1:]
        extra = truth.shape[1] - height, truth.shape[2] - width
        if min(extra) < 0 or max(extra) > 32:
            raise ValueError(f"{self.degraded} is {(height, width)} px, but its ground truth "
                             f"{self.truth} is {tuple(truth.shape[1:])}")
        return degraded / 255, center_crop(truth, [height, width]) / 255, max(extra) > 0


def find_pairs(folder):
    """The pairs of a benchmark in any of the usual layouts (see DEGRADED, TRUTH and RULES).

    folder: the benchmark's root, or the folder of its degraded photos or of its ground truths.
    Returns a list of Pair, of all sets at most three levels below the root; an empty list if the
    photos have no ground truth. Raises ValueError, with the names, if there are no photos, if it is
    ambiguous which folders or files belong together, or if a photo has no partner.
    """
    folder = Path(os.path.abspath(folder))
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder")
    sets = find_sets(folder, depth=3)
    if not sets and folder.name.lower() in DEGRADED | TRUTH:
        sets = find_sets(folder.parent, depth=0)
    if not sets and not list_images(folder, recursive=True):
        raise ValueError(f"{folder}: no image file in it or below it")
    pairs = []
    for degraded, truth in sets:
        root = degraded.parent
        name = root.relative_to(folder).as_posix() if folder in root.parents else root.name
        pairs += match_files(degraded, truth, name)
    return pairs


def find_sets(folder, depth):
    """[(degraded folder, truth folder)] of the sets in a folder or at most `depth` levels below."""
    subfolders = sorted(path for path in folder.iterdir()
                        if path.is_dir() and not path.name.startswith("."))
    degraded = [p for p in subfolders if p.name.lower() in DEGRADED and list_images(p)]
    truth = [p for p in subfolders if p.name.lower() in TRUTH and list_images(p)]
    if not truth and any(path.stem.startswith("norain") for path in list_images(folder)):
        truth = [folder]                                   # Rain100L's archive: one level up
    if degraded and truth and len(degraded + truth) > 2:
        raise ValueError(f"{folder}: ambiguous layout; degraded: "
                         f"{', '.join(p.name for p in degraded)}; truth: "
                         f"{', '.join(p.name for p in truth)}")
    if degraded and truth or depth == 0:
        return list(zip(degraded, truth))
    return [pair for path in subfolders for pair in find_sets(path, depth - 1)]


def match_files(degraded, truth, name):
    """Pairs the files of two folders by the one rule of RULES that fits them all; never by their
    order. Raises ValueError, with names, if a file has no partner or two truths share a name."""
    inputs, truths = list_images(degraded), {}
    for path in list_images(truth):
        if truth == degraded.parent and not path.stem.startswith("norain"):
            continue
        if path.stem in truths:
            raise ValueError(f"{truth}: {truths[path.stem].name} and {path.name} share a name: "
                             "ambiguous ground truth")
        truths[path.stem] = path
    unmatched = {rule: [p.name for p in inputs if rule(p.stem) not in truths] for rule in RULES}
    rule = min(RULES, key=lambda rule: len(unmatched[rule]))
    unused = truths.keys() - {rule(path.stem) for path in inputs}
    if unmatched[rule] or unused:
        unused = sorted(truths[stem].name for stem in unused)
        raise ValueError(f"{degraded} and {truth}: degraded photos without ground truth: "
                         f"{abbreviate(unmatched[rule])}; ground truths without a degraded photo: "
                         f"{abbreviate(unused)}")
    return [Pair(path, truths[rule(path.stem)], name) for path in inputs]


def abbreviate(names):
    """The first five names, and how many there are."""
    return f"{', '.join(names[:5])}{' ...' if len(names) > 5 else ''} ({len(names)})"


# ---------------------------------------------------------------- reports

def report(models, results):
    """The body of metrics.json.

    models: {name: module}, with None for "input"; "teacher" and "student" are needed.
    results: {name: what `evaluate` returned} for the same names, over the same pairs.
    """
    costs = {name: cost(model) for name, model in models.items() if model is not None}
    sets = {name: by_set(result["images"]) for name, result in results.items()}
    metrics = {"test_set": " + ".join(sets["input"]), "n_images": results["input"]["n_images"]}
    for name, result in results.items():
        metrics[name] = {key: result[key] for key in METRICS} | costs.get(name, {})
    metrics["ratio"] = {key: costs["teacher"][key] / costs["student"][key] for key in COSTS}
    if len(sets["input"]) > 1:
        metrics["sets"] = {
            title: {"n_images": len(rows)} | {name: means(sets[name][title]) for name in sets}
            for title, rows in sets["input"].items()}
    metrics["definitions"] = DEFINITIONS
    metrics["cost_at"] = f"256x256, batch 1, float32, on {device_of(models['student']).type}"
    cropped = results["input"]["cropped"]
    if cropped:
        metrics["note"] = f"The truths of {cropped} photos were larger and were centre-cropped."
    return metrics


def by_set(rows):
    """{name of a test set: its rows} of the metrics of photos, as `evaluate` returns them."""
    sets = {}
    for row in rows:
        sets.setdefault(row["set"], []).append(row)
    return sets


def table(metrics):
    """The dict of metrics.json as a Markdown page."""
    lines = [f"# {metrics['task']}: {metrics['test_set']} ({metrics['n_images']} photos)", "",
             "| | PSNR RGB | SSIM RGB | PSNR Y | SSIM Y | params | GMACs | ms | peak MB |",
             "|---|---|---|---|---|---|---|---|---|"]
    parts = {"": metrics}
    for name, part in metrics.get("sets", {}).items():
        parts[f"{name} ({part['n_images']}): "] = part
    formats = dict(zip(METRICS + COSTS, (".2f", ".4f", ".2f", ".4f", ",", ".2f", ".1f", ".0f")))
    for prefix, part in parts.items():
        for name in ("input", "teacher", "student"):
            values = part[name]
            cells = [f"{values[key]:{form}}" if key in values else ""
                     for key, form in formats.items()]
            lines.append(f"| {prefix}{name} | {' | '.join(cells)} |")
    ratio = " | ".join(f"{metrics['ratio'][key]:.1f}x" for key in COSTS)
    lines += [f"| teacher / student | | | | | {ratio} |", "",
              f"{metrics['definitions']}. Cost at {metrics['cost_at']}. {metrics.get('note', '')}"]
    return "\n".join(lines).rstrip() + "\n"


def write_csv(results, path):
    """Writes one row per photo: set, file name, and each model's four metrics.

    results: {name: what `evaluate` returned}, over the same pairs.
    """
    with open(f"{path}.tmp", "w", newline="", encoding="utf-8", errors="backslashreplace") as file:
        writer = csv.writer(file)
        writer.writerow(["set", "image"] + [f"{name}_{key}" for name in results for key in METRICS])
        for rows in zip(*(result["images"] for result in results.values())):
            writer.writerow([rows[0]["set"], rows[0]["image"]]
                            + [f"{row[key]:.5f}" for row in rows for key in METRICS])
    os.replace(f"{path}.tmp", path)


# ---------------------------------------------------------------- figures and files

def comparison_figure(models, pairs, path, tile=1024):
    """Writes a PNG of up to six photos spread over the set, one row each: a column for each of
    models {name: module, or None for the degraded photo} and one for the ground truth."""
    columns = {name: [] for name in [*models, "ground truth"]}
    for i in sorted({i * (len(pairs) - 1) // 5 for i in range(6)}):
        degraded, truth, _ = pairs[i].read()
        images = {"ground truth": truth}
        for name, model in models.items():
            images[name] = degraded if model is None else restore(model, degraded, tile)
        for name, image in images.items():
            large = max(image.shape) > 512                 # saves memory
            columns[name].append(resize(image, 256) if large else image)
    figure(columns, path)


def figure(columns, path, side=256):
    """Writes a PNG with one column per entry of {title: [images (3,H,W) in [0,1]]}; each image is
    scaled to fit into side x side px."""
    def fit(image):
        picture = to_pil_image(to_255(image).byte())
        sharp = max(picture.size) <= side                  # keeps pixels visible
        return ImageOps.contain(picture, (side, side), Image.NEAREST if sharp else Image.BOX)

    rows = [[fit(image) for image in row] for row in zip(*columns.values())]
    heights = [4 + max(picture.height for picture in row) for row in rows]
    sheet = Image.new("RGB", ((side + 4) * len(columns), 18 + sum(heights)), "white")
    for c, title in enumerate(columns):
        left, top = c * (side + 4), 18
        ImageDraw.Draw(sheet).text((left, 3), title, fill="black")
        for row, height in zip(rows, heights):
            sheet.paste(row[c], (left, top))
            top += height
    write_png(sheet, path)


def plot_losses(log, path):
    """Writes a PNG with one panel per stage and loss of a log.jsonl: the loss over the steps.

    log: a file with one JSON object per line: {"stage", "step", "steps_per_s", and the losses}. If
    steps are repeated, after a resume or a restart, later records take precedence. Writes nothing
    if there is no loss.
    """
    curves = {}                                            # {title: {step: loss}}
    for line in Path(log).read_text(encoding="utf-8").splitlines():
        try:
            record = json.loads(line)
        except ValueError:                                 # cut off when the run was killed
            continue
        step, stage = record.pop("step"), record.pop("stage")
        del record["steps_per_s"]
        for name, value in record.items():
            title = f"{stage}: {name}"
            earlier = {s: v for s, v in curves.get(title, {}).items() if s < step}
            if math.isfinite(value):
                curves[title] = earlier | {step: value}
    if not curves:
        return
    sheet = Image.new("RGB", (300 * len(curves), 200), "white")
    draw = ImageDraw.Draw(sheet)
    for i, (title, curve) in enumerate(curves.items()):
        left, top, right, bottom = 300 * i + 60, 25, 300 * i + 285, 175
        steps, values = list(curve), list(curve.values())  # steps are in ascending order
        first, last, low, high = steps[0], steps[-1], min(values), max(values)
        x = np.interp(steps, (first, last), (left, right))
        y = np.interp(values, (low, high), (bottom, top))
        draw.rectangle((left, top, right, bottom), outline="gray")
        draw.line(list(zip(x, y)), fill="blue")
        draw.text((left, 8), title, fill="black")
        draw.text((left - 4, top), f"{high:.3g}", fill="black", anchor="rt")
        draw.text((left - 4, bottom), f"{low:.3g}", fill="black", anchor="rb")
        draw.text((left, bottom + 5), f"step {first}", fill="black", anchor="lt")
        draw.text((right, bottom + 5), f"{last}", fill="black", anchor="rt")
    write_png(sheet, path)


def write_png(picture, path):
    """Writes a PIL picture as a PNG file, under a temporary name first: no file is incomplete."""
    picture.save(f"{path}.tmp", "PNG")
    os.replace(f"{path}.tmp", path)
