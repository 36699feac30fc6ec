"""How good a restorer is, in figures that can be compared, and what it costs.

    PSNR = 10 log10(255^2 / MSE)                                            dB
    SSIM = mean of (2 mu_a mu_b + C1)(2 s_ab + C2) / ((mu_a^2 + mu_b^2 + C1)(s_a^2 + s_b^2 + C2)),
           Gaussian window 11x11, sigma 1.5, K1 0.01, K2 0.03, peak 255, valid region only
           (Wang et al. 2004)
    Y    = 16 + 65.481 R + 128.553 G + 24.966 B, R, G, B in [0,1]           BT.601, as in MATLAB

Outputs are clamped and rounded to 8 bits first, as a saved PNG would be. Whole photos: nothing is
cropped or resized. RGB: the mean over the channels. Y: of the rounded RGB, not rounded again. A
set's figure is the mean over its photos. RGB and Y differ by 1.5 to 2 dB for the same outputs.
"""
import os
import re
import statistics
import time
import weakref
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageOps
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count
from torchvision.transforms.functional import center_crop, pil_to_tensor, to_pil_image
from tqdm import tqdm

METRICS = ("psnr_rgb", "ssim_rgb", "psnr_y", "ssim_y")
COSTS = ("params", "gmacs", "ms", "peak_mb")
DEFINITIONS = ("PSNR in dB, peak 255; SSIM with an 11x11 Gaussian window, sigma 1.5, K1 0.01, "
               "K2 0.03, valid region; outputs rounded to 8 bits; whole photos; Y is BT.601 as in "
               "MATLAB (16..235) of the rounded RGB; means over photos")
ENDINGS = {".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff"}


# ---------------------------------------------------------------- metrics

def levels(image):
    """(...,C,H,W) in [0,1] to 0..255, clamped. RGB is rounded, as a saved PNG would be; one
    channel, luma, is not."""
    image = image.float().clamp(0, 1) * 255
    return image.round_() if image.shape[-3] == 3 else image


def rgb_to_y(image):
    """RGB (...,3,H,W) in [0,1] to luma (...,1,H,W) in [16/255, 235/255]: BT.601, as in MATLAB."""
    r, g, b = image.unbind(-3)
    return ((65.481 * r + 128.553 * g + 24.966 * b + 16) / 255).unsqueeze(-3)


def psnr(a, b):
    """PSNR in dB between (B,C,H,W) or (C,H,W) in [0,1], as a float: the mean over the B photos;
    inf for equal ones. RGB is rounded to 8 bits, luma is not. Raises ValueError for two shapes."""
    a, b = comparable(a, b)
    mse = (levels(a) - levels(b)).square_().mean((1, 2, 3), dtype=torch.float64)
    return float((10 * torch.log10(255 ** 2 / mse)).mean())


def ssim(a, b):
    """SSIM (Wang et al. 2004) between (B,C,H,W) or (C,H,W) in [0,1], as a float: the mean over
    channels and photos. RGB is rounded to 8 bits, luma is not. Raises ValueError for two shapes,
    or fewer than 11 px."""
    a, b = comparable(a, b)
    if min(a.shape[-2:]) < 11:
        raise ValueError(f"SSIM needs at least 11x11 px, not {tuple(a.shape[-2:])}")
    ramp = torch.arange(-5, 6, dtype=torch.float64, device=a.device)
    window = torch.exp(-ramp ** 2 / (2 * 1.5 ** 2))
    window = (window / window.sum()).view(1, 1, 1, 11)
    blur = lambda x: F.conv2d(F.conv2d(x, window), window.mT)               # (B,1,H-10,W-10)
    c1, c2, total, band = (0.01 * 255) ** 2, (0.03 * 255) ** 2, 0.0, 512
    for y in range(0, a.shape[-2] - 10, band):                              # in bands: memory
        bands = [levels(x[..., y:y + band + 10, :]).double().split(1, dim=1) for x in (a, b)]
        for u, v in zip(*bands):                                            # (B,1,band+10,W)
            mu, mv = blur(u), blur(v)
            su, sv, suv = blur(u * u) - mu ** 2, blur(v * v) - mv ** 2, blur(u * v) - mu * mv
            total += float(((2 * mu * mv + c1) * (2 * suv + c2)
                            / ((mu ** 2 + mv ** 2 + c1) * (su + sv + c2))).sum())
    return total / (a.shape[0] * a.shape[1] * (a.shape[2] - 10) * (a.shape[3] - 10))


def comparable(a, b):
    if a.shape != b.shape or a.dim() not in (3, 4):
        raise ValueError("two images of one shape, (C,H,W) or (B,C,H,W), are needed, not "
                         f"{tuple(a.shape)} and {tuple(b.shape)}")
    return (x.unsqueeze(0) if x.dim() == 3 else x for x in (a, b))


def measure(image, truth):
    """All four metrics of (3,H,W) in [0,1] against its ground truth."""
    y, y_truth = rgb_to_y(levels(image) / 255), rgb_to_y(levels(truth) / 255)
    values = psnr(image, truth), ssim(image, truth), psnr(y, y_truth), ssim(y, y_truth)
    return dict(zip(METRICS, values))


# ---------------------------------------------------------------- photos and paired folders

def read_image(path):
    """A photo (grey, palette, transparent, 16-bit, CMYK, turned by its EXIF) as (3,H,W) uint8 RGB.
    Raises ValueError with the file's name where it can't be read."""
    try:
        with Image.open(path) as image:
            image = ImageOps.exif_transpose(image)
            if image.mode.startswith(("I", "F")):          # grey, 16 bits or floats in [0,1]
                scale = 255 if image.mode == "F" else 1 / 257
                image = np.asarray(image, np.float64) * scale
                image = Image.fromarray(image.round().clip(0, 255).astype(np.uint8))
            return pil_to_tensor(image.convert("RGB"))
    except Exception as error:                             # its bytes are anyone's
        reason = " ".join(str(error).split())
        raise ValueError(f"{path}: not a readable image ({reason})") from None


def list_images(folder, recursive=False):
    """The image files in a folder, 2.png before 10.png; hidden files and folders are left out."""
    files = Path(folder).rglob("*") if recursive else Path(folder).iterdir()
    natural = lambda p: [int(s) if s.isdigit() else s for s in re.split(r"(\d+)", str(p))]
    hidden = lambda p: any(part[0] == "." for part in p.relative_to(folder).parts)
    return sorted((p for p in files if p.suffix.lower() in ENDINGS and p.is_file()
                   and not hidden(p)), key=natural)


@dataclass
class Pair:
    """A degraded photo, its ground truth, and the name of the set that they belong to."""
    degraded: Path
    truth: Path
    set: str

    def read(self):
        """Both, (3,H,W) in [0,1], and whether the truth, a few px larger, was centre-cropped."""
        degraded, truth = read_image(self.degraded), read_image(self.truth)
        more = [t - d for t, d in zip(truth.shape[1:], degraded.shape[1:])]
        if min(more) < 0 or max(more) > 32:
            raise ValueError(f"{self.degraded} is {tuple(degraded.shape[1:])} px and its truth "
                             f"{self.truth} {tuple(truth.shape[1:])}")
        return degraded / 255, center_crop(truth, degraded.shape[1:]) / 255, max(more) > 0


DEGRADED = {"input", "rainy", "rain", "hazy", "in", "synthetic", "snow", "lq", "degraded"}
TRUTH = {"target", "norain", "clear", "gt"}
RULES = {"same name": lambda name: name, "rain-N to norain-N": lambda name: "no" + name,
         "id before the first _": lambda name: name.split("_")[0]}


def find_pairs(folder):
    """The pairs of a benchmark in any of the layouts that people have (README), from its root or a
    folder in it.

    Returns a list of Pair: of all sets below the root, each under its name; none for a folder of
    photos that no ground truth lies beside. Raises ValueError, with the names, where there is
    nothing, more than one way to take it, or a photo without partner.
    """
    folder = Path(os.path.abspath(folder))
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder")
    sets = sets_below(folder, 3)
    if not sets and folder.name.lower() in DEGRADED | TRUTH:
        sets = sets_below(folder.parent, 0)
    if not sets and not list_images(folder, recursive=True):
        raise ValueError(f"{folder}: no image file in it, nor in folders in it")
    names = [os.path.relpath(os.path.commonpath(pair), folder) for pair in sets]
    names = [name if name[0] != "." else Path(os.path.commonpath(pair)).name
             for name, pair in zip(names, sets)]
    return [pair for name, (degraded, truth) in zip(names, sets)
            for pair in match(degraded, truth, Path(name).as_posix())]


def sets_below(folder, deep):
    """The sets [(degraded folder, truth folder)] in a folder, or else in the folders in it."""
    inside = sorted(p for p in folder.iterdir() if p.is_dir() and p.name[0] != ".")
    degraded, truth = ([p for p in inside if p.name.lower() in names and list_images(p)]
                       for names in (DEGRADED, TRUTH))
    if not truth and any(p.stem.startswith("norain") for p in list_images(folder)):
        truth = [folder]                                   # PReNet's Rain100L: one level up
    if not (degraded and truth):
        return [found for p in inside for found in sets_below(p, deep - 1)] if deep else []
    if len(degraded) > 1 or len(truth) > 1:
        both = (", ".join(p.name for p in part) for part in (degraded, truth))
        raise ValueError(f"{folder}: which belong together? degraded: {'; truth: '.join(both)}")
    return [(degraded[0], truth[0])]


def match(degraded, truth, name):
    """Pairs the files of two folders by the one rule that fits them all; never by their order."""
    inputs, by_stem = list_images(degraded), {}
    for p in list_images(truth):
        if truth != degraded.parent or p.stem.startswith("norain"):
            if p.stem in by_stem:
                raise ValueError(f"{truth}: {by_stem[p.stem].name} and {p.name} could each be it")
            by_stem[p.stem] = p
    alone = {rule: [p.name for p in inputs if key(p.stem) not in by_stem]
             for rule, key in RULES.items()}
    rule = min(RULES, key=lambda r: len(alone[r]))
    left = by_stem.keys() - {RULES[rule](p.stem) for p in inputs}
    if alone[rule] or left:
        some = lambda names: f"{', '.join(names[:5])}{' ...' * (len(names) > 5)} ({len(names)})"
        raise ValueError(f"{degraded} and {truth}: degraded photos without truth: "
                         f"{some(alone[rule])}; truths without degraded photo: "
                         f"{some(sorted(by_stem[stem].name for stem in left))}")
    return [Pair(p, by_stem[RULES[rule](p.stem)], name) for p in inputs]


# ---------------------------------------------------------------- restoring

@torch.no_grad()
def restore(model, image, tile=1024, overlap=64):
    """model on one photo (3,H,W) in [0,1], in float32; returns (3,H,W) in [0,1].

    A photo of more than `tile` px on a side is restored in tiles that overlap and fade into one
    another; 0: never.
    """
    device = next(model.parameters()).device

    def run(x):
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            x = x[None].to(device, memory_format=torch.channels_last)
            return model(x)[0].float().clamp(0, 1).to(image.device)

    height, width = image.shape[-2:]
    if not tile or max(height, width) <= tile:
        return run(image)
    output, weight = torch.zeros_like(image), torch.zeros_like(image[:1])
    for y0, y1, fade_y in spans(height, tile, min(overlap, tile // 4)):
        for x0, x1, fade_x in spans(width, tile, min(overlap, tile // 4)):
            fade = (fade_y[:, None] * fade_x).to(image.device)
            output[:, y0:y1, x0:x1] += run(image[:, y0:y1, x0:x1]) * fade
            weight[:, y0:y1, x0:x1] += fade
    return output.div_(weight)


def spans(length, tile, overlap):
    """(start, end, weights) of evenly laid tiles that cover a length; where two overlap, linear
    fades."""
    if length <= tile:
        return [(0, length, torch.ones(length))]
    count = -(-(length - overlap) // (tile - overlap))
    starts = [round(i * (length - tile) / (count - 1)) for i in range(count)]
    rise = (torch.arange(1, tile + 1) / (overlap + 1)).clamp(max=1)
    whole = torch.ones(tile)
    return [(s, s + tile, (rise if s else whole) * (rise.flip(0) if s + tile < length else whole))
            for s in starts]


# ---------------------------------------------------------------- evaluating

def evaluate(model, pairs, *, tile=1024, label="evaluate"):
    """The metrics of a model over pairs; of the degraded photos themselves where it is None.

    pairs: list of Pair, or of (degraded, truth) tensors (3,H,W) in [0,1].
    Returns {"psnr_rgb", "ssim_rgb", "psnr_y", "ssim_y", "n_images", "cropped", "images"}: means
    over the photos; truths that were centre-cropped; the metrics of each photo.
    Raises ValueError for no pairs.
    """
    rows, cropped = [], 0
    for pair in tqdm(pairs, label, disable=None):
        degraded, truth, cut = pair.read() if isinstance(pair, Pair) else (*pair, False)
        rows.append(measure(degraded if model is None else restore(model, degraded, tile), truth))
        cropped += cut
    if not rows:
        raise ValueError("there are no pairs to evaluate")
    return means(rows) | {"n_images": len(rows), "cropped": cropped, "images": rows}


def means(rows):
    """The means of the four metrics over photos."""
    return {key: statistics.fmean(row[key] for row in rows) for key in METRICS}


@torch.no_grad()
def cost(model, size=256, runs=5):
    """What a model costs at size x size, batch 1, float32, on the device that it is on.

    Returns {"params", "gmacs", "ms", "peak_mb"}: parameters; 1e9 multiply-adds of all convolutions,
    matrix products and attention; median milliseconds; peak MB of weights and activations.
    """
    x, times = torch.rand(1, 3, size, size, device=next(model.parameters()).device), []
    x = x.contiguous(memory_format=torch.channels_last)
    own = sum(t.numel() * t.element_size() for t in [x, *model.parameters(), *model.buffers()])
    wait = torch.cuda.synchronize if x.is_cuda else lambda: None
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        fused = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu:       # not in torch's
                 lambda q, k, v, *others, **named: sdpa_flop_count(q, k, v)}       # own list
        with FlopCounterMode(display=False, custom_mapping=fused) as flops, LiveBytes() as live:
            model(x)
        if x.is_cuda:
            torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated() if x.is_cuda else 0
        for _ in range(runs):
            wait()
            start = time.perf_counter()
            model(x)
            wait()
            times.append(1000 * (time.perf_counter() - start))
    peak = own + (torch.cuda.max_memory_allocated() - before if x.is_cuda else live.peak)
    values = (sum(p.numel() for p in model.parameters()), flops.get_total_flops() / 2e9,
              statistics.median(times), peak / 2 ** 20)
    return dict(zip(COSTS, values))


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the tensors made within it that are alive, and their peak."""

    def __init__(self):
        super().__init__()
        self.now, self.peak, self.seen = 0, 0, weakref.WeakSet()

    def free(self, size):
        self.now -= size

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        for leaf in tree_leaves((args, kwargs)):           # what was there before doesn't count
            if torch.is_tensor(leaf):
                self.seen.add(leaf.untyped_storage())
        output = function(*args, **(kwargs or {}))
        for storage in (x.untyped_storage() for x in tree_leaves(output) if torch.is_tensor(x)):
            if storage not in self.seen:
                self.seen.add(storage)
                self.now += storage.nbytes()
                weakref.finalize(storage, self.free, storage.nbytes())
        self.peak = max(self.peak, self.now)
        return output


# ---------------------------------------------------------------- reports

def report(models, found, pairs):
    """The body of metrics.json: models {who: module, or None for the input}, found {who: what
    `evaluate` returned}, over a list of Pair."""
    sets = list(dict.fromkeys(pair.set for pair in pairs))
    price = {who: cost(model) for who, model in models.items() if model is not None}
    metrics = {"test_set": " + ".join(sets), "n_images": len(pairs)}
    for who, result in found.items():
        metrics[who] = {key: result[key] for key in METRICS} | price.get(who, {})
    metrics["ratio"] = {key: price["teacher"][key] / price["student"][key] for key in COSTS}
    if len(sets) > 1:
        metrics["sets"] = {}
    for name in sets if len(sets) > 1 else ():
        chosen = [i for i, pair in enumerate(pairs) if pair.set == name]
        metrics["sets"][name] = {"n_images": len(chosen)} | {
            who: means([result["images"][i] for i in chosen]) for who, result in found.items()}
    device = next(models["student"].parameters()).device.type
    metrics |= {"definitions": DEFINITIONS, "cost_at": f"256x256, batch 1, float32, on {device}"}
    if cropped := found["input"]["cropped"]:
        metrics["note"] = f"The truths of {cropped} photos were larger and were centre-cropped."
    return metrics


def table(metrics):
    """The dict of metrics.json as a Markdown page."""
    lines = [f"# {metrics['task']}: {metrics['test_set']} ({metrics['n_images']} photos)", "",
             "| | PSNR RGB | SSIM RGB | PSNR Y | SSIM Y | params | GMACs | ms | peak MB |",
             "|---|---|---|---|---|---|---|---|---|"]
    parts = {f"{name} ({m['n_images']}): ": m for name, m in metrics.get("sets", {}).items()}
    for prefix, part in ({"": metrics} | parts).items():
        for who in ("input", "teacher", "student"):
            m = part[who]
            price = [f"{m[k]:{form}}" if k in m else ""
                     for k, form in zip(COSTS, (",", ".2f", ".1f", ".0f"))]
            values = [f"{m['psnr_rgb']:.2f}", f"{m['ssim_rgb']:.4f}", f"{m['psnr_y']:.2f}",
                      f"{m['ssim_y']:.4f}", *price]
            lines.append(f"| {prefix}{who} | {' | '.join(values)} |")
    ratio = " | ".join(f"{metrics['ratio'][key]:.1f}x" for key in COSTS)
    notes = metrics["definitions"], f"Cost at {metrics['cost_at']}", metrics.get("note", "")
    lines += [f"| teacher / student | | | | | {ratio} |", "", ". ".join(notes).rstrip(". ") + "."]
    return "\n".join(lines) + "\n"


def figure(columns, path, side=256):
    """Writes a PNG with a titled column for each {title: pictures (3,H,W) in [0,1]}, fitted to
    `side` px."""
    fit = lambda x: ImageOps.contain(to_pil_image(levels(x).byte().cpu()), (side, side),
                                     Image.NEAREST)
    rows = [[fit(image) for image in row] for row in zip(*columns.values())]
    heights = [4 + max(image.height for image in row) for row in rows]
    sheet = Image.new("RGB", ((side + 4) * len(columns), 18 + sum(heights)), "white")
    for c, title in enumerate(columns):
        ImageDraw.Draw(sheet).text((c * (side + 4), 3), title, fill="black")
        for r, row in enumerate(rows):
            sheet.paste(row[c], (c * (side + 4), 18 + sum(heights[:r])))
    sheet.save(f"{path}.tmp", "PNG")
    os.replace(f"{path}.tmp", path)
