"""Synthetic haze, rain and snow on images with a depth map, and captions that describe them.

    haze   I = J t + A (1 - t),  t = exp(-beta d)              (Koschmieder 1924)
    snow   I = J (1 - a) + W a,  a: opacity of four layers of flakes that differ in size, focus and
           motion blur
    rain   the same with three layers of streaks of one direction; optionally preceded by haze, for
           the distant drops that form a veil

J is the clean image, d its depth in metres, A the airlight, W the brightness of the particles.
One `Weather` describes each domain: *original* (the teacher's training data), *web* (photos found
on the web) and *pretraining* (the mini-SD's training data).
"""
import io
import math
from dataclasses import dataclass

import numpy as np
from PIL import Image

KINDS = ("haze", "rain", "snow")
CLEAR = "a photo in clear weather"
AMOUNTS = ("light", "moderate", "heavy")


@dataclass(frozen=True)
class Weather:
    """Ranges from which the weather of one domain is drawn, uniformly for each photo."""
    beta: tuple = (0.004, 0.03)         # 1/m, haze density: optical depth 0.4 to 3 at 100 m
    airlight: tuple = (0.75, 1.0)       # brightness of the haze, in [0,1]
    tint: float = 0.02                  # colour cast of the haze: at most +- this, per channel
    uneven: float = 0.0                 # spatial variation: 0 is uniform, 1 varies from 0 to 2 x
    flake_cover: tuple = (0.04, 0.24)   # snow: fraction of the photo covered by flakes
    flake_size: tuple = (0.7, 2.2)      # px, radius in the middle layers; 0.5 x (far) to 2 x (near)
    flake_blur: tuple = (0.0, 3.0)      # px, motion blur in the middle layers
    flake_opacity: tuple = (0.6, 1.0)
    streak_cover: tuple = (0.05, 0.20)  # rain: fraction of the photo covered by streaks
    streak_length: tuple = (14.0, 60.0)  # px
    streak_width: tuple = (0.6, 1.2)    # px
    streak_angle: tuple = (-30.0, 30.0)  # degrees from the vertical
    streak_opacity: tuple = (0.4, 0.9)
    veil: tuple = (0.0, 0.0)            # 1/m, density of the haze that accompanies rain and snow
    mixed: float = 0.0                  # probability of some snow in rain, or some rain in snow
    exposure: float = 0.0               # max. relative contrast change; brightness: 0.3 times that
    defocus: float = 0.0                # probability of a defocused scene behind sharp rain or snow
    blur: float = 0.0                   # px, maximum standard deviation of the lens blur
    noise: float = 0.0                  # maximum standard deviation of the sensor noise
    jpeg: tuple = ()                    # JPEG quality; empty: no compression


# Similar to Rain100L, SOTS and Snow100K: one kind of weather, uniform and sharp, on good photos.
ORIGINAL = Weather()

# Similar to photos found on the web: shorter and fainter streaks, veiled, uneven, mixed, noisy and
# compressed.
WEB = Weather(
    beta=(0.003, 0.04), airlight=(0.6, 0.97), tint=0.05, uneven=0.6,
    flake_cover=(0.02, 0.16), flake_size=(0.6, 1.8), flake_blur=(0.0, 6.0),
    flake_opacity=(0.45, 0.95),
    streak_cover=(0.05, 0.22), streak_length=(7.0, 34.0), streak_width=(0.5, 1.1),
    streak_angle=(-35.0, 35.0), streak_opacity=(0.2, 0.6),
    veil=(0.0, 0.012), mixed=0.15, exposure=0.2, blur=0.6, noise=0.02, jpeg=(50, 95))

# Covers most of both domains above, as Stable Diffusion's training data does.
PRETRAINING = Weather(
    beta=(0.003, 0.045), airlight=(0.6, 1.0), tint=0.05, uneven=0.5,
    flake_cover=(0.01, 0.24), flake_size=(0.5, 2.4), flake_blur=(0.0, 6.0),
    flake_opacity=(0.45, 1.0),
    streak_cover=(0.01, 0.22), streak_length=(6.0, 64.0), streak_width=(0.5, 1.3),
    streak_angle=(-38.0, 38.0), streak_opacity=(0.2, 0.85),
    veil=(0.0, 0.012), mixed=0.08, exposure=0.15, defocus=0.5, blur=0.4, noise=0.01,
    jpeg=(60, 98))

DOMAINS = {"original": ORIGINAL, "web": WEB, "pretraining": PRETRAINING}


def add_weather(image, depth, kind, weather, rng):
    """Adds weather of one kind to a clean image, then simulates the camera.

    image: (H,W,3) float32 in [0,1]
    depth: (H,W) float32, metres
    kind: "haze", "rain", "snow" or "clear"
    Returns the degraded image, (H,W,3) float32 in [0,1], and its caption: a list of phrases, the
    most important first. Raises ValueError for any other kind.
    """
    if kind not in KINDS + ("clear",):
        raise ValueError(f"kind must be one of {KINDS + ('clear',)}, not {kind!r}")
    height, width = depth.shape
    grey = rng.uniform(*weather.airlight)
    cast = rng.uniform(-weather.tint, weather.tint, 3)
    airlight = np.clip(grey + cast, 0, 1).astype(np.float32)
    beta = draw_beta(rng, kind, weather)
    drawn = {"beta": beta, "airlight": grey, "veil": beta}
    if beta > 0:
        density = beta * relative_density(rng, height, width, weather)
        t = np.exp(-density * depth)[..., None]
        image = image * t + airlight * (1 - t)
    if kind != "haze" and weather.defocus and rng.random() < weather.defocus:
        image = defocus(image, rng)
    if kind in ("rain", "snow"):
        amounts = {kind: 1.0}
        if rng.random() < weather.mixed:
            amounts["snow" if kind == "rain" else "rain"] = 0.3
        for falling, amount in amounts.items():
            draw_opacity = {"snow": snow_opacity, "rain": rain_opacity}[falling]
            opacity, parameters = draw_opacity(rng, height, width, weather, amount)
            opacity = opacity * relative_density(rng, height, width, weather)
            opacity = np.clip(opacity, 0, 1)[..., None]
            darkest = {"snow": 0.88, "rain": 0.75}[falling]
            white = np.float32(rng.uniform(darkest, 1.0))
            image = image * (1 - opacity) + white * opacity
            if falling == kind:
                drawn |= parameters
    return simulate_camera(image, weather, rng), describe(kind, drawn)


def draw_beta(rng, kind, weather):
    """Haze density in 1/m: for haze, small values are more likely; for rain and snow, the veil."""
    if kind == "clear":
        return 0.0
    if kind == "haze":
        low, high = weather.beta
        return rng.uniform(low ** 0.5, high ** 0.5) ** 2
    low, high = weather.veil
    return max(0.0, rng.uniform(low - 0.3 * high, high))


def relative_density(rng, height, width, weather):
    """Density of the weather relative to its mean: (H,W), smooth, about 1 +- weather.uneven."""
    contrast = rng.uniform(0, weather.uneven + 1e-9)
    coarse = Image.fromarray(rng.uniform(-1, 1, (4, 4)).astype(np.float32))
    return 1 + contrast * np.asarray(coarse.resize((width, height), Image.BICUBIC))


# Share of the cover, sharpness and opacity of each layer, from far (small, many) to near.
SNOW_LAYERS = ((0.45, 4, 0.8), (0.3, 5, 1.0), (0.17, 3, 0.9), (0.08, 2, 0.5))
# Share of the cover, length, width and opacity of each layer.
RAIN_LAYERS = ((0.45, 0.5, 0.8, 0.7), (0.35, 1, 1, 1), (0.2, 1.5, 1.2, 0.9))


def snow_opacity(rng, height, width, weather, amount=1.0):
    """Opacity (H,W) in [0,1] of falling snow, and the drawn parameters, a dict for `describe`."""
    angle = math.radians(rng.normal(0, 25))
    cover = rng.uniform(*weather.flake_cover)
    size = rng.uniform(*weather.flake_size)
    blur = rng.uniform(*weather.flake_blur)
    opacity = rng.uniform(*weather.flake_opacity)
    transmission = np.ones((height, width), np.float32)
    for i, (share, sharpness, visibility) in enumerate(SNOW_LAYERS):
        scale = 0.5 * 4 ** (i / (len(SNOW_LAYERS) - 1))
        layer_angle = angle + rng.normal(0, 0.15)
        layer = particles(rng, height, width, amount * cover * share, blur * scale + 0.01,
                          max(0.45, size * scale), layer_angle, sharpness)
        transmission *= 1 - opacity * visibility * layer
    return 1 - transmission, {"cover": cover, "size": size, "angle": angle}


def rain_opacity(rng, height, width, weather, amount=1.0):
    """Opacity (H,W) in [0,1] of falling rain, and the drawn parameters, a dict for `describe`."""
    angle = math.radians(rng.uniform(*weather.streak_angle))
    cover = rng.uniform(*weather.streak_cover)
    length = rng.uniform(*weather.streak_length)
    size = rng.uniform(*weather.streak_width)
    opacity = rng.uniform(*weather.streak_opacity)
    transmission = np.ones((height, width), np.float32)
    for share, relative_length, relative_width, visibility in RAIN_LAYERS:
        layer_angle = angle + rng.normal(0, 0.02)
        layer = particles(rng, height, width, amount * cover * share, length * relative_length,
                          max(0.4, size * relative_width), layer_angle, 2)
        transmission *= 1 - opacity * visibility * layer
    drawn = {"cover": cover, "length": length, "opacity": opacity, "angle": angle}
    return 1 - transmission, drawn


def particles(rng, height, width, cover, length, size, angle, sharpness):
    """Opacity (H,W) in [0,1] of flakes or streaks: random points, convolved with one shape.

    cover: approximate fraction of the photo covered
    length: px, motion during the exposure
    size: px, radius
    angle: radians from the vertical
    sharpness: exponent of the profile; 2 is a Gaussian (out of focus), 6 nearly a disk
    """
    if cover <= 0:
        return np.zeros((height, width), np.float32)
    h, w = height + 96, width + 96          # the FFT's convolution is circular: leave a margin
    area = 2 * size * length + 3 * size ** 2
    count = rng.poisson(cover * h * w / area)
    positions = rng.integers(0, h * w, count)
    points = np.zeros(h * w, np.float32)
    np.add.at(points, positions, rng.uniform(0.3, 1, count).astype(np.float32))
    y = np.fft.fftfreq(h, 1 / h).astype(np.float32)[:, None]
    x = np.fft.fftfreq(w, 1 / w).astype(np.float32)[None]
    along = y * math.cos(angle) + x * math.sin(angle)
    across = x * math.cos(angle) - y * math.sin(angle)
    beyond = np.maximum(np.abs(along) - length / 2, 0)      # distance to a segment of this length
    shape = np.exp(-((beyond ** 2 + across ** 2) / size ** 2) ** (sharpness / 2))
    spectrum = np.fft.rfft2(points.reshape(h, w)) * np.fft.rfft2(shape)
    opacity = np.fft.irfft2(spectrum, s=(h, w))[:height, :width]
    return np.clip(opacity, 0, 1).astype(np.float32)


# ---------------------------------------------------------------- captions

def describe(kind, drawn):
    """The caption of a photo as a list of phrases: kind, amount and appearance of its weather.

    drawn: the parameters that were drawn for the photo. Words such as "heavy" refer to thirds of
    the pretraining domain's ranges.
    """
    ranges = PRETRAINING
    if kind == "clear":
        return [CLEAR]
    if kind == "haze":
        amount = grade(drawn["beta"], ranges.beta, AMOUNTS)
        tone = grade(drawn["airlight"], ranges.airlight, ("dark", "grey", "bright"))
        return [f"a photo in {amount} haze", f"{tone} air"]
    if kind == "snow":
        amount = grade(drawn["cover"], ranges.flake_cover, AMOUNTS)
        size = grade(drawn["size"], ranges.flake_size, ("small", "medium", "large"))
        phrases = [f"a photo in {amount} snow", f"{size} flakes"]
    else:
        amount = grade(drawn["cover"], ranges.streak_cover, AMOUNTS)
        length = grade(drawn["length"], ranges.streak_length, ("short", "medium", "long"))
        opacity = grade(drawn["opacity"], ranges.streak_opacity, ("faint", "clear", "bright"))
        phrases = [f"a photo in {amount} rain", f"{length} streaks", opacity]
    phrases.append(slant(drawn["angle"]))
    if drawn["veil"] > 0.004:
        phrases.append("with mist")
    return phrases


def grade(value, limits, words):
    """The word for a value's position between two limits."""
    low, high = limits
    index = int((value - low) / (high - low) * len(words))
    return words[min(len(words) - 1, max(0, index))]


def slant(angle):
    """The phrase for the direction of rain or snow, in radians from the vertical."""
    if abs(angle) < 0.14:
        return "falling straight"
    return "blown to the left" if angle < 0 else "blown to the right"


# ---------------------------------------------------------------- camera

def simulate_camera(image, weather, rng):
    """Exposure, lens blur, sensor noise and JPEG: (H,W,3) floats in [0,1] to the same, float32."""
    if weather.exposure:
        gain = 1 + rng.uniform(-weather.exposure, weather.exposure)
        offset = rng.uniform(-0.3, 0.3) * weather.exposure
        image = (image - 0.5) * gain + 0.5 + offset
    sigma = rng.uniform(0, weather.blur + 1e-9)
    if sigma > 0.2:
        image = gaussian_blur(image, sigma)
    if weather.noise:
        noise = rng.normal(0, 1, image.shape).astype(np.float32)
        image = image + noise * rng.uniform(0, weather.noise)
    image = np.clip(image, 0, 1).astype(np.float32)
    if weather.jpeg:
        file = io.BytesIO()
        to_pil(image).save(file, "JPEG", quality=int(rng.integers(*weather.jpeg)))
        image = np.asarray(Image.open(file), np.float32) / 255
    return image


def gaussian_blur(image, sigma):
    """(H,W,3), blurred with a separable kernel of 5 x 5 px."""
    kernel = np.exp(-0.5 * (np.arange(-2, 3) / sigma) ** 2).astype(np.float32)
    kernel /= kernel.sum()
    height, width = image.shape[:2]
    padded = np.pad(image, ((2, 2), (0, 0), (0, 0)), mode="edge")
    image = sum(kernel[i] * padded[i:i + height] for i in range(5))
    padded = np.pad(image, ((0, 0), (2, 2), (0, 0)), mode="edge")
    return sum(kernel[i] * padded[:, i:i + width] for i in range(5))


def defocus(image, rng):
    """A strongly blurred version of an image (H,W,3) in [0,1], as behind near rain or snow."""
    height, width = image.shape[:2]
    scale = rng.uniform(0.04, 0.12)
    small = (round(scale * width), round(scale * height))
    coarse = to_pil(image).resize(small, Image.BOX)
    return np.asarray(coarse.resize((width, height), Image.BICUBIC), np.float32) / 255


def to_pil(image):
    """(H,W,3) floats in [0,1] to an 8-bit PIL image."""
    return Image.fromarray((np.clip(image, 0, 1) * 255 + 0.5).astype(np.uint8))
