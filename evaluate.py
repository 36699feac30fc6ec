"""How good a restorer is, in figures that can be compared, and what it costs.

    PSNR = 10 log10(255^2 / MSE)                                    dB
    SSIM = mean of (2 mu_a mu_b + C1)(2 s_ab + C2) / ((mu_a^2 + mu_b^2 + C1)(s_a^2 + s_b^2 + C2))
           Gaussian window 11x11, sigma 1.5, K1 0.01, K2 0.03, peak 255, valid region only (Wang et al. 2004)
    Y    = 16 + 65.481 R + 128.553 G + 24.966 B                     BT.601, as MATLAB's rgb2ycbcr

Outputs are clamped and rounded to 8 bits first, as a saved PNG would be. Whole photos: nothing is cropped or resized.
RGB: the MSE, or the SSIM, as the mean over the three channels. Y: of the rounded RGB, not rounded again. A set's
figure is the mean over its photos. RGB and Y differ by about 2 dB for the same outputs: never compare one with the other.
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
from torch.utils.flop_counter import FlopCounterMode
from torchvision.transforms.functional import center_crop, pil_to_tensor, to_pil_image
from tqdm import tqdm

DEFINITIONS = ("PSNR in dB, peak 255; SSIM with an 11x11 Gaussian window, sigma 1.5, K1 0.01, K2 0.03, valid region; outputs "
               "rounded to 8 bits; whole photos; Y is BT.601 as in MATLAB (16..235) of the rounded RGB; means over photos")
METRICS = ("psnr_rgb", "ssim_rgb", "psnr_y", "ssim_y")
ENDINGS = {".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff"}


# ---------------------------------------------------------------- metrics

def as_png(image):
    """RGB (...,3,H,W) in [0,1] clamped and rounded to 8 bits, as a saved PNG would be, in float64. One channel, which is
    luma, is only clamped."""
    image = image.double().clamp(0, 1)
    return (image * 255).round() / 255 if image.shape[-3] == 3 else image


def rgb_to_y(image):
    """RGB (...,3,H,W) in [0,1] to luma (...,1,H,W) in [16/255, 235/255]: BT.601, as MATLAB's rgb2ycbcr."""
    r, g, b = image.unbind(-3)
    return ((65.481 * r + 128.553 * g + 24.966 * b + 16) / 255).unsqueeze(-3)


def psnr(a, b):
    """PSNR in dB between (B,C,H,W) or (C,H,W) in [0,1], as a float: the mean over the B photos; inf for equal ones.

    RGB is rounded to 8 bits first, luma is not. Raises ValueError where the shapes differ.
    """
    a, b = comparable(a, b)
    mse = (as_png(a) - as_png(b)).square().mean((1, 2, 3))
    return float((-10 * torch.log10(mse)).mean())


def ssim(a, b):
    """SSIM (Wang et al. 2004) between (B,C,H,W) or (C,H,W) in [0,1], as a float: the mean over channels and photos.

    RGB is rounded to 8 bits first, luma is not. Raises ValueError where the shapes differ or are under 11 px.
    """
    a, b = comparable(a, b)
    if min(a.shape[-2:]) < 11:
        raise ValueError(f"SSIM needs at least 11x11 px, not {tuple(a.shape[-2:])}")
    a, b = (as_png(x) * 255 for x in (a, b))
    ramp = torch.arange(-5, 6, dtype=torch.float64, device=a.device)
    window = torch.exp(-ramp ** 2 / (2 * 1.5 ** 2))
    window = (window / window.sum()).expand(a.shape[1], 1, 1, 11)
    blur = lambda x: F.conv2d(F.conv2d(x, window, groups=x.shape[1]), window.mT, groups=x.shape[1])   # (B,C,H-10,W-10)
    mu_a, mu_b = blur(a), blur(b)
    s_a, s_b, s_ab = blur(a * a) - mu_a ** 2, blur(b * b) - mu_b ** 2, blur(a * b) - mu_a * mu_b
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    value = (2 * mu_a * mu_b + c1) * (2 * s_ab + c2) / ((mu_a ** 2 + mu_b ** 2 + c1) * (s_a + s_b + c2))
    return float(value.mean())


def comparable(a, b):
    if a.shape != b.shape or a.dim() not in (3, 4):
        raise ValueError(f"two images of one shape, (C,H,W) or (B,C,H,W), are needed, not {tuple(a.shape)} and {tuple(b.shape)}")
    return (x.unsqueeze(0) if x.dim() == 3 else x for x in (a, b))


def measure(image, truth):
    """All four metrics of (3,H,W) in [0,1] against its ground truth."""
    image, truth = as_png(image), as_png(truth)
    y, y_truth = rgb_to_y(image), rgb_to_y(truth)
    return {"psnr_rgb": psnr(image, truth), "ssim_rgb": ssim(image, truth), "psnr_y": psnr(y, y_truth), "ssim_y": ssim(y, y_truth)}


# ---------------------------------------------------------------- photos and paired folders

def read_image(path):
    """A photo of any kind (grey, palette, transparent, 16-bit, CMYK, turned by its EXIF) as (3,H,W) uint8 RGB.

    Raises ValueError with the file's name where it can't be read.
    """
    try:
        with Image.open(path) as image:
            image = ImageOps.exif_transpose(image)
            if image.mode.startswith("I"):                 # 16 bits a channel, grey
                image = Image.fromarray((np.asarray(image, np.float64) / 257).round().clip(0, 255).astype(np.uint8))
            return pil_to_tensor(image.convert("RGB"))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path}: not a readable image ({str(error).splitlines()[0]})") from None


def list_images(folder, recursive=False):
    """The image files in a folder, by name; hidden ones are left out."""
    files = Path(folder).rglob("*") if recursive else Path(folder).iterdir()
    return sorted(p for p in files if p.suffix.lower() in ENDINGS and not p.name.startswith(".") and p.is_file())


@dataclass
class Pair:
    """A degraded photo, its ground truth, and the name of the set they belong to."""
    degraded: Path
    truth: Path
    set: str

    def read(self):
        """Both as (3,H,W) float in [0,1], and whether the truth, a few px larger (SOTS), was centre-cropped."""
        degraded, truth = read_image(self.degraded), read_image(self.truth)
        more = [t - d for t, d in zip(truth.shape[1:], degraded.shape[1:])]
        if min(more) < 0 or max(more) > 32:
            raise ValueError(f"{self.degraded} is {tuple(degraded.shape[1:])} px and its truth {self.truth} {tuple(truth.shape[1:])}")
        return degraded / 255, center_crop(truth, degraded.shape[1:]) / 255, max(more) > 0


DEGRADED = {"input", "inputs", "rainy", "rain", "hazy", "haze", "in", "synthetic", "snow", "snowy", "lq", "degraded"}
TRUTH = {"target", "targets", "norain", "clear", "clean", "gt", "groundtruth"}
RULES = {"same name": lambda name: name, "rain-N to norain-N": lambda name: "no" + name, "id before _": lambda name: name.split("_")[0]}


def find_pairs(folder):
    """The pairs of a benchmark, in any of the layouts that people have of it (README), from its root or a folder in it.

    Returns a list of Pair; a root that holds several sets gives them all, each under its name; a folder of photos with
    no ground truth near gives none. Raises ValueError, with the names, where there is nothing, more than one way to take
    it, or a photo without partner.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder")
    sets = sets_below(folder, 3)
    if not sets and folder.name.lower() in DEGRADED | TRUTH:
        sets = sets_below(folder.resolve().parent, 0)
    if not sets and list_images(folder):
        return []
    if not sets:
        raise ValueError(f"{folder}: no paired set in it: a folder of degraded photos (input, rainy, hazy, synthetic, lq ...) beside "
                         "one of ground truth (target, norain, clear, gt ...)")
    return [pair for degraded, truth in sets for pair in match(degraded, truth)]


def sets_below(folder, deep):
    """The sets [(degraded folder, truth folder)] in a folder, or else in the folders in it."""
    inside = sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
    degraded, truth = ([p for p in inside if p.name.lower() in names and list_images(p)] for names in (DEGRADED, TRUTH))
    if not truth and any(p.stem.startswith("norain") for p in list_images(folder)):
        truth = [folder]                                   # PReNet's Rain100L: the truth lies one level up
    if degraded and truth:
        if len(degraded) > 1 or len(truth) > 1:
            raise ValueError(f"{folder}: which belong together? degraded: {', '.join(p.name for p in degraded)}; "
                             f"truth: {', '.join(p.name for p in truth)}")
        return [(degraded[0], truth[0])]
    return [found for p in inside for found in sets_below(p, deep - 1)] if deep else []


def match(degraded, truth):
    """Pairs the files of two folders by the one rule that fits all of them; never by their order."""
    name = degraded.resolve().parent.name if truth != degraded.parent else truth.resolve().name
    inputs = list_images(degraded)
    targets = [p for p in list_images(truth) if truth != degraded.parent or p.stem.startswith("norain")]
    by_stem = {}
    for p in targets:
        if p.stem in by_stem:
            raise ValueError(f"{truth}: {by_stem[p.stem].name} and {p.name} could each be the truth")
        by_stem[p.stem] = p
    unmatched = {rule: [p.name for p in inputs if key(p.stem) not in by_stem] for rule, key in RULES.items()}
    rule = min(RULES, key=lambda r: len(unmatched[r]))
    left = sorted(by_stem.keys() - {RULES[rule](p.stem) for p in inputs})
    if unmatched[rule] or left:
        some = lambda names: f"{', '.join(names[:5])}{' ...' if len(names) > 5 else ''} ({len(names)})" if names else "none"
        raise ValueError(f"{degraded} and {truth}: degraded photos without truth: {some(unmatched[rule])}; "
                         f"truths without degraded photo: {some([by_stem[s].name for s in left])}")
    return [Pair(p, by_stem[RULES[rule](p.stem)], name) for p in sorted(inputs, key=natural)]


def natural(path):
    """Sorts 2.png before 10.png."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", path.name)]


# ---------------------------------------------------------------- restoring and evaluating

@torch.no_grad()
def restore(model, image, tile=1024, overlap=64):
    """model on one photo (3,H,W) in [0,1] on any device; returns (3,H,W) in [0,1] there.

    A photo of more than `tile` px on a side is restored in tiles that overlap and fade into one another; 0: never.
    Raises ValueError for an overlap that is no part of a tile.
    """
    device = next(model.parameters()).device
    run = lambda x: model(x[None].to(device, memory_format=torch.channels_last))[0].float().clamp(0, 1).to(image.device)
    height, width = image.shape[-2:]
    if not tile or max(height, width) <= tile:
        return run(image)
    if not 0 < overlap < tile // 2:
        raise ValueError(f"the overlap of tiles of {tile} px must lie in 1..{tile // 2 - 1}, not {overlap}")
    output, weight = torch.zeros_like(image), torch.zeros_like(image[:1])
    for y0, y1, fade_y in spans(height, tile, overlap):
        for x0, x1, fade_x in spans(width, tile, overlap):
            fade = (fade_y[:, None] * fade_x[None]).to(image.device)
            output[:, y0:y1, x0:x1] += run(image[:, y0:y1, x0:x1]) * fade
            weight[:, y0:y1, x0:x1] += fade
    return output.div_(weight)


def spans(length, tile, overlap):
    """(start, end, weights (end - start,)) of evenly laid tiles that cover a length; linear fades where two overlap."""
    if length <= tile:
        return [(0, length, torch.ones(length))]
    count = -(-(length - overlap) // (tile - overlap))
    starts = [round(i * (length - tile) / (count - 1)) for i in range(count)]
    ramp = torch.arange(1, tile + 1) / (overlap + 1)
    rise, fall = ramp.clamp(max=1), ramp.flip(0).clamp(max=1)
    return [(s, s + tile, (rise if s else 1) * (fall if s + tile < length else torch.ones(tile))) for s in starts]


def evaluate(model, pairs, *, tile=1024, label="evaluate"):
    """The metrics of a model over pairs; of the degraded photos themselves where it is None.

    pairs: list of Pair, or of (degraded, truth) tensors (3,H,W) in [0,1].
    Returns {"psnr_rgb", "ssim_rgb", "psnr_y", "ssim_y", "n_images", "cropped", "images": [per photo]}: PSNR in dB; means
    over the photos; in float32; `cropped`: truths that were centre-cropped. Raises ValueError for no pairs.
    """
    rows, cropped = [], 0
    for pair in tqdm(pairs, label, disable=None):
        degraded, truth, cut = pair.read() if isinstance(pair, Pair) else (*pair, False)
        restored = degraded if model is None else restore(model, degraded, tile)
        name = {"image": pair.degraded.name, "set": pair.set} if isinstance(pair, Pair) else {}
        rows.append(name | measure(restored, truth))
        cropped += cut
    if not rows:
        raise ValueError("there are no pairs to evaluate")
    return means(rows) | {"n_images": len(rows), "cropped": cropped, "images": rows}


def means(rows):
    """The means of the four metrics over per-photo rows."""
    return {key: statistics.fmean(row[key] for row in rows) for key in METRICS}


def cost(model, size=256, runs=5):
    """What a model costs at size x size, batch 1, float32, on the device it is on.

    Returns {"params", "gmacs", "ms", "peak_mb"}: parameters; 1e9 multiply-adds of all convolutions, matrix products and
    attention; median milliseconds; peak MB of weights and activations.
    """
    x = torch.rand(1, 3, size, size, device=next(model.parameters()).device).contiguous(memory_format=torch.channels_last)
    wait = torch.cuda.synchronize if x.is_cuda else lambda: None
    times = []
    with torch.no_grad():
        with FlopCounterMode(display=False) as flops:
            model(x)
        for _ in range(runs):
            wait()
            start = time.perf_counter()
            model(x)
            wait()
            times.append(time.perf_counter() - start)
        peak = peak_bytes(model, x)
    return {"params": sum(p.numel() for p in model.parameters()), "gmacs": flops.get_total_flops() / 2e9,
            "ms": 1000 * statistics.median(times), "peak_mb": peak / 2 ** 20}


def peak_bytes(model, x):
    """The most bytes that weights and activations take at once in model(x)."""
    if x.is_cuda:
        torch.cuda.reset_peak_memory_stats()
        model(x)
        return torch.cuda.max_memory_allocated()
    live = LiveBytes([x, *model.parameters(), *model.buffers()])
    with live:
        model(x)
    return live.peak


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all tensors that are alive, and their peak."""

    def __init__(self, tensors):
        super().__init__()
        self.now, self.peak, self.seen = 0, 0, weakref.WeakSet()
        self.count(tensors)

    def count(self, tensors):
        for storage in (t.untyped_storage() for t in tensors if isinstance(t, torch.Tensor)):
            if storage not in self.seen:
                self.seen.add(storage)
                self.now += storage.nbytes()
                weakref.finalize(storage, self.free, storage.nbytes())
        self.peak = max(self.peak, self.now)

    def free(self, size):
        self.now -= size

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        self.count(tree_leaves(output))
        return output


# ---------------------------------------------------------------- figures

def figure(columns, path, side=256):
    """Writes a PNG with a titled column for each {title: list of (3,H,W) in [0,1]}; pictures are fitted to `side` px."""
    rows = [[ImageOps.contain(to_pil_image(as_png(image).float().cpu()), (side, side), Image.NEAREST) for image in row]
            for row in zip(*columns.values())]
    tops = [18 + sum(4 + max(image.height for image in row) for row in rows[:i]) for i in range(len(rows) + 1)]
    sheet = Image.new("RGB", ((side + 4) * len(columns), tops[-1]), "white")
    for c, title in enumerate(columns):
        ImageDraw.Draw(sheet).text((c * (side + 4), 3), title, fill="black")
        for top, row in zip(tops, rows):
            sheet.paste(row[c], (c * (side + 4), top))
    sheet.save(f"{path}.tmp", "PNG")
    os.replace(f"{path}.tmp", path)


def table(metrics):
    """The dict of metrics.json as a Markdown page."""
    lines = [f"# {metrics['task']}: {metrics['test_set']} ({metrics['n_images']} photos)", "",
             "| | PSNR RGB | SSIM RGB | PSNR Y | SSIM Y | params | GMACs | ms | peak MB |", "|---|---|---|---|---|---|---|---|---|"]
    sets = metrics.get("sets", {})
    for prefix, part in [("", metrics)] + [(f"{name} ({part['n_images']}): ", part) for name, part in sets.items()]:
        for who in ("input", "teacher", "student"):
            if who in part:
                m = part[who]
                price = f"{m['params']:,} | {m['gmacs']:.2f} | {m['ms']:.1f} | {m['peak_mb']:.0f}" if "params" in m else "| | |"
                lines.append(f"| {prefix}{who} | {m['psnr_rgb']:.2f} | {m['ssim_rgb']:.4f} | {m['psnr_y']:.2f} | {m['ssim_y']:.4f} | {price} |")
    if "ratio" in metrics:
        lines.append("| teacher / student | | | | | " + " | ".join(f"{metrics['ratio'][k]:.1f}x" for k in ("params", "gmacs", "ms", "peak_mb")) + " |")
    lines += ["", f"{metrics['definitions']}. Cost at {metrics['cost_at']}."]
    return "\n".join(lines + ([metrics["note"]] if metrics.get("note") else [])) + "\n"
