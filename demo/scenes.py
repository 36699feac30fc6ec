"""Procedural scenes with a depth map: the demo's photos, before any weather.

A scene shows sky, hills, ground, a street or houses, trees, cars and people through a pinhole
camera, or overlapping textured shapes of all sizes (dead leaves: Lee et al. 2001). Networks trained
on such shapes transfer to photos (Achddou et al. 2021, Baradad et al. 2021). Depth is in metres.

`render_scene` composes a scene. The functions above it draw one element each, onto a `Canvas`.
"""
import math

import numpy as np


# ---------------------------------------------------------------- textures and colours

TEXTURE_SIDE = 256          # px; textures repeat


def make_textures(rng):
    """Tileable textures (N,256,256), about [0,1]: isotropic and directional noise, 1/f^slope."""
    fy = np.fft.fftfreq(TEXTURE_SIDE)[:, None] * TEXTURE_SIDE
    fx = np.fft.rfftfreq(TEXTURE_SIDE)[None] * TEXTURE_SIDE
    isotropic = [(0.7, 1), (0.9, 1), (1.1, 1), (1.3, 1), (1.6, 1), (2.0, 1)]    # (slope, stretch)
    directional = [(1.0, 4), (1.0, 0.25), (1.4, 6)]
    textures = []
    for slope, stretch in isotropic + directional:
        radius = np.sqrt((fx * stretch) ** 2 + (fy / stretch) ** 2)
        radius[0, 0] = np.inf
        phase = rng.normal(size=radius.shape) + 1j * rng.normal(size=radius.shape)
        noise = np.fft.irfft2(phase * radius ** -slope, s=(TEXTURE_SIDE, TEXTURE_SIDE))
        textures.append(0.5 + 0.2 * noise / noise.std())
    return np.asarray(textures, np.float32)


TEXTURES = make_textures(np.random.default_rng(0))
ROUGH, MEDIUM, SMOOTH = (0, 1), (2, 3), (4, 5)      # indices of isotropic textures
HORIZONTAL, VERTICAL = 6, 7                         # and of directional ones


def texture(index, u, v):
    """The texture's values at (u, v), in its own pixels."""
    rows = v.astype(np.int32) & (TEXTURE_SIDE - 1)
    columns = u.astype(np.int32) & (TEXTURE_SIDE - 1)
    return TEXTURES[index][rows, columns]


def hash_uniform(a, b, salt):
    """A reproducible pseudo-random number in [0,1] for each pair of integers (a, b)."""
    n = a.astype(np.int64) * 73856093 ^ b.astype(np.int64) * 19349663 ^ int(salt) * 83492791
    return ((n * 2654435761 >> 8) & 0xFFFF).astype(np.float32) / 65535


def random_colour(rng, low, high, saturation, value):
    """An RGB colour (3,): hue in [low, high] degrees, saturation and value in their ranges."""
    hue = rng.uniform(low, high) % 360 / 60
    s = rng.uniform(*saturation)
    v = rng.uniform(*value)
    k = (np.array([5, 3, 1]) + hue) % 6
    return (v - v * s * np.clip(np.minimum(k, 4 - k), 0, 1)).astype(np.float32)


# ---------------------------------------------------------------- camera and canvas

class Canvas:
    """An image under construction, with its camera and lighting.

    colour: (H,W,3) float32; depth: (H,W) float32, metres
    x: (1,W), y: (H,1): the ray through each pixel is (x, y, 1), y downwards
    camera: metres above the ground; sun: -1 (left) to 1 (right)
    contrast: between lit and shaded sides, 0.3 (overcast) to 1 (sunny)
    """

    def __init__(self, rng, height, width):
        self.rng, self.height, self.width = rng, height, width
        self.focal = rng.uniform(0.7, 1.4) * max(width, height)
        self.horizon = rng.uniform(0.35, 0.65) * height
        if rng.random() < 0.75:
            self.camera = rng.uniform(1.4, 2.5)
        else:
            self.camera = rng.uniform(4, 14)
        columns = np.arange(width, dtype=np.float32) - rng.uniform(0.4, 0.6) * width
        rows = np.arange(height, dtype=np.float32) - self.horizon
        self.x = (columns / self.focal)[None]
        self.y = (rows / self.focal)[:, None]
        self.colour = np.zeros((height, width, 3), np.float32)
        self.depth = np.full((height, width), 1000.0, np.float32)
        self.sun = rng.uniform(-1, 1)
        self.contrast = rng.uniform(0.3, 1.0)

    def brightness_of_side(self, side):
        """Brightness of a surface that faces left (-1), right (1) or the camera (0)."""
        return 1 + 0.35 * self.contrast * self.sun * side

    def upright_plane(self, x, z, half_width, top, bottom=0):
        """Coordinates on an upright plane that faces the camera at z metres, centred on x.

        top, bottom: metres above the ground
        Returns (where, u, h): the slices of the image that contain it and, for each of their
        pixels, the metres to the right of x and above the ground. None if it is outside the image.
        """
        left, right = np.searchsorted(self.x[0], ((x - half_width) / z, (x + half_width) / z))
        limits = ((self.camera - top) / z, (self.camera - bottom) / z)
        first, last = np.searchsorted(self.y[:, 0], limits)
        if left >= right or first >= last:
            return None
        where = (slice(first, last), slice(left, right))
        u = self.x[:, where[1]] * z - x + np.zeros_like(self.y[where[0]])
        h = self.camera - self.y[where[0]] * z + np.zeros_like(u)
        return where, u, h

    def paint(self, where, mask, colour, depth):
        """Sets colour and depth inside the mask, except where a nearer surface is painted."""
        mask = mask & (depth < self.depth[where])
        self.colour[where] = np.where(mask[..., None], colour, self.colour[where])
        self.depth[where] = np.where(mask, depth, self.depth[where])


WHOLE = (slice(None), slice(None))


# ---------------------------------------------------------------- landscape

def sky(canvas):
    rng = canvas.rng
    blue = (random_colour(rng, 205, 225, (0.35, 0.7), (0.55, 0.9)),
            random_colour(rng, 195, 220, (0.05, 0.25), (0.8, 0.98)))
    grey = (random_colour(rng, 200, 230, (0.0, 0.12), (0.5, 0.8)),
            random_colour(rng, 200, 230, (0.0, 0.08), (0.7, 0.95)))
    sunset = (random_colour(rng, 215, 270, (0.3, 0.5), (0.3, 0.6)),
              random_colour(rng, 15, 45, (0.3, 0.7), (0.8, 1.0)))
    zenith, horizon = (blue, grey, sunset)[rng.choice(3, p=(0.5, 0.35, 0.15))]
    up = np.clip(-canvas.y / max(1e-3, -canvas.y[0, 0]), 0, 1)[..., None] ** 0.7
    colour = np.broadcast_to(zenith * up + horizon * (1 - up), canvas.colour.shape)
    far = 1 / (np.maximum(-canvas.y, 0) + 0.06)
    u = (canvas.x * far) * 60
    v = far * 60 + np.zeros_like(canvas.x)
    coarse = texture(5, u + rng.integers(256), v)
    fine = texture(3, 2 * u, 2 * v + rng.integers(256))
    clouds = 0.6 * coarse + 0.4 * fine
    cover = np.clip((clouds - rng.uniform(0.35, 0.75)) * 4, 0, 1)[..., None]
    cover = cover * rng.uniform(0.3, 0.9)
    canvas.colour[:] = colour * (1 - cover) + cover * np.float32(0.75 + 0.22 * rng.random())
    canvas.depth[:] = rng.uniform(400, 900)


def hills(canvas):
    rng = canvas.rng
    green = rng.random() < 0.6
    z = rng.uniform(150, 380)
    across = np.arange(canvas.width)
    rows = np.arange(canvas.height)[:, None] + np.zeros_like(canvas.x)
    columns = across[None] + np.zeros_like(canvas.y)
    for _ in range(rng.integers(1, 4)):
        height = rng.uniform(0.03, 0.16) * z
        u = across * rng.uniform(0.2, 0.8) + rng.integers(256)
        outline = texture(5 if green else 4, u, np.full(canvas.width, rng.integers(256)))
        outline = outline + 0.15 * texture(3, across, np.full(canvas.width, 7))
        top = -(height * np.clip(outline - 0.2, 0.05, 1.5) - canvas.camera) / z
        if green:
            base = random_colour(rng, 80, 140, (0.2, 0.5), (0.15, 0.4))
        else:
            base = random_colour(rng, 15, 60, (0.1, 0.35), (0.25, 0.6))
        fine = texture(1, columns, rows * 1.5 + z)
        coarse = texture(4, columns + z, rows)
        shade = 0.6 + 0.8 * (0.5 * fine + 0.5 * coarse)
        canvas.paint(WHOLE, canvas.y > top[None], base * shade[..., None], np.float32(z))
        z *= rng.uniform(0.5, 0.8)


def ground(canvas, kind):
    """The ground plane: grass, soil, asphalt, paving, water or sand, and sometimes a road."""
    rng = canvas.rng
    first = int(np.searchsorted(canvas.y[:, 0], 0.004))         # the first row below the horizon
    if first >= canvas.height:
        return
    where = (slice(first, None), slice(None))
    z = canvas.camera / canvas.y[where[0]]
    u = canvas.x * z
    v = z + np.zeros_like(canvas.x)
    colours = {"grass": random_colour(rng, 65, 125, (0.35, 0.7), (0.25, 0.6)),
               "soil": random_colour(rng, 20, 45, (0.25, 0.55), (0.3, 0.6)),
               "asphalt": random_colour(rng, 200, 260, (0.0, 0.1), (0.25, 0.5)),
               "paving": random_colour(rng, 10, 50, (0.02, 0.25), (0.4, 0.75)),
               "water": random_colour(rng, 180, 220, (0.2, 0.5), (0.25, 0.6)),
               "sand": random_colour(rng, 35, 50, (0.2, 0.45), (0.6, 0.85))}
    base = colours[kind]
    near = np.clip(12 / z, 0.25, 1)         # fades fine texture where it is smaller than a pixel
    fine = texture(rng.choice(ROUGH), u * 40, v * 40) - 0.5
    coarse = texture(rng.choice(MEDIUM), u * 6 + 31, v * 6) - 0.5
    shade = 1 + rng.uniform(0.5, 1.3) * near * fine + 0.7 * coarse
    if kind == "water":
        waves = texture(HORIZONTAL, u * 8, v * 30) - 0.5
        mirrored = np.clip(int(canvas.horizon) - np.arange(z.shape[0]), 0, None)
        reflection = canvas.colour[mirrored]
        colour = base * 0.45 + 0.5 * reflection * (1 + (1.6 * near * waves)[..., None])
    else:
        colour = base * shade[..., None]
    if kind == "paving":
        size = rng.uniform(0.4, 1.2)
        joint = (u / size % 1 < 0.06) | (v / size % 1 < 0.06)
        colour = np.where((joint & (z < 25))[..., None], colour * 0.65, colour)
    canvas.paint(where, np.ones(u.shape, bool), colour, v)
    natural = kind in ("grass", "soil", "sand")
    if kind == "asphalt" or (natural and rng.random() < 0.5):
        road(canvas, where, u, v, fine * near)


def road(canvas, where, u, v, fine):
    """A curved road with markings on the ground, u metres to the right and v metres away."""
    rng = canvas.rng
    half_width, bend = rng.uniform(2.5, 5), rng.uniform(-0.004, 0.004)
    offset = u - rng.uniform(-3, 3) - bend * v ** 2
    grey = random_colour(rng, 200, 260, (0.0, 0.08), (0.25, 0.5))
    colour = grey * (1 + 0.7 * fine)[..., None]
    line_width = 0.1 + 0.01 * v
    edge_line = np.abs(np.abs(offset) - half_width * 0.92) < line_width
    centre_line = (np.abs(offset) < line_width) & (v % 6 < 3.5)
    colour = np.where((edge_line | centre_line)[..., None], np.float32(0.85), colour)
    inside = np.abs(offset) < half_width
    canvas.colour[where] = np.where(inside[..., None], colour, canvas.colour[where])


# ---------------------------------------------------------------- buildings

def masonry(rng, u, h, salt, z):
    """Colour (...,3) of a wall at u metres along, h metres up: plaster or brick, with windows."""
    palette = [random_colour(rng, 0, 40, (0.25, 0.6), (0.35, 0.7)),
               random_colour(rng, 20, 60, (0.05, 0.35), (0.55, 0.92)),
               random_colour(rng, 190, 240, (0.02, 0.25), (0.35, 0.75))]
    base = palette[rng.integers(3)]
    fine = texture(rng.choice(ROUGH), u * 30, h * 30) - 0.5
    coarse = texture(rng.choice(SMOOTH), u * 5 + 7, h * 9) - 0.5
    colour = base * (1 + 0.5 * fine + 0.5 * coarse)[..., None]
    if rng.random() < 0.4:                                      # brick
        course = np.floor(h / 0.3)
        joint = (h / 0.3 % 1 < 0.15) | ((u / 0.6 + 0.5 * (course % 2)) % 1 < 0.08)
        colour = np.where((joint & (z < 20))[..., None], colour * 0.75, colour)
    spacing, storey = rng.uniform(1.6, 3.5), rng.uniform(2.6, 3.6)      # metres
    a = np.abs(u / spacing % 1 - 0.5)
    b = np.abs(h / storey % 1 - 0.55)
    w, t = rng.uniform(0.2, 0.42), rng.uniform(0.2, 0.38)
    window = (a < w) & (b < t)
    frame = window & ((a > w - 0.04) | (b > t - 0.04) | (a < 0.02))
    glow = hash_uniform(np.floor(u / spacing), np.floor(h / storey), salt)
    pane = np.float32([0.18, 0.21, 0.26]) + (glow[..., None] ** 3) * np.float32([0.6, 0.6, 0.55])
    colour = np.where(window[..., None], pane, colour)
    return np.where(frame[..., None], np.float32(0.8 if base.mean() < 0.7 else 0.3), colour)


def house(canvas, x, z, width, height):
    """A facade that faces the camera, with a flat or a pitched roof."""
    rng = canvas.rng
    roof = 0
    if height < 11 and rng.random() < 0.7:
        roof = rng.uniform(0.2, 0.45) * width
    visible = canvas.upright_plane(x, z, width * 0.55, height + roof)
    if visible is None:
        return
    where, u, h = visible
    colour = masonry(rng, u, h, rng.integers(1 << 20), z)
    colour = colour * canvas.brightness_of_side(0.6 * np.sign(-x))
    if rng.random() < 0.6:
        tiles = random_colour(rng, 0, 30, (0.3, 0.6), (0.3, 0.6))
    else:
        tiles = random_colour(rng, 200, 250, (0.0, 0.2), (0.2, 0.45))
    courses = 0.25 * (h / 0.35 % 1 < 0.25)
    tiles = tiles * (0.75 + 0.5 * texture(ROUGH[0], u * 25, h * 25) - courses)[..., None]
    if rng.random() < 0.5:
        roofline = height + roof * (1 - np.abs(u) / (0.55 * width))
    else:
        roofline = height + roof * (np.abs(u) < 0.52 * width)
    colour = np.where((h > height)[..., None], tiles, colour)
    over_walls = np.abs(u) < width / 2
    outline = np.where(over_walls, np.maximum(roofline, height), roofline * (roof > 0))
    canvas.paint(where, h < outline, colour, np.float32(z))


def street(canvas):
    """Rows of houses along both sides of a street, in perspective."""
    rng = canvas.rng
    for side in (-1, 1):
        if rng.random() < 0.15:
            continue
        away = side * rng.uniform(4, 9)
        columns = np.flatnonzero(canvas.x[0] * side > 0.01)
        if not len(columns):
            continue
        where = (slice(None), slice(columns[0], columns[-1] + 1))
        z = away / canvas.x[:, where[1]] + np.zeros_like(canvas.y)
        h = canvas.camera - canvas.y * z
        length = rng.uniform(8, 16)
        house_number = np.floor(z / length)
        zero = house_number * 0
        salt = rng.integers(1 << 20)
        height = 5 + rng.uniform(4, 14) * hash_uniform(house_number, zero, salt)
        colour = masonry(rng, z % length, h, salt, z)
        brightness = 0.6 + 0.4 * hash_uniform(house_number, zero, salt + 1)
        tone = [brightness + 0.2 * hash_uniform(house_number, zero + channel, salt + 2)
                for channel in range(3)]
        shop = (h < 2.6) & (np.abs(z / (length / 2) % 1 - 0.5) < 0.35)
        awning = random_colour(rng, 0, 360, (0.3, 0.8), (0.3, 0.7))
        awning = awning * (0.8 + 0.3 * (z / 0.5 % 1 < 0.5))[..., None]
        goods = 0.25 * (texture(3, z * 20, h * 20) - 0.4)[..., None]
        colour = np.where(shop[..., None], np.float32([0.2, 0.2, 0.22]) + goods, colour)
        colour = np.where(((h > 2.6) & (h < 3))[..., None], awning, colour)
        shade = canvas.brightness_of_side(-side) * (0.8 + 0.2 * np.clip(h / 6, 0, 1))
        inside = (h > 0) & (h < height) & (z < 160)
        canvas.paint(where, inside, colour * np.stack(tone, -1) * shade[..., None], z)


# ---------------------------------------------------------------- objects

def tree(canvas, x, z, height):
    rng = canvas.rng
    palette = [random_colour(rng, 75, 130, (0.35, 0.75), (0.2, 0.55)),
               random_colour(rng, 20, 55, (0.5, 0.85), (0.4, 0.75)),
               random_colour(rng, 90, 150, (0.25, 0.5), (0.15, 0.35))]
    foliage = palette[rng.choice(3, p=(0.6, 0.2, 0.2))]
    conifer = rng.random() < 0.3
    radius = height * (rng.uniform(0.16, 0.24) if conifer else rng.uniform(0.28, 0.42))
    trunk(canvas, x, z, max(0.12, 0.03 * height), height * 0.6)
    visible = canvas.upright_plane(x, z, 1.3 * radius, height * 1.05, height * 0.12)
    if visible is None:
        return
    where, u, h = visible
    scale = 60 / max(height, 1e-3)
    shift = rng.integers(256)
    clumps = texture(4, u * scale * 1.5 + shift, h * scale * 1.5) - 0.5
    fine = texture(1, u * scale * 5 + shift, h * scale * 5) - 0.5
    if conifer:
        outline = np.abs(u) / (radius * np.clip(1.02 - h / height, 0, 1) + 1e-3)
        inside = outline + 0.9 * fine + 0.5 * clumps < 1
    else:
        outline = np.hypot(u / radius, (h - 0.64 * height) / (0.38 * height))
        inside = outline + 0.9 * clumps + 0.8 * fine < 1
    light = 0.45 * canvas.contrast * (canvas.sun * u / radius + (h / height - 0.6))
    shade = np.clip(0.75 + light + 1.1 * fine + 0.9 * clumps, 0.15, 2)
    canvas.paint(where, inside, foliage * shade[..., None], np.float32(z))


def trunk(canvas, x, z, half_width, height):
    visible = canvas.upright_plane(x, z, half_width, height)
    if visible is None:
        return
    where, u, _ = visible
    bark = random_colour(canvas.rng, 15, 40, (0.1, 0.4), (0.15, 0.45))
    v = canvas.y[where[0]] * z * 40 + np.zeros_like(u)
    shade = 1 + texture(VERTICAL, u * 60, v) - 0.5 + 0.35 * canvas.sun * u / half_width
    canvas.paint(where, np.abs(u) <= half_width, bark * shade[..., None], np.float32(z))


def car(canvas, x, z):
    rng = canvas.rng
    paint = random_colour(rng, 0, 360, (0.0, 0.8), (0.15, 0.9))
    visible = canvas.upright_plane(x, z, 1.1, 1.6)
    if visible is None:
        return
    where, u, h = visible
    u = np.abs(u)
    body = (u < 0.9) & (h > 0.3) & (h < 0.9)
    cabin = (h >= 0.9) & (h < 1.45) & (u < 0.78 - 0.25 * (h - 0.9))
    glass = cabin & (h < 1.35) & (u < 0.68 - 0.25 * (h - 0.9))
    wheel = (h <= 0.35) & (u > 0.55) & (u < 0.85)
    lamp = (h > 0.6) & (h < 0.75) & (u > 0.6) & (u < 0.85)
    lamp_colour = (0.85, 0.3, 0.2) if rng.random() < 0.5 else (1, 0.95, 0.8)    # rear or front
    colour = paint * (0.75 + 0.4 * h)[..., None]
    colour = np.where(glass[..., None], np.float32((0.2, 0.24, 0.28)), colour)
    colour = np.where(wheel[..., None], np.float32((0.08, 0.08, 0.08)), colour)
    colour = np.where(lamp[..., None], np.float32(lamp_colour), colour)
    canvas.paint(where, body | cabin | wheel, colour, np.float32(z))


def person(canvas, x, z):
    rng = canvas.rng
    coat = random_colour(rng, 0, 360, (0.1, 0.85), (0.15, 0.85))
    trousers = random_colour(rng, 200, 260, (0.0, 0.4), (0.1, 0.4))
    skin = random_colour(rng, 15, 35, (0.25, 0.55), (0.4, 0.9))
    visible = canvas.upright_plane(x, z, 0.6, 2.2)
    if visible is None:
        return
    where, u, h = visible
    head = np.hypot(u, h - 1.6) < 0.13
    body = (np.abs(u) < 0.2 + 0.06 * np.sin(h * 3)) & (h > 0.8) & (h < 1.47)
    legs = (np.abs(np.abs(u) - 0.1) < 0.085) & (h <= 0.8) & (h > 0)
    mask = head | body | legs
    colour = np.where((h > 0.8)[..., None], coat, trousers)
    colour = np.where(head[..., None], skin, colour)
    if rng.random() < 0.3:
        umbrella = (np.hypot(u / 0.55, (h - 1.75) / 0.35) < 1) & (h > 1.75)
        fabric = random_colour(rng, 0, 360, (0.3, 0.9), (0.3, 0.9))
        colour = np.where(umbrella[..., None], fabric, colour)
        mask = mask | umbrella
    shade = 1 + 0.4 * canvas.sun * np.clip(u * 3, -1, 1)
    canvas.paint(where, mask, colour * shade[..., None], np.float32(z))


def pole(canvas, x, z, height):
    rng = canvas.rng
    visible = canvas.upright_plane(x, z, rng.uniform(0.05, 0.15), height)
    if visible is None:
        return
    where, _, _ = visible
    grey = np.float32([0.3, 0.3, 0.32]) * rng.uniform(0.5, 1.5)
    canvas.paint(where, np.ones((1, 1), bool), grey, np.float32(z))


def dead_leaves(canvas, near=1.5, far=40.0):
    """Overlapping textured shapes of all sizes, many small and few large, from far to near."""
    rng = canvas.rng
    count = int(rng.integers(40, 110))
    y, x = np.mgrid[:canvas.height, :canvas.width].astype(np.float32)
    background = random_colour(rng, 0, 360, (0.0, 0.5), (0.2, 0.9))
    shade = 0.6 + 0.8 * texture(rng.integers(1, 6), x, y)
    canvas.colour[:] = background * shade[..., None]
    canvas.depth[:] = far
    size = max(canvas.height, canvas.width)
    for i in range(count):
        r = min(0.5, 0.035 / rng.uniform(0.04, 1) ** 0.8) * size
        r = max(3.0, r * (1.3 - 0.6 * i / count))
        cx, cy = rng.uniform(0, canvas.width), rng.uniform(0, canvas.height)
        rows = slice(max(0, int(cy - r)), min(canvas.height, int(cy + r + 1)))
        columns = slice(max(0, int(cx - r)), min(canvas.width, int(cx + r + 1)))
        y, x = np.mgrid[rows, columns].astype(np.float32)
        if not x.size:
            continue
        angle = rng.uniform(0, math.pi)
        cos, sin = math.cos(angle), math.sin(angle)
        a = (x - cx) * cos + (y - cy) * sin
        b = ((y - cy) * cos - (x - cx) * sin) / rng.uniform(0.35, 1)
        power = (2, 2, 1, 6)[rng.integers(4)]                   # ellipse, lozenge or box
        limit = 0.95 * r / 2 ** (0.5 if power == 6 else 0)
        mask = np.abs(a) ** power + np.abs(b) ** power < limit ** power
        colour = random_colour(rng, 0, 360, (0.0, 0.75), (0.1, 0.95))
        shade = leaf_shade(rng, a, b) + 0.3 * canvas.contrast * canvas.sun * a / r
        depth = far * (near / far) ** ((i + 1) / count)
        canvas.paint((rows, columns), mask, colour * shade[..., None], np.float32(depth))


def leaf_shade(rng, a, b):
    """Brightness at (a, b) px from a shape's centre: noise, or stripes and checks."""
    pattern, scale = rng.integers(4), rng.uniform(0.3, 2.5)
    if pattern == 3:
        checks = rng.random() < 0.4
        stripes = (a * scale * 0.15 % 1 < 0.5) ^ ((b * scale * 0.15 % 1 < 0.5) & checks)
        return 0.75 + 0.5 * stripes
    contrast = rng.uniform(0.2, 1.2)
    kinds = (rng.integers(2), rng.integers(2, 6), rng.integers(6, 9))
    return 1 + contrast * (texture(kinds[pattern], a * scale + 300, b * scale + 300) - 0.5)


# ---------------------------------------------------------------- a scene

SCENES = ("street", "town", "country", "forest", "leaves")
GROUNDS = {"street": ["asphalt", "paving"], "town": ["asphalt", "paving", "grass", "water"],
           "country": ["grass", "soil", "water", "sand"], "forest": ["grass", "soil"]}
TREES = {"street": (0, 4), "town": (0, 6), "country": (1, 9), "forest": (12, 30)}   # [low, high)


def render_scene(rng, height, width):
    """Renders a procedural scene.

    Returns the photo, (H,W,3) float32 in [0,1], and its depth, (H,W) float32 in metres.
    """
    canvas = Canvas(rng, 2 * height, 2 * width)                 # 2 x 2 supersampling
    kind = rng.choice(SCENES, p=(0.22, 0.2, 0.24, 0.14, 0.2))
    if kind == "leaves":
        dead_leaves(canvas)
    else:
        sky(canvas)
        if kind == "country" or rng.random() < 0.3:
            hills(canvas)
        ground(canvas, rng.choice(GROUNDS[kind]))
        buildings(canvas, kind)
        objects(canvas, kind)
    image = canvas.colour.reshape(height, 2, width, 2, 3).mean((1, 3))
    depth = canvas.depth.reshape(height, 2, width, 2).mean((1, 3))
    white_balance = 1 + rng.uniform(-0.06, 0.06, 3).astype(np.float32)
    image = np.clip(image * white_balance * rng.uniform(0.8, 1.15), 0, 1)
    gamma = rng.uniform(0.85, 1.2)
    return (image ** gamma).astype(np.float32), depth


def buildings(canvas, kind):
    rng = canvas.rng
    if kind == "street":
        street(canvas)
    if kind == "town":                                          # rows of houses, from far to near
        z = rng.uniform(60, 120)
        while z > 7:
            for _ in range(rng.integers(2, 5)):
                height = rng.uniform(12, 45) if z > 45 else rng.uniform(4, 12)
                x = rng.uniform(-0.6, 0.6) * z
                house(canvas, x, z * rng.uniform(0.9, 1.1), rng.uniform(6, 18), height)
            z *= rng.uniform(0.4, 0.6)
    if kind == "country" and rng.random() < 0.5:
        for _ in range(rng.integers(1, 4)):
            z = rng.uniform(25, 90)
            x = rng.uniform(-0.4, 0.4) * z
            house(canvas, x, z, rng.uniform(6, 14), rng.uniform(3, 7))


def objects(canvas, kind):
    """Trees; in streets and towns also cars, people and poles."""
    rng = canvas.rng
    nearest = rng.uniform(4, 9)
    distances = nearest * np.exp(rng.uniform(0, 2.6, rng.integers(*TREES[kind])))
    for z in sorted(distances, reverse=True):
        tree(canvas, rng.uniform(-0.55, 0.55) * z, z, rng.uniform(3, 11))
    if kind in ("street", "town"):
        for z in rng.uniform(6, 45, rng.integers(0, 6)):
            car(canvas, rng.uniform(-0.3, 0.3) * z, z)
        for z in rng.uniform(3, 25, rng.integers(0, 6)):
            person(canvas, rng.uniform(-0.4, 0.4) * z, z)
        for z in rng.uniform(5, 40, rng.integers(0, 4)):
            x = rng.choice((-1, 1)) * rng.uniform(2.5, 5)
            pole(canvas, x, z, rng.uniform(4, 8))
