"""The embedded default: places, weather, and how `weights/` was made. Delete it and the method still stands.

    python demo.py figure  --out weather.png       # every weather of every domain, side by side
    python demo.py photos --task desnow --out photos # folders of PNG files, as d4ir.py makes them for itself
    python demo.py pretrain                        # mini-SD and teacher, from nothing; resumes (README: time)

A *scene* is a procedural place seen by a pinhole camera: sky, hills, ground, street, houses, trees, cars, people, or
a close-up of overlapping leaves (dead leaves: Lee et al. 2001; they are known to carry over to photos: Achddou et
al. 2021, Baradad et al. 2021). It comes with its true depth map, in metres. *Weather* is laid over it:

    haze   I = J t + A (1 - t),  t = exp(-beta d)                       (Koschmieder 1924)
    snow   I = J (1 - a) + A a,  a = flakes of several depths: size, focus, motion blur
    rain   the same with streaks: one angle, several lengths; then the veil of the drops too far to be seen (haze)

Three domains that share no scene, as in reality: the teacher's *original* data, *web* photos, and the *pretraining*
mixture of the mini-SD. One `Weather` each, so that their difference can be read at a glance.
"""
import argparse
import io
import json
import math
import os
import shutil
import signal
import time
from dataclasses import asdict, dataclass
from multiprocessing import Pool
from pathlib import Path

import numpy as np
from PIL import Image

KINDS = ("haze", "rain", "snow")
TASKS = {"derain": "rain", "dehaze": "haze", "desnow": "snow"}
CLEAR = "a photo in clear weather"
HERE = Path(__file__).resolve().parent


# ---------------------------------------------------------------- weather: one dataclass a domain

@dataclass(frozen=True)
class Weather:
    """What the weather of one domain is like. Pairs are ranges, drawn uniformly for every photo."""
    beta: tuple = (0.004, 0.03)         # 1/m, haze density: optical depth at 100 m is 0.4 to 3
    airlight: tuple = (0.75, 1.0)       # brightness of the haze
    tint: float = 0.02                  # colour cast of the haze, +- each channel
    uneven: float = 0.0                 # 0: uniform; 1: the weather's density varies from none to double
    flakes: tuple = (0.04, 0.24)        # snow: part of the photo that flakes cover
    flake_size: tuple = (0.7, 2.2)      # px, radius of the middle layer; others half to double
    flake_blur: tuple = (0.0, 3.0)      # px, motion of the middle layer during exposure
    flake_opacity: tuple = (0.6, 1.0)
    streaks: tuple = (0.05, 0.20)       # rain: part of the photo that streaks cover
    streak_length: tuple = (14.0, 60.0)  # px
    streak_width: tuple = (0.6, 1.2)    # px
    streak_angle: float = 30.0          # degrees from the vertical, at most
    streak_opacity: tuple = (0.4, 0.9)
    veil: tuple = (0.0, 0.0)            # 1/m, haze that comes with rain and snow
    mixed: float = 0.0                  # chance that other falling weather is in the photo too, thinner
    exposure: float = 0.0               # brightness and contrast, +- this part
    soft: float = 0.0                   # chance that the place is out of focus, its rain and snow not
    blur: float = 0.0                   # px, the lens: at most
    noise: float = 0.0                  # of [0,1], the sensor: standard deviation at most
    jpeg: tuple = ()                    # quality; empty: none


# Like the benchmarks (Rain100L, SOTS, Snow100K): weather laid over good photos, crisp, uniform, one kind at a time.
ORIGINAL = Weather()
# Like photos found on the web: finer and denser streaks, veiled, uneven, mixed, noisy, compressed.
WEB = Weather(beta=(0.003, 0.04), airlight=(0.6, 0.97), tint=0.05, uneven=0.6, flakes=(0.02, 0.16),
              flake_size=(0.6, 1.8), flake_blur=(0.0, 6.0), flake_opacity=(0.45, 0.95), streaks=(0.05, 0.22),
              streak_length=(7.0, 34.0), streak_width=(0.5, 1.1), streak_angle=35.0, streak_opacity=(0.2, 0.6),
              veil=(0.0, 0.012), mixed=0.15, exposure=0.2, blur=0.6, noise=0.02, jpeg=(50, 95))
# Wide enough for both, so that the mini-SD knows what either looks like, as the real one does.
PRETRAINING = Weather(beta=(0.003, 0.045), airlight=(0.6, 1.0), tint=0.05, uneven=0.5, flakes=(0.01, 0.24),
                      flake_size=(0.5, 2.4), flake_blur=(0.0, 6.0), flake_opacity=(0.45, 1.0), streaks=(0.01, 0.22),
                      streak_length=(6.0, 64.0), streak_width=(0.5, 1.3), streak_angle=38.0, streak_opacity=(0.2, 0.85),
                      veil=(0.0, 0.012), mixed=0.08, exposure=0.15, soft=0.5, blur=0.4, noise=0.01,
                      jpeg=(60, 98))
DOMAINS = {"original": ORIGINAL, "web": WEB, "pretraining": PRETRAINING}


def particles(rng, height, width, cover, length, size, angle, sharp):
    """Flakes or streaks of one depth: opacity (H,W) in [0,1]. Points, convolved with one blurred shape by FFT.

    `cover`: part of the photo covered; `length`: px of motion; `size`: px, radius; `angle`: radians from the
    vertical; `sharp`: 2 is out of focus (a Gaussian), 6 nearly a disk.
    """
    if cover <= 0:
        return np.zeros((height, width), np.float32)
    h, w = height + 96, width + 96                         # the FFT wraps round: beyond the photo's edge
    count = rng.poisson(cover * h * w / (2 * size * length + 3 * size ** 2))
    points = np.zeros(h * w, np.float32)
    np.add.at(points, rng.integers(0, h * w, count), rng.uniform(0.3, 1, count).astype(np.float32))
    y = np.fft.fftfreq(h, 1 / h).astype(np.float32)[:, None]
    x = np.fft.fftfreq(w, 1 / w).astype(np.float32)[None]
    along = y * math.cos(angle) + x * math.sin(angle)
    across = x * math.cos(angle) - y * math.sin(angle)
    beyond = np.maximum(np.abs(along) - length / 2, 0)     # distance from a segment of this length
    shape = np.exp(-((beyond ** 2 + across ** 2) / size ** 2) ** (sharp / 2))
    spread = np.fft.irfft2(np.fft.rfft2(points.reshape(h, w)) * np.fft.rfft2(shape), s=(h, w))
    return np.clip(spread[:height, :width], 0, 1).astype(np.float32)


def falling(rng, height, width, kind, weather, amount=1.0):
    """Opacity (H,W) in [0,1] of a photo's rain or snow, and what there is of it, for the caption."""
    uniform = lambda pair: rng.uniform(*pair)
    clear = np.ones((height, width), np.float32)
    if kind == "snow":
        angle = math.radians(rng.normal(0, 25))
        cover, size, blur, opacity = map(uniform, (weather.flakes, weather.flake_size, weather.flake_blur,
                                                   weather.flake_opacity))
        layers = 4
        for i in range(layers):                            # far and many to near and few
            near = i / (layers - 1)
            scale = 0.5 * 4 ** near
            part = particles(rng, height, width, amount * cover * (0.45, 0.3, 0.17, 0.08)[i], blur * scale + 0.01,
                             max(0.45, size * scale), angle + rng.normal(0, 0.15), (4, 5, 3, 2)[i])
            clear *= 1 - opacity * (0.8, 1.0, 0.9, 0.5)[i] * part
        said = {"cover": cover, "large": size, "blur": blur, "angle": angle}
    else:
        angle = math.radians(rng.uniform(-weather.streak_angle, weather.streak_angle))
        cover, length, size, opacity = map(uniform, (weather.streaks, weather.streak_length, weather.streak_width,
                                                     weather.streak_opacity))
        for i in range(3):
            part = particles(rng, height, width, amount * cover * (0.45, 0.35, 0.2)[i], length * (0.5, 1, 1.5)[i],
                             max(0.4, size * (0.8, 1, 1.2)[i]), angle + rng.normal(0, 0.02), 2)
            clear *= 1 - opacity * (0.7, 1, 0.9)[i] * part
        said = {"cover": cover, "large": length, "opacity": opacity, "angle": angle}
    return 1 - clear, said


def lean(angle):
    return "falling straight" if abs(angle) < 0.14 else "blown to the left" if angle < 0 else "blown to the right"


def describe(kind, said, weather):
    """The caption of a photo: how much, of what, and of which look. Words are relative to the pretraining ranges."""
    def grade(value, pair, words):
        part = (value - pair[0]) / (pair[1] - pair[0])
        return words[min(len(words) - 1, max(0, int(part * len(words))))]
    amount = ("light", "moderate", "heavy")
    if kind == "haze":
        tone = grade(said["airlight"], weather.airlight, ("dark", "grey", "bright"))
        return [f"a photo in {grade(said['beta'], weather.beta, amount)} haze", f"{tone} air"]
    if kind == "snow":
        words = [f"a photo in {grade(said['cover'], weather.flakes, amount)} snow",
                 grade(said["large"], weather.flake_size, ("small", "medium", "large")) + " flakes"]
    else:
        words = [f"a photo in {grade(said['cover'], weather.streaks, amount)} rain",
                 grade(said["large"], weather.streak_length, ("short", "medium", "long")) + " streaks",
                 grade(said["opacity"], weather.streak_opacity, ("faint", "clear", "bright"))]
    words.append(lean(said["angle"]))
    if said.get("veil", 0) > 0.004:
        words.append("with mist")
    return words


def smooth_field(rng, height, width):
    """A slowly varying field (H,W) in about [-1,1]."""
    coarse = Image.fromarray(rng.uniform(-1, 1, (4, 4)).astype(np.float32))
    return np.asarray(coarse.resize((width, height), Image.BICUBIC))


def add_weather(image, depth, kind, weather, rng):
    """Lays weather over a clean photo.

    image: (H,W,3) float32 in [0,1]; depth: (H,W) float32, metres; kind: 'haze', 'rain', 'snow' or 'clear'.
    Returns the degraded photo (H,W,3) in [0,1] and its caption as a list of phrases, the most important first.
    Raises ValueError for another kind.
    """
    if kind not in KINDS + ("clear",):
        raise ValueError(f"kind is one of {KINDS + ('clear',)}, not {kind!r}")
    height, width = depth.shape
    image, words = image.copy(), [CLEAR]
    uneven = lambda: 1 + rng.uniform(0, weather.uneven + 1e-9) * smooth_field(rng, height, width)
    grey = rng.uniform(*weather.airlight)
    airlight = np.clip(grey + rng.uniform(-weather.tint, weather.tint, 3), 0, 1).astype(np.float32)
    if kind == "haze":
        beta = rng.uniform(weather.beta[0] ** 0.5, weather.beta[1] ** 0.5) ** 2     # thin haze is more usual
    elif kind == "clear":
        beta = 0.0
    else:
        beta = max(0.0, rng.uniform(weather.veil[0] - 0.3 * weather.veil[1], weather.veil[1]))
    said = {"beta": beta, "airlight": grey, "veil": beta}
    if beta > 0:
        t = np.exp(-beta * uneven() * depth)[..., None]
        image = image * t + airlight * (1 - t)
    if kind != "haze" and weather.soft and rng.random() < weather.soft:
        image = out_of_focus(image, rng)
    if kind in ("rain", "snow"):
        others = [("snow" if kind == "rain" else "rain", 0.3)] if rng.random() < weather.mixed else []
        for which, amount in [(kind, 1.0)] + others:
            opacity, found = falling(rng, height, width, which, weather, amount)
            opacity = np.clip(opacity * uneven(), 0, 1)[..., None]
            white = np.float32(rng.uniform(0.88, 1.0) if which == "snow" else rng.uniform(0.75, 1.0))
            image = image * (1 - opacity) + white * opacity
            said = said | found if which == kind else said
    words = words if kind == "clear" else describe(kind, said, PRETRAINING)
    return camera(image, weather, rng), words


def out_of_focus(image, rng):
    """What is left of a photo (H,W,3) in [0,1] behind what is near: its colours."""
    small = rng.uniform(0.04, 0.12) * np.array(image.shape[1::-1])
    return np.asarray(picture(image).resize(tuple(small.round().astype(int)), Image.BOX)
                      .resize(image.shape[1::-1], Image.BICUBIC), np.float32) / 255


def camera(image, weather, rng):
    """What the camera does to a photo: exposure, focus, sensor noise, JPEG. (H,W,3) in [0,1] to the same."""
    if weather.exposure:
        gain, offset = 1 + rng.uniform(-weather.exposure, weather.exposure), rng.uniform(-0.3, 0.3) * weather.exposure
        image = (image - 0.5) * gain + 0.5 + offset
    sigma = rng.uniform(0, weather.blur + 1e-9)
    if sigma > 0.2:
        k = np.exp(-0.5 * (np.arange(-2, 3) / sigma) ** 2).astype(np.float32)
        k /= k.sum()
        for axis in (0, 1):
            pad = np.pad(image, [(2, 2) if a == axis else (0, 0) for a in range(3)], mode="edge")
            n = image.shape[axis]
            image = sum(k[i] * (pad[i:i + n] if axis == 0 else pad[:, i:i + n]) for i in range(5))
    if weather.noise:
        image = image + rng.normal(0, 1, image.shape).astype(np.float32) * rng.uniform(0, weather.noise)
    image = np.clip(image, 0, 1).astype(np.float32)
    if weather.jpeg:
        file = io.BytesIO()
        picture(image).save(file, "JPEG", quality=int(rng.integers(*weather.jpeg)))
        image = np.asarray(Image.open(file), np.float32) / 255
    return image


def picture(image):
    """(H,W,3) floats in [0,1] to an 8-bit PIL image."""
    return Image.fromarray((np.clip(image, 0, 1) * 255 + 0.5).astype(np.uint8))


# ---------------------------------------------------------------- scenes: a place, seen by a pinhole camera

BANK = 256          # px: side of the textures, which repeat


def make_textures(rng):
    """Repeating textures (N,BANK,BANK) in about [0,1]: fractal noise of several roughnesses, and fibres (wood, grass)."""
    fy, fx = np.fft.fftfreq(BANK)[:, None] * BANK, np.fft.rfftfreq(BANK)[None] * BANK
    textures = []
    for slope, stretch in ((0.7, 1), (0.9, 1), (1.1, 1), (1.3, 1), (1.6, 1), (2.0, 1), (1.0, 4), (1.0, 0.25), (1.4, 6)):
        radius = np.sqrt((fx * stretch) ** 2 + (fy / stretch) ** 2)
        radius[0, 0] = np.inf
        phase = rng.normal(size=radius.shape) + 1j * rng.normal(size=radius.shape)
        noise = np.fft.irfft2(phase * radius ** -slope, s=(BANK, BANK))
        textures.append(0.5 + 0.2 * noise / noise.std())
    return np.asarray(textures, np.float32)


TEXTURES = make_textures(np.random.default_rng(0))
ROUGH, MEDIUM, SMOOTH, UPRIGHT, FLAT = (0, 1), (2, 3), (4, 5), 7, 6


def texture(index, u, v):
    """The texture at (u, v), in its own pixels."""
    return TEXTURES[index][v.astype(np.int32) & (BANK - 1), u.astype(np.int32) & (BANK - 1)]


def hashed(a, b, salt):
    """A repeatable pseudo-random number in [0,1] for every pair of whole numbers (a, b)."""
    n = a.astype(np.int64) * 73856093 ^ b.astype(np.int64) * 19349663 ^ int(salt) * 83492791
    return ((n * 2654435761 >> 8) & 0xFFFF).astype(np.float32) / 65535


def hue(rng, low, high, saturation, value):
    """A colour (3,), drawn: hue in degrees between low and high, saturation and value between pairs."""
    h, s, v = rng.uniform(low, high) % 360 / 60, rng.uniform(*saturation), rng.uniform(*value)
    k = (np.array([5, 3, 1]) + h) % 6
    return (v - v * s * np.clip(np.minimum(k, 4 - k), 0, 1)).astype(np.float32)


class View:
    """A photo in the making: colour (H,W,3), depth (H,W) in metres, and each pixel's ray (x, y, 1), y downwards."""

    def __init__(self, rng, height, width):
        self.rng, self.height, self.width = rng, height, width
        self.focal = rng.uniform(0.7, 1.4) * max(width, height)
        self.horizon = rng.uniform(0.35, 0.65) * height
        self.camera = rng.uniform(1.4, 2.5) if rng.random() < 0.75 else rng.uniform(4, 14)   # metres above ground
        self.x = ((np.arange(width, dtype=np.float32) - rng.uniform(0.4, 0.6) * width) / self.focal)[None]
        self.y = ((np.arange(height, dtype=np.float32) - self.horizon) / self.focal)[:, None]
        self.colour = np.zeros((height, width, 3), np.float32)
        self.depth = np.full((height, width), 1000.0, np.float32)
        self.sun = rng.uniform(-1, 1)                      # where the light comes from: -1 left, 1 right
        self.sharp = rng.uniform(0.3, 1.0)                 # overcast to sunny: contrast of lit and shaded sides

    def box(self, x0, x1, y0, y1):
        """The slices of the photo that hold rays between (x0, y0) and (x1, y1); empty ones are None."""
        columns = np.searchsorted(self.x[0], (x0, x1))
        rows = np.searchsorted(self.y[:, 0], (y0, y1))
        if columns[0] >= columns[1] or rows[0] >= rows[1]:
            return None
        return slice(*rows), slice(*columns)

    def paint(self, where, mask, colour, depth):
        """Sets colour and depth where the mask holds and nothing nearer stands."""
        mask = mask & (depth < self.depth[where])
        self.colour[where] = np.where(mask[..., None], colour, self.colour[where])
        self.depth[where] = np.where(mask, depth, self.depth[where])

    def lit(self, side):
        """Brightness of a side that faces left (-1), right (1) or the camera (0)."""
        return 1 + 0.35 * self.sharp * self.sun * side


WHOLE = (slice(None), slice(None))


def sky(view):
    rng = view.rng
    top, low = [(hue(rng, 205, 225, (0.35, 0.7), (0.55, 0.9)), hue(rng, 195, 220, (0.05, 0.25), (0.8, 0.98))),
                (hue(rng, 200, 230, (0.0, 0.12), (0.5, 0.8)), hue(rng, 200, 230, (0.0, 0.08), (0.7, 0.95))),
                (hue(rng, 215, 270, (0.3, 0.5), (0.3, 0.6)), hue(rng, 15, 45, (0.3, 0.7), (0.8, 1.0)))][
                    rng.choice(3, p=(0.5, 0.35, 0.15))]
    up = np.clip(-view.y / max(1e-3, -view.y[0, 0]), 0, 1)[..., None] ** 0.7
    colour = np.broadcast_to(top * up + low * (1 - up), view.colour.shape)
    far = 1 / (np.maximum(-view.y, 0) + 0.06)
    u, v = (view.x * far) * 60, far * 60 + np.zeros_like(view.x)
    clouds = 0.6 * texture(5, u + rng.integers(256), v) + 0.4 * texture(3, 2 * u, 2 * v + rng.integers(256))
    cover = np.clip((clouds - rng.uniform(0.35, 0.75)) * 4, 0, 1)[..., None] * rng.uniform(0.3, 0.9)
    view.colour[:] = colour * (1 - cover) + cover * np.float32(0.75 + 0.22 * rng.random())
    view.depth[:] = rng.uniform(400, 900)


def hills(view):
    rng = view.rng
    green = rng.random() < 0.6
    z = rng.uniform(150, 380)
    for _ in range(rng.integers(1, 4)):
        height = rng.uniform(0.03, 0.16) * z
        line = texture(5 if green else 4, np.arange(view.width) * rng.uniform(0.2, 0.8) + rng.integers(256),
                       np.full(view.width, rng.integers(256))) + 0.15 * texture(3, np.arange(view.width), np.full(view.width, 7))
        top = -(height * np.clip(line - 0.2, 0.05, 1.5) - view.camera) / z
        base = hue(rng, 80, 140, (0.2, 0.5), (0.15, 0.4)) if green else hue(rng, 15, 60, (0.1, 0.35), (0.25, 0.6))
        rows = np.arange(view.height)[:, None] + np.zeros_like(view.x)
        cols = np.arange(view.width)[None] + np.zeros_like(view.y)
        shade = 0.6 + 0.8 * (0.5 * texture(1, cols, rows * 1.5 + z) + 0.5 * texture(4, cols + z, rows))
        view.paint(WHOLE, view.y > top[None], base * shade[..., None], np.float32(z))
        z *= rng.uniform(0.5, 0.8)


def ground(view, kind):
    """A plane below the camera, of grass, soil, asphalt, paving, water or sand; a road on it, sometimes."""
    rng = view.rng
    where = (slice(int(np.searchsorted(view.y[:, 0], 0.004)), None), slice(None))
    if where[0].start >= view.height:
        return
    y, x = view.y[where[0]], view.x
    z = view.camera / y
    u, v = x * z, z + np.zeros_like(x)
    base = {"grass": hue(rng, 65, 125, (0.35, 0.7), (0.25, 0.6)), "soil": hue(rng, 20, 45, (0.25, 0.55), (0.3, 0.6)),
            "asphalt": hue(rng, 200, 260, (0.0, 0.1), (0.25, 0.5)), "paving": hue(rng, 10, 50, (0.02, 0.25), (0.4, 0.75)),
            "water": hue(rng, 180, 220, (0.2, 0.5), (0.25, 0.6)), "sand": hue(rng, 35, 50, (0.2, 0.45), (0.6, 0.85))}[kind]
    near = np.clip(12 / z, 0.25, 1)                        # far away the texture is finer than a pixel
    fine = texture(rng.choice(ROUGH), u * 40, v * 40) - 0.5
    coarse = texture(rng.choice(MEDIUM), u * 6 + 31, v * 6) - 0.5
    shade = 1 + rng.uniform(0.5, 1.3) * near * fine + 0.7 * coarse
    if kind == "water":
        waves = texture(FLAT, u * 8, v * 30) - 0.5
        mirror = view.colour[np.clip(int(view.horizon) - np.arange(z.shape[0]), 0, None)]
        colour = base * 0.45 + 0.5 * mirror * (1 + (1.6 * near * waves)[..., None])
    else:
        colour = base * shade[..., None]
    if kind == "paving":
        size = rng.uniform(0.4, 1.2)
        joint = (u / size % 1 < 0.06) | (v / size % 1 < 0.06)
        colour = np.where((joint & (z < 25))[..., None], colour * 0.65, colour)
    view.paint(where, np.ones(u.shape, bool), colour, v)
    if kind in ("grass", "soil", "sand") and rng.random() < 0.5 or kind == "asphalt":
        road(view, where, u, v, fine * near)


def road(view, where, u, v, fine):
    rng = view.rng
    half, bend = rng.uniform(2.5, 5), rng.uniform(-0.004, 0.004)
    offset = u - rng.uniform(-3, 3) - bend * v ** 2
    grey = hue(rng, 200, 260, (0.0, 0.08), (0.25, 0.5))
    colour = grey * (1 + 0.7 * fine)[..., None]
    width = 0.1 + 0.01 * v
    line = (np.abs(np.abs(offset) - half * 0.92) < width) | ((np.abs(offset) < width) & (v % 6 < 3.5))
    colour = np.where(line[..., None], np.float32(0.85), colour)
    inside = np.abs(offset) < half
    view.colour[where] = np.where(inside[..., None], colour, view.colour[where])


def masonry(rng, u, h, salt, z):
    """A wall's colour (...,3) at u metres along and h metres up: plaster or brick, with rows of windows."""
    base = [hue(rng, 0, 40, (0.25, 0.6), (0.35, 0.7)), hue(rng, 20, 60, (0.05, 0.35), (0.55, 0.92)),
            hue(rng, 190, 240, (0.02, 0.25), (0.35, 0.75))][rng.integers(3)]
    colour = base * (1 + 0.5 * (texture(rng.choice(ROUGH), u * 30, h * 30) - 0.5)
                     + 0.5 * (texture(rng.choice(SMOOTH), u * 5 + 7, h * 9) - 0.5))[..., None]
    if rng.random() < 0.4:
        course = np.floor(h / 0.3)
        joint = (h / 0.3 % 1 < 0.15) | ((u / 0.6 + 0.5 * (course % 2)) % 1 < 0.08)
        colour = np.where((joint & (z < 20))[..., None], colour * 0.75, colour)
    wide, high = rng.uniform(1.6, 3.5), rng.uniform(2.6, 3.6)
    a, b = u / wide % 1, h / high % 1
    w, t = rng.uniform(0.2, 0.42), rng.uniform(0.2, 0.38)
    inside = (np.abs(a - 0.5) < w) & (np.abs(b - 0.55) < t)
    frame = inside & ((np.abs(a - 0.5) > w - 0.04) | (np.abs(b - 0.55) > t - 0.04) | (np.abs(a - 0.5) < 0.02))
    glow = hashed(np.floor(u / wide), np.floor(h / high), salt)
    pane = np.float32([0.18, 0.21, 0.26]) + (glow[..., None] ** 3) * np.float32([0.6, 0.6, 0.55])
    colour = np.where(inside[..., None], pane, colour)
    return np.where(frame[..., None], np.float32(0.8 if base.mean() < 0.7 else 0.3), colour)


def house(view, x, z, wide, high):
    """A front that faces the camera, at z metres, with a flat or a pitched roof."""
    rng = view.rng
    roof = rng.uniform(0.2, 0.45) * wide if high < 11 and rng.random() < 0.7 else 0
    where = view.box((x - wide * 0.55) / z, (x + wide * 0.55) / z, (view.camera - high - roof) / z, view.camera / z)
    if where is None:
        return
    u = view.x[:, where[1]] * z - x + np.zeros_like(view.y[where[0]])
    h = view.camera - view.y[where[0]] * z + np.zeros_like(u)
    colour = masonry(rng, u, h, rng.integers(1 << 20), z) * view.lit(0.6 * np.sign(-x))
    tiles = hue(rng, 0, 30, (0.3, 0.6), (0.3, 0.6)) if rng.random() < 0.6 else hue(rng, 200, 250, (0.0, 0.2), (0.2, 0.45))
    tiled = tiles * (0.75 + 0.5 * texture(ROUGH[0], u * 25, h * 25) - 0.25 * (h / 0.35 % 1 < 0.25))[..., None]
    slope = high + roof * (1 - np.abs(u) / (0.55 * wide)) if rng.random() < 0.5 else high + roof * (np.abs(u) < 0.52 * wide)
    colour = np.where((h > high)[..., None], tiled, colour)
    view.paint(where, (h < np.where(np.abs(u) < wide / 2, np.maximum(slope, high), slope * (roof > 0))), colour, np.float32(z))


def street(view):
    """House fronts along both sides of a street, in true perspective."""
    rng = view.rng
    for side in (-1, 1):
        if rng.random() < 0.15:
            continue
        away = side * rng.uniform(4, 9)
        columns = np.flatnonzero(view.x[0] * side > 0.01)
        if not len(columns):
            continue
        where = (slice(None), slice(columns[0], columns[-1] + 1))
        z = away / view.x[:, where[1]] + np.zeros_like(view.y)
        h = view.camera - view.y * z
        length = rng.uniform(8, 16)
        block = np.floor(z / length)
        salt = rng.integers(1 << 20)
        high = 5 + rng.uniform(4, 14) * hashed(block, block * 0, salt)
        colour = masonry(rng, z % length, h, salt, z)
        tone = np.stack([0.6 + 0.4 * hashed(block, block * 0, salt + 1) + 0.2 * hashed(block, block * 0 + c, salt + 2)
                         for c in range(3)], -1)
        shop = (h < 3) & (np.abs(z / (length / 2) % 1 - 0.5) < 0.35) & (h < 2.6)
        awning = hue(rng, 0, 360, (0.3, 0.8), (0.3, 0.7)) * (0.8 + 0.3 * (z / 0.5 % 1 < 0.5))[..., None]
        colour = np.where(shop[..., None], np.float32([0.2, 0.2, 0.22]) + 0.25 * (texture(3, z * 20, h * 20) - 0.4)[..., None], colour)
        colour = np.where(((h > 2.6) & (h < 3))[..., None], awning, colour)
        shade = view.lit(-side) * (0.8 + 0.2 * np.clip(h / 6, 0, 1))
        view.paint(where, (h > 0) & (h < high) & (z < 160), colour * tone * shade[..., None], z)


def tree(view, x, z, high):
    rng = view.rng
    leaf = [hue(rng, 75, 130, (0.35, 0.75), (0.2, 0.55)), hue(rng, 20, 55, (0.5, 0.85), (0.4, 0.75)),
            hue(rng, 90, 150, (0.25, 0.5), (0.15, 0.35))][rng.choice(3, p=(0.6, 0.2, 0.2))]
    conifer = rng.random() < 0.3
    radius = high * (rng.uniform(0.16, 0.24) if conifer else rng.uniform(0.28, 0.42))
    trunk = max(0.12, 0.03 * high)
    where = view.box((x - trunk) / z, (x + trunk) / z, (view.camera - high * 0.6) / z, view.camera / z)
    if where is not None:
        u = view.x[:, where[1]] * z - x + np.zeros_like(view.y[where[0]])
        bark = hue(rng, 15, 40, (0.1, 0.4), (0.15, 0.45))
        rows = view.y[where[0]] * z * 40 + np.zeros_like(u)
        colour = bark * (1 + texture(UPRIGHT, u * 60, rows) - 0.5 + 0.35 * view.sun * u / trunk)[..., None]
        view.paint(where, np.abs(u) <= trunk, colour, np.float32(z))
    where = view.box((x - 1.3 * radius) / z, (x + 1.3 * radius) / z, (view.camera - high * 1.05) / z, (view.camera - high * 0.12) / z)
    if where is None:
        return
    u = view.x[:, where[1]] * z - x + np.zeros_like(view.y[where[0]])
    h = view.camera - view.y[where[0]] * z + np.zeros_like(u)
    k = 60 / max(high, 1e-3)
    salt = rng.integers(256)
    clumps = texture(4, u * k * 1.5 + salt, h * k * 1.5) - 0.5
    fine = texture(1, u * k * 5 + salt, h * k * 5) - 0.5
    if conifer:
        inside = np.abs(u) / (radius * np.clip(1.02 - h / high, 0, 1) + 1e-3) + 0.9 * fine + 0.5 * clumps < 1
    else:
        middle = 0.64 * high
        inside = np.hypot(u / radius, (h - middle) / (0.38 * high)) + 0.9 * clumps + 0.8 * fine < 1
    light = 0.75 + 0.45 * view.sharp * (view.sun * u / radius + (h / high - 0.6)) + 1.1 * fine + 0.9 * clumps
    view.paint(where, inside, leaf * np.clip(light, 0.15, 2)[..., None], np.float32(z))


def car(view, x, z):
    rng = view.rng
    paint = hue(rng, 0, 360, (0.0, 0.8), (0.15, 0.9))
    where = view.box((x - 1.1) / z, (x + 1.1) / z, (view.camera - 1.6) / z, view.camera / z)
    if where is None:
        return
    u = np.abs(view.x[:, where[1]] * z - x + np.zeros_like(view.y[where[0]]))
    h = view.camera - view.y[where[0]] * z + np.zeros_like(u)
    body = (u < 0.9) & (h > 0.3) & (h < 0.9)
    cabin = (h >= 0.9) & (h < 1.45) & (u < 0.78 - 0.25 * (h - 0.9))
    glass = cabin & (h < 1.35) & (u < 0.68 - 0.25 * (h - 0.9))
    wheel = (h <= 0.35) & (u > 0.55) & (u < 0.85)
    lamps = (h > 0.6) & (h < 0.75) & (u > 0.6) & (u < 0.85)
    colour = paint * (0.75 + 0.4 * h)[..., None]
    for part, tone in ((glass, (0.2, 0.24, 0.28)), (wheel, (0.08, 0.08, 0.08)), (lamps, (0.85, 0.3, 0.2) if rng.random() < 0.5 else (1, 0.95, 0.8))):
        colour = np.where(part[..., None], np.float32(tone), colour)
    view.paint(where, body | cabin | wheel, colour, np.float32(z))


def person(view, x, z):
    rng = view.rng
    coat, legs = hue(rng, 0, 360, (0.1, 0.85), (0.15, 0.85)), hue(rng, 200, 260, (0.0, 0.4), (0.1, 0.4))
    skin = hue(rng, 15, 35, (0.25, 0.55), (0.4, 0.9))
    where = view.box((x - 0.6) / z, (x + 0.6) / z, (view.camera - 2.2) / z, view.camera / z)
    if where is None:
        return
    u = view.x[:, where[1]] * z - x + np.zeros_like(view.y[where[0]])
    h = view.camera - view.y[where[0]] * z + np.zeros_like(u)
    head = np.hypot(u, h - 1.6) < 0.13
    body = (np.abs(u) < 0.2 + 0.06 * np.sin(h * 3)) & (h > 0.8) & (h < 1.47)
    leg = (np.abs(np.abs(u) - 0.1) < 0.085) & (h <= 0.8) & (h > 0)
    colour = np.where(head[..., None], skin, np.where((h > 0.8)[..., None], coat, legs))
    mask = head | body | leg
    if rng.random() < 0.3:                                 # an umbrella
        top = (np.hypot(u / 0.55, (h - 1.75) / 0.35) < 1) & (h > 1.75)
        colour, mask = np.where(top[..., None], hue(rng, 0, 360, (0.3, 0.9), (0.3, 0.9)), colour), mask | top
    view.paint(where, mask, colour * (1 + 0.4 * view.sun * np.clip(u * 3, -1, 1))[..., None], np.float32(z))


def pole(view, x, z, high):
    wide = view.rng.uniform(0.05, 0.15)
    where = view.box((x - wide) / z, (x + wide) / z, (view.camera - high) / z, view.camera / z)
    if where is not None:
        view.paint(where, np.ones((1, 1), bool), np.float32([0.3, 0.3, 0.32]) * view.rng.uniform(0.5, 1.5), np.float32(z))


def leaves(view, near=1.5, far=40.0):
    """Dead leaves: textured shapes of all sizes, each over the last: a close-up with depth."""
    rng, n = view.rng, int(view.rng.integers(40, 110))
    y, x = np.mgrid[:view.height, :view.width].astype(np.float32)
    view.colour[:] = hue(rng, 0, 360, (0.0, 0.5), (0.2, 0.9)) * (0.6 + 0.8 * texture(rng.integers(1, 6), x, y))[..., None]
    view.depth[:] = far
    size = max(view.height, view.width)
    for i in range(n):
        r = min(0.5, 0.035 / rng.uniform(0.04, 1) ** 0.8) * size      # many small, few large
        r = max(3.0, r * (1.3 - 0.6 * i / n))
        cx, cy = rng.uniform(0, view.width), rng.uniform(0, view.height)
        where = (slice(max(0, int(cy - r)), max(0, int(cy + r + 1))), slice(max(0, int(cx - r)), max(0, int(cx + r + 1))))
        y, x = np.mgrid[where[0].start:min(view.height, where[0].stop), where[1].start:min(view.width, where[1].stop)].astype(np.float32)
        if not x.size:
            continue
        angle = rng.uniform(0, math.pi)
        a, b = (x - cx) * math.cos(angle) + (y - cy) * math.sin(angle), (y - cy) * math.cos(angle) - (x - cx) * math.sin(angle)
        b = b / rng.uniform(0.35, 1)
        power = (2, 2, 1, 6)[rng.integers(4)]                          # ellipses, lozenges, boxes
        mask = (np.abs(a) ** power + np.abs(b) ** power) < (0.95 * r / 2 ** (0.5 if power == 6 else 0)) ** power
        colour = hue(rng, 0, 360, (0.0, 0.75), (0.1, 0.95))
        look, k = rng.integers(4), rng.uniform(0.3, 2.5)
        if look == 3:                                                  # stripes and checks
            stripe = (a * k * 0.15 % 1 < 0.5) ^ ((b * k * 0.15 % 1 < 0.5) & (rng.random() < 0.4))
            shade = 0.75 + 0.5 * stripe
        else:
            shade = 1 + rng.uniform(0.2, 1.2) * (texture((rng.integers(2), rng.integers(2, 6), rng.integers(6, 9))[look],
                                                         a * k + 300, b * k + 300) - 0.5)
        shade = shade + 0.3 * view.sharp * view.sun * a / r
        depth = far * (near / far) ** ((i + 1) / n)
        view.paint(where, mask, colour * shade[..., None], np.float32(depth))


def scene(rng, height, width):
    """A procedural place. Returns the photo (H,W,3) float32 in [0,1] and its depth (H,W) float32 in metres."""
    view = View(rng, 2 * height, 2 * width)                # drawn at twice the size, against jagged edges
    kind = rng.choice(["street", "town", "country", "forest", "leaves"], p=(0.22, 0.2, 0.24, 0.14, 0.2))
    if kind == "leaves":
        leaves(view)
    else:
        sky(view)
        if kind == "country" or rng.random() < 0.3:
            hills(view)
        ground(view, rng.choice({"street": ["asphalt", "paving"], "town": ["asphalt", "paving", "grass", "water"],
                                 "country": ["grass", "soil", "water", "sand"], "forest": ["grass", "soil"]}[kind]))
        if kind == "street":
            street(view)
        if kind == "town":
            z = rng.uniform(60, 120)
            while z > 7:
                for _ in range(rng.integers(2, 5)):
                    tall = rng.uniform(12, 45) if z > 45 else rng.uniform(4, 12)
                    house(view, rng.uniform(-0.6, 0.6) * z, z * rng.uniform(0.9, 1.1), rng.uniform(6, 18), tall)
                z *= rng.uniform(0.4, 0.6)
        if kind == "country" and rng.random() < 0.5:
            for _ in range(rng.integers(1, 4)):
                z = rng.uniform(25, 90)
                house(view, rng.uniform(-0.4, 0.4) * z, z, rng.uniform(6, 14), rng.uniform(3, 7))
        things = {"street": (0, 4), "town": (0, 6), "country": (1, 9), "forest": (12, 30)}[kind]
        for z in sorted(rng.uniform(4, 9) * np.exp(rng.uniform(0, 2.6, rng.integers(*things))), reverse=True):
            tree(view, rng.uniform(-0.55, 0.55) * z, z, rng.uniform(3, 11))
        if kind in ("street", "town"):
            for z in rng.uniform(6, 45, rng.integers(0, 6)):
                car(view, rng.uniform(-0.3, 0.3) * z, z)
            for z in rng.uniform(3, 25, rng.integers(0, 6)):
                person(view, rng.uniform(-0.4, 0.4) * z, z)
            for z in rng.uniform(5, 40, rng.integers(0, 4)):
                pole(view, rng.choice((-1, 1)) * rng.uniform(2.5, 5), z, rng.uniform(4, 8))
    image = view.colour.reshape(height, 2, width, 2, 3).mean((1, 3))
    depth = view.depth.reshape(height, 2, width, 2).mean((1, 3))
    light = 1 + rng.uniform(-0.06, 0.06, 3).astype(np.float32)
    image = np.clip(image * light * rng.uniform(0.8, 1.15), 0, 1) ** rng.uniform(0.85, 1.2)
    return image.astype(np.float32), depth


# ---------------------------------------------------------------- how weights/ was made

@dataclass
class Pretraining:
    """All settings of `python demo.py pretrain`; our choice, for two cores and an evening's patience."""
    photos: int = 20000             # of the pretraining mixture, each of another scene; a quarter in clear weather
    size: int = 128                 # px
    vae_steps: int = 2500
    vae_batch: int = 8
    vae_crop: int = 64              # px
    vae_lr: float = 2e-3
    kl: float = 1e-6                # weight of the KL term, mean over the latents' elements
    unet_steps: int = 16000
    unet_batch: int = 32
    unet_crop: int = 64             # px; it has no notion of place, and works at 96 px then, at 0.44 of the cost
    unet_lr: float = 4e-4
    latent_scale: float = 1.5       # of the latents that the U-Net sees; the more, the longer content outlives the noise
    ema: float = 0.999
    t_shift: float = -0.1           # noise levels: below 0, more of the low ones, where weather takes its shape
    drop_caption: float = 0.1       # share of empty captions: the null prompt
    teacher_photos: int = 12000     # of the original domain
    teacher_steps: int = 18000
    teacher_batch: int = 16
    teacher_crop: int = 64          # px
    teacher_lr: float = 2e-3
    save_every: int = 250           # steps
    seed: int = 0


SPLITS = {name: i for i, name in enumerate(
    ["pretraining", "pretraining-test", "original", "original-test", "web-degraded", "web-clean"])}


def photo(job):
    """One photo of a split: (clean or None, degraded), uint8 (H,W,3), and the caption's phrases."""
    split, index, kind, domain, height, width, need_clean = job
    rng = np.random.default_rng([SPLITS[split], index, 2409_03455])
    image, depth = scene(rng, height, width)
    degraded, words = add_weather(image, depth, kind, DOMAINS[domain], rng)
    clean = np.asarray(picture(image)) if need_clean else None
    return clean, np.asarray(picture(degraded)), words


def quiet():
    """In a worker process: its parent alone answers to Ctrl-C and SIGTERM."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def render(path, split, count, kinds, domain, size, need_clean):
    """Renders photos on all cores, once: PATH.npy (count,[2,]size,size,3) uint8, 2 for clean and
    degraded, and PATH.json, the captions. Returns both."""
    from tqdm import tqdm
    data, captions = path.with_suffix(".npy"), path.with_suffix(".json")
    shape = (count, 2, size, size, 3) if need_clean else (count, size, size, 3)
    if not captions.exists() or np.load(data, mmap_mode="r").shape != shape:
        captions.unlink(missing_ok=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        array = np.lib.format.open_memmap(data, "w+", np.uint8, shape)
        jobs = [(split, i, kinds[i % len(kinds)], domain, size, size, need_clean) for i in range(count)]
        words = []
        with Pool(os.cpu_count(), initializer=quiet) as pool:
            for i, (clean, degraded, said) in enumerate(tqdm(pool.imap(photo, jobs, 16), f"render {path.name}", count)):
                array[i] = np.stack([clean, degraded]) if need_clean else degraded
                words.append(said)
        array.flush()
        captions.write_text(json.dumps(words))
    return np.load(data, mmap_mode="r"), json.loads(captions.read_text())


def batches(array, size, crop, rng):
    """Endless random crops (B,...,crop,crop,3) uint8 of an array of photos, mirrored half of the time."""
    while True:
        rows = []
        for i in rng.integers(0, len(array), size):
            y, x = rng.integers(0, array.shape[-3] - crop + 1), rng.integers(0, array.shape[-2] - crop + 1)
            part = array[i][..., y:y + crop, x:x + crop, :]
            rows.append(part[..., ::-1, :] if rng.random() < 0.5 else part)
        yield np.stack(rows)


class Trainer:
    """What the three trainings below share: AdamW, warm-up and cosine, EMA, a bar, a checkpoint to go on from."""

    def __init__(self, name, modules, lr, steps, work, config, device):
        import torch
        from tqdm import tqdm
        self.path, self.steps, self.config, self.start = work / f"{name}.pt", steps, config, 0
        self.modules = torch.nn.ModuleDict(modules).to(device, memory_format=torch.channels_last).train()
        self.optimizer = torch.optim.AdamW(self.modules.parameters(), lr=lr, weight_decay=1e-4, betas=(0.9, 0.99),
                                           fused=True)
        self.rate = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda i: min(1, (i + 1) / 200) * (
            0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1, i / steps)))))
        self.average = {k: v.detach().clone() for k, v in self.modules.state_dict().items()}
        self.seconds, self.loss = 0.0, None
        if self.path.exists():
            state = torch.load(self.path, map_location=device, weights_only=True)
            self.modules.load_state_dict(state["modules"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.rate.load_state_dict(state["rate"])
            self.average, self.start, self.seconds = state["average"], state["step"], state["seconds"]
        self.clock = time.time() - self.seconds
        self.bar = tqdm(total=steps, initial=self.start, desc=name, unit="step")

    def step(self, i, loss):
        """One update; every so often a checkpoint. Returns True when the figures should be drawn too."""
        import torch
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.modules.parameters(), 1.0)
        self.optimizer.step()
        self.rate.step()
        keep = min(self.config.ema, (1 + i) / (10 + i))
        with torch.no_grad():
            for k, v in self.modules.state_dict().items():
                if v.is_floating_point():
                    self.average[k].lerp_(v, 1 - keep)
        self.loss = loss.detach() if self.loss is None else self.loss.lerp(loss.detach(), 0.02)
        self.bar.update()
        if (i + 1) % self.config.save_every and i + 1 < self.steps:
            return False
        self.seconds = time.time() - self.clock
        self.bar.set_postfix(loss=f"{float(self.loss):.4f}")
        state = {"modules": self.modules.state_dict(), "optimizer": self.optimizer.state_dict(),
                 "rate": self.rate.state_dict(), "average": self.average, "step": i + 1, "seconds": self.seconds}
        torch.save(state, self.path.with_suffix(".tmp"))
        os.replace(self.path.with_suffix(".tmp"), self.path)
        return True

    def averaged(self):
        """The modules with the averaged weights in them."""
        self.modules.load_state_dict(self.average)
        return self.modules.eval()


def to_tensor(batch, device):
    """(...,H,W,3) uint8 to (...,3,H,W) float32 in [0,1]."""
    import torch
    return torch.from_numpy(np.array(batch)).to(device).movedim(-1, -3).float() / 255


def grid(rows, path):
    """Rows of (B,3,H,W) tensors in [0,1], written as one picture."""
    import torch
    tall = torch.cat([torch.cat(list(row.detach().float().cpu().clamp(0, 1)), -1) for row in rows], -2)      # (3,R*H,B*W)
    picture(tall.permute(1, 2, 0).numpy()).save(path)


def layout(x):
    """The latents that the VAE is taught: (B,3,H,W) in [-1,1] to (B,6,H/2,W/2), linear.

    Of each 2x2 px: luma's mean and its horizontal, vertical and diagonal difference (Haar), and the means of the two
    chromas, doubled. A VAE left to itself wrote all that is fine and coarse into channels of one size, which noise
    drowned together; here, as in a photo's spectrum, the coarse outlives the fine, and a flake is a flake wherever it
    falls. And it is known beforehand: the U-Net's latents cost a convolution.
    """
    import torch
    haar = torch.tensor([[1, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]]).view(4, 1, 2, 2) / 2
    luma = torch.ones(1, 3, 1, 1) / 3 ** 0.5
    chroma = torch.tensor([[1, 0, -1], [1, -2, 1]]).view(2, 3, 1, 1) / torch.tensor([2, 6]).view(2, 1, 1, 1) ** 0.5
    return torch.nn.functional.conv2d(x, torch.cat([haar * luma, 2 * haar[:1] * chroma]).to(x), stride=2)


def new_vae():
    """f = 2, 6 channels. Two groups in its norms: with 8 it began more slowly, in short trials."""
    import torch
    from diffusers import AutoencoderKL
    vae = AutoencoderKL(down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
                        block_out_channels=(24, 48), layers_per_block=1, latent_channels=6, norm_num_groups=2,
                        mid_block_add_attention=False, sample_size=96)
    with torch.no_grad():
        vae.quant_conv.bias[6:] = -6                       # start with little noise in the latents
        vae.quant_conv.weight[6:] *= 0.1
    return vae


def train_vae(config, work, device, autocast):
    """The mini-SD's VAE: L1 and L2 of pixels, L1 of their differences (it keeps the streaks), the layout of its
    latents, and a little KL."""
    import torch
    photos, _ = render(work / "mixture", "pretraining", config.photos, ("clear",) + KINDS, "pretraining", config.size, False)
    torch.manual_seed(config.seed)
    vae = new_vae()
    trainer = Trainer("vae", {"vae": vae}, config.vae_lr, config.vae_steps, work, config, device)
    source = batches(photos, config.vae_batch, config.vae_crop, np.random.default_rng([config.seed, trainer.start]))
    for i in range(trainer.start, trainer.steps):
        x = to_tensor(next(source), device).contiguous(memory_format=torch.channels_last) * 2 - 1
        with autocast():
            posterior = vae.encode(x).latent_dist
            y = vae.decode(posterior.sample()).sample
        error = y.float() - x
        loss = error.abs().mean() + error.square().mean()
        loss = loss + 0.3 * (error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean())
        mean, logvar = posterior.mean.float(), posterior.logvar.float()
        loss = loss + (mean - layout(x)).square().mean()
        loss = loss + config.kl * 0.5 * (mean ** 2 + logvar.exp() - 1 - logvar).mean()
        if trainer.step(i, loss):
            grid([(x[:8] + 1) / 2, (y[:8] + 1) / 2], work / "vae.png")
    return trainer.averaged()["vae"], trainer.seconds


def new_text(folder):
    """A tokenizer of the captions' words (and of single letters for all others) and a small CLIP text model."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer
    phrases = [f"a photo in {amount} {kind}" for amount in ("light", "moderate", "heavy") for kind in KINDS]
    phrases += ["clear weather dark grey bright air small medium large short long streaks flakes faint",
                "falling straight blown to the left right with mist of"]
    words = sorted(set(" ".join(phrases).split()))
    letters = [chr(i) for i in range(33, 127)]
    vocabulary, merges = letters + [c + "</w>" for c in letters], []
    for word in words:
        pieces = list(word[:-1]) + [word[-1] + "</w>"]
        while len(pieces) > 1:                             # grown from the left: s n ow -> sn ow -> snow
            merges += [(pieces[0], pieces[1])] if (pieces[0], pieces[1]) not in merges else []
            pieces = [pieces[0] + pieces[1]] + pieces[2:]
            vocabulary += [pieces[0]] if pieces[0] not in vocabulary else []
    vocabulary += ["<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(vocabulary)}))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(" ".join(pair) for pair in merges) + "\n")
    tokenizer = CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=32)
    config = CLIPTextConfig(vocab_size=len(vocabulary), hidden_size=128, intermediate_size=256, num_hidden_layers=2,
                            num_attention_heads=4, max_position_embeddings=32, bos_token_id=len(vocabulary) - 2,
                            eos_token_id=len(vocabulary) - 1, pad_token_id=len(vocabulary) - 1)
    text = CLIPTextModel(config)
    vectors = text.get_input_embeddings().weight
    vectors.data /= vectors.std() * vectors.shape[1] ** 0.5    # of length 1: CLIP's 0.2 left rare words where they began
    return tokenizer, text


def new_unet():
    """Reads its prompt in cross-attention, as Stable Diffusion does, and, pooled, beside the timestep in every residual
    block, as DeepFloyd IF does: by cross-attention alone, at a quarter of the latents' size, so short a training hardly
    learned to listen."""
    from diffusers import UNet2DConditionModel
    return UNet2DConditionModel(
        sample_size=48, in_channels=6, out_channels=6, block_out_channels=(48, 96, 128, 128), layers_per_block=1,
        down_block_types=("DownBlock2D", "DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
        cross_attention_dim=128, attention_head_dim=4, norm_num_groups=16, addition_embed_type="text",
        addition_embed_type_num_heads=8)


def new_scheduler():
    """Stable Diffusion's own noise schedule, for v-prediction."""
    from diffusers import DDIMScheduler
    return DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type="v_prediction",
                         clip_sample=False, set_alpha_to_one=False, steps_offset=1, timestep_spacing="leading")


def caption(phrases, rng, drop):
    """A caption with some of its phrases left out; empty with probability `drop`."""
    if rng.random() < drop:
        return ""
    first = phrases[0] if rng.random() > 0.1 else " ".join(w for w in phrases[0].split() if w not in ("light", "moderate", "heavy"))
    return ", ".join([first] + [p for p in phrases[1:] if rng.random() > 0.3])


def turned(text):
    """A caption of the mirrored picture."""
    return " ".join({"left": "right", "right": "left"}.get(word, word) for word in text.split())


def train_unet(config, vae, work, device, autocast):
    """The mini-SD's U-Net and text model together: v-prediction over the latents that the VAE is taught."""
    import torch
    from diffusers.models.attention_processor import AttnProcessor
    photos, phrases = render(work / "mixture", "pretraining", config.photos, ("clear",) + KINDS, "pretraining", config.size, False)
    torch.manual_seed(config.seed)
    tokenizer, text = new_text(work / "tokenizer")
    unet, scheduler = new_unet(), new_scheduler()
    unet.set_attn_processor(AttnProcessor())               # so few tokens: a sixth faster than the fused kernel, on a CPU
    trainer = Trainer("unet", {"unet": unet, "text": text}, config.unet_lr, config.unet_steps, work, config, device)
    rng = np.random.default_rng([config.seed, trainer.start])
    generator = torch.Generator().manual_seed(config.seed + trainer.start)
    vae.register_to_config(scaling_factor=config.latent_scale)
    latents = lambda images: layout(to_tensor(images, device) * 2 - 1) * config.latent_scale
    variance = float(latents(photos[:500]).var())
    n, crop = config.unet_batch, config.unet_crop
    for i in range(trainer.start, trainer.steps):
        chosen = rng.integers(0, len(photos), n)
        corners = rng.integers(0, config.size - crop + 1, (n, 2))
        mirror = rng.random(n) < 0.5
        z = latents(np.stack([photos[k, y:y + crop, x:x + crop][:, ::-1 if m else 1]
                              for k, (y, x), m in zip(chosen, corners, mirror)]))
        z = z.contiguous(memory_format=torch.channels_last)
        noise = torch.randn(z.shape, generator=generator).to(z, memory_format=torch.channels_last)
        t = torch.sigmoid(torch.randn(n, generator=generator) + config.t_shift)      # logit-normal (Esser et al. 2024)
        t = (t * scheduler.config.num_train_timesteps).long().to(device)
        said = [caption(phrases[k], rng, config.drop_caption) for k in chosen]
        said = [turned(words) if m else words for words, m in zip(said, mirror)]
        ids = tokenizer(said, padding="max_length", truncation=True, return_tensors="pt").input_ids.to(device)
        with autocast():
            v = unet(scheduler.add_noise(z, noise, t), t, text(ids).last_hidden_state).sample
        error = (v.float() - scheduler.get_velocity(z, noise, t)).square().mean((1, 2, 3))
        abar = scheduler.alphas_cumprod.to(t.device)[t]
        loss = (error / (abar + (1 - abar) * variance)).mean()   # of the target's variance: every t counts alike
        if trainer.step(i, loss) and (i + 1) % (4 * config.save_every) == 0:
            current = {k: p.clone() for k, p in trainer.modules.state_dict().items()}
            save_mini_sd(work / "mini-sd", vae, trainer.averaged(), tokenizer, scheduler)
            trainer.modules.load_state_dict(current)
            trainer.modules.train()
            sample_figure(work / "mini-sd", work / f"unet-{i + 1:06d}.png", device)
    save_mini_sd(work / "mini-sd", vae, trainer.averaged(), tokenizer, scheduler)
    sample_figure(work / "mini-sd", work / "unet.png", device)
    return trainer.seconds


def save_mini_sd(folder, vae, modules, tokenizer, scheduler):
    """Writes diffusers' own folder layout, in fp16 safetensors."""
    import copy
    import torch
    from diffusers import StableDiffusionPipeline
    half = [copy.deepcopy(module).to(torch.float16) for module in (vae, modules["text"], modules["unet"])]
    StableDiffusionPipeline(vae=half[0], text_encoder=half[1], unet=half[2], tokenizer=tokenizer, scheduler=scheduler,
                            safety_checker=None, feature_extractor=None, requires_safety_checker=False).save_pretrained(folder)
    config = folder / "text_encoder" / "config.json"       # else transformers loads it in fp16, beside a U-Net in fp32
    config.write_text(config.read_text().replace('"float16"', '"float32"'))


def load_img2img(folder, device):
    """Stock diffusers' img2img pipeline of a mini-SD, silent."""
    import torch
    from diffusers import StableDiffusionImg2ImgPipeline
    pipe = StableDiffusionImg2ImgPipeline.from_pretrained(folder, torch_dtype=torch.float32, safety_checker=None).to(device)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def img2img(pipe, clear, caption, strength, guidance, steps):
    """`steps` calls of the U-Net, away from clear weather: (B,3,H,W) in [0,1] to the same, on the CPU."""
    import torch
    return pipe([caption] * len(clear), negative_prompt=[CLEAR] * len(clear), image=clear, strength=strength,
                guidance_scale=guidance, num_inference_steps=round(steps / strength), output_type="pt",
                generator=torch.Generator(pipe.device).manual_seed(0)).images.cpu()


def sample_figure(folder, path, device, strength=0.6):
    """Stock img2img from held-out clear scenes: one row clear, then one for each caption."""
    pipe = load_img2img(folder, device)
    clear = np.stack([photo(("pretraining-test", i, "clear", "original", 96, 96, False))[1] for i in range(8)])
    x = to_tensor(clear, device)
    grid([x] + [img2img(pipe, x, f"a photo in heavy {kind}", strength, 3.0, 15) for kind in KINDS], path)


def train_teacher(config, work, device, autocast):
    """One multi-weather Restorer on the original domain, for PSNR (NAFNet's loss): with L1, which lets the network
    pass over what is rare, it gained 0.6 dB on rain in the time in which it gained 3.7 with this."""
    import torch
    from models import Restorer
    photos, _ = render(work / "original", "original", config.teacher_photos, KINDS, "original", config.size, True)
    torch.manual_seed(config.seed)
    teacher = Restorer(width=40, window=config.teacher_crop)
    trainer = Trainer("teacher", {"teacher": teacher}, config.teacher_lr, config.teacher_steps, work, config, device)
    source = batches(photos, config.teacher_batch, config.teacher_crop, np.random.default_rng([config.seed, trainer.start]))
    for i in range(trainer.start, trainer.steps):
        clean, degraded = to_tensor(next(source), device).unbind(1)
        with autocast():
            restored = teacher(degraded.contiguous(memory_format=torch.channels_last))
        mse = (restored.float() - clean).square().mean((1, 2, 3))
        if trainer.step(i, (mse + 1e-5).log10().mean() / 10):          # minus PSNR, in hundreds of dB
            grid([degraded[:8], restored[:8], clean[:8]], work / "teacher.png")
    return trainer.averaged()["teacher"], trainer.seconds


def pretrain(config, work, out, device, stages):
    """Makes weights/: mini-SD and teacher. Every stage resumes, and says how long it took in all."""
    import torch
    from functools import partial
    from models import save_restorer
    work.mkdir(parents=True, exist_ok=True)
    out.mkdir(parents=True, exist_ok=True)
    autocast = partial(torch.autocast, torch.device(device).type, torch.bfloat16)
    if "vae" in stages or "unet" in stages:
        vae, seconds = train_vae(config, work, device, autocast)
        print(f"VAE: {seconds / 60:.0f} minutes")
    if "teacher" in stages:
        teacher, seconds = train_teacher(config, work, device, autocast)
        save_restorer(teacher, out / "teacher.safetensors")
        print(f"teacher: {seconds / 60:.0f} minutes")
    if "unet" in stages:
        seconds = train_unet(config, vae, work, device, autocast)
        shutil.copytree(work / "mini-sd", out / "mini-sd", dirs_exist_ok=True)
        print(f"U-Net: {seconds / 60:.0f} minutes")


# ---------------------------------------------------------------- the folders that d4ir.py reads

WEB_DEGRADED, WEB_CLEAN, TEST = 128, 256, 36            # photos in the demo's folders; our choice
WEB_SIZE, TEST_SIZE = (144, 192), (128, 160)            # px, height and width


def write_photos(folder, task, wanted=("degraded", "clean", "test"), degraded=WEB_DEGRADED, clean=WEB_CLEAN, test=TEST,
                 original=0):
    """Writes the demo's photos as ordinary folders of PNG files; those that are there stay.

    FOLDER/degraded: the web domain in the task's weather; FOLDER/clean: the same domain in good weather, of other scenes;
    FOLDER/test/{input,target}: the original domain, of scenes that the teacher never saw; FOLDER/original: photos that it
    was trained on, degraded.
    """
    from tqdm import tqdm
    kinds = KINDS if task == "all" else (TASKS[task],)
    jobs = []
    if "degraded" in wanted:
        for i in range(degraded):
            kind = kinds[i % len(kinds)]
            jobs.append((("web-degraded", 10_000 * KINDS.index(kind) + i, kind, "web", *WEB_SIZE, False), None, folder / f"degraded/{i:04d}.png"))
    if "clean" in wanted:
        jobs += [(("web-clean", i, "clear", "web", *WEB_SIZE, False), None, folder / f"clean/{i:04d}.png") for i in range(clean)]
    if "original" in wanted:                               # photo 3 i + k of the teacher's has weather k
        for i in range(original):
            kind = kinds[i % len(kinds)]
            jobs.append((("original", len(KINDS) * i + KINDS.index(kind), kind, "original", 128, 128, False), None,
                         folder / f"original/{i:04d}.png"))
    if "test" in wanted:
        for i in range(test):
            kind = kinds[i % len(kinds)]
            jobs.append((("original-test", 10_000 * KINDS.index(kind) + i, kind, "original", *TEST_SIZE, True),
                         folder / f"test/target/{i:04d}.png", folder / f"test/input/{i:04d}.png"))
    jobs = [job for job in jobs if not job[2].exists()]
    for path in {path.parent for _, *paths in jobs for path in paths if path}:
        path.mkdir(parents=True, exist_ok=True)
    if jobs:
        with Pool(os.cpu_count(), initializer=quiet) as pool:
            for _ in tqdm(pool.imap_unordered(write_photo, jobs, 4), "photos  ", len(jobs), disable=None):
                pass


def write_photo(job):
    """Renders one photo and writes it; the degraded one last, so that it says that both are there."""
    what, *paths = job
    for image, path in zip(photo(what), paths):
        if path:
            Image.fromarray(image).save(path.with_suffix(".tmp"), "PNG")
            os.replace(path.with_suffix(".tmp"), path)


def weather_figure(path):
    """One row for each weather in each domain, eight scenes each, for the README."""
    import torch
    rows = []
    for kind in KINDS:
        for domain in DOMAINS:
            made = [photo(("web-clean", 100 + 8 * len(rows) + i, kind, domain, 128, 128, False))[1] for i in range(8)]
            rows.append(to_tensor(np.stack(made), torch.device("cpu")))
    grid(rows, path)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    drawn = commands.add_parser("figure", help="every weather of every domain, side by side")
    drawn.add_argument("--out", type=Path, default=Path("weather.png"))
    folders = commands.add_parser("photos", help="the folders that d4ir.py makes for itself")
    folders.add_argument("--task", choices=(*TASKS, "all"), required=True)
    folders.add_argument("--out", type=Path, default=Path("photos"))
    pre = commands.add_parser("pretrain", help="make weights/: mini-SD and teacher")
    pre.add_argument("--work", type=Path, default=Path("runs/pretrain"), help="renderings, checkpoints, figures")
    pre.add_argument("--weights", type=Path, default=HERE / "weights", help="where the finished weights go")
    pre.add_argument("--device", default=None)
    pre.add_argument("--stage", nargs="+", choices=("vae", "unet", "teacher"), default=("vae", "unet", "teacher"))
    for name, value in asdict(Pretraining()).items():
        pre.add_argument("--" + name.replace("_", "-"), type=type(value), default=value)
    args = vars(parser.parse_args())
    if args["command"] == "figure":
        return weather_figure(args["out"])
    if args["command"] == "photos":
        return write_photos(args["out"], args["task"])
    import torch
    device = args.pop("device") or ("cuda" if torch.cuda.is_available() else "cpu")
    config = Pretraining(**{name: args[name] for name in asdict(Pretraining())})
    pretrain(config, args["work"], args["weights"], device, args["stage"])


if __name__ == "__main__":
    main()
