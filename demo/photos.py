"""The demo's photos: procedural scenes in bad weather, as folders of PNG files.

    python -m demo.photos --weather snow --out photos    # the folders that d4ir.py also writes
    python -m demo.photos --figure weather.png           # each kind of weather in each domain

The splits share no scenes: each split seeds its random generators differently.
"""
import argparse
import os
import signal
from multiprocessing import Pool
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image
from tqdm import tqdm

from demo.scenes import render_scene
from demo.weather import DOMAINS, KINDS, add_weather, to_pil

SPLITS = {name: i for i, name in enumerate(
    ["pretraining", "pretraining-test", "original", "original-test", "web-degraded", "web-clean"])}

WEB_DEGRADED, WEB_CLEAN, TEST = 512, 256, 36            # photos in each folder; our choice
WEB_SIZE, TEST_SIZE = (144, 192), (128, 160)            # px, height and width
ORIGINAL_SIZE = (128, 128)


class Photo(NamedTuple):
    """A photo to render. Rendering is deterministic: equal fields give identical pixels."""
    split: str                  # a key of SPLITS
    index: int                  # number of the scene in its split
    kind: str                   # "haze", "rain", "snow" or "clear"
    domain: str                 # a key of weather.DOMAINS
    height: int                 # px
    width: int                  # px
    with_clean: bool = False    # also return the clean image


def render_photo(photo):
    """Renders one `Photo`.

    Returns (clean, degraded, caption): two (H,W,3) uint8 arrays, of which `clean` is None unless
    `with_clean`, and the caption as a list of phrases.
    """
    rng = np.random.default_rng([SPLITS[photo.split], photo.index, 2409_03455])
    image, depth = render_scene(rng, photo.height, photo.width)
    degraded, caption = add_weather(image, depth, photo.kind, DOMAINS[photo.domain], rng)
    clean = np.asarray(to_pil(image)) if photo.with_clean else None
    return clean, np.asarray(to_pil(degraded)), caption


def ignore_signals():
    """Initializes a worker process: only its parent handles Ctrl-C, and SIGTERM ends it at once."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


# ---------------------------------------------------------------- folders

def write_photos(folder, weather, wanted=("degraded", "clean", "test"), degraded=WEB_DEGRADED,
                 clean=WEB_CLEAN, test=TEST, original=0):
    """Writes the demo's photos as folders of PNG files, on all cores. Existing files are kept.

    folder: the parent folder, a Path
    weather: a sequence of kinds, such as ("snow",); photos alternate between them
    wanted: which of these folders to write:
        degraded              web domain, with the weather
        clean                 web domain, clear, other scenes
        test/{input,target}   original domain, with and without the weather; held out from training
        original              training photos of the teacher, with the weather
    degraded, clean, test, original: the number of photos in each
    Raises ValueError for an unknown kind of weather.
    """
    unknown = [kind for kind in weather if kind not in KINDS]
    if unknown or not weather:
        raise ValueError(f"weather must be some of {KINDS}, not {tuple(weather)!r}")
    jobs = []                                   # (photo, path of clean, path of degraded image)
    if "degraded" in wanted:
        for i in range(degraded):
            jobs.append((degraded_photo(weather, i), None, folder / f"degraded/{i:04d}.png"))
    if "clean" in wanted:
        for i in range(clean):
            photo = Photo("web-clean", i, "clear", "web", *WEB_SIZE)
            jobs.append((photo, None, folder / f"clean/{i:04d}.png"))
    if "original" in wanted:
        for i in range(original):
            kind = weather[i % len(weather)]
            index = len(KINDS) * i + KINDS.index(kind)      # in training, scene k has kind k % 3
            photo = Photo("original", index, kind, "original", *ORIGINAL_SIZE)
            jobs.append((photo, None, folder / f"original/{i:04d}.png"))
    if "test" in wanted:
        for i in range(test):
            kind = weather[i % len(weather)]
            index = 10_000 * KINDS.index(kind) + i
            photo = Photo("original-test", index, kind, "original", *TEST_SIZE, with_clean=True)
            jobs.append((photo, folder / f"test/target/{i:04d}.png",
                         folder / f"test/input/{i:04d}.png"))
    jobs = [job for job in jobs if not job[2].exists()]
    for _, *paths in jobs:
        for path in paths:
            if path:
                path.parent.mkdir(parents=True, exist_ok=True)
    if jobs:
        with Pool(os.cpu_count(), initializer=ignore_signals) as pool:
            done = pool.imap_unordered(write_photo, jobs, 4)
            for _ in tqdm(done, "photos  ", len(jobs), disable=None):
                pass


def degraded_photo(weather, i):
    """Photo number i of the folder `degraded`."""
    kind = weather[i % len(weather)]
    return Photo("web-degraded", 10_000 * KINDS.index(kind) + i, kind, "web", *WEB_SIZE)


def caption(weather, i):
    """The exact caption of photo number i of the folder `degraded`."""
    return ", ".join(render_photo(degraded_photo(weather, i))[2])


def write_photo(job):
    """Renders and writes one photo, the degraded image last: it marks the pair as complete."""
    photo, *paths = job
    clean, degraded, _ = render_photo(photo)
    for image, path in zip((clean, degraded), paths):
        if path:
            Image.fromarray(image).save(path.with_suffix(".tmp"), "PNG")
            os.replace(path.with_suffix(".tmp"), path)


def weather_figure(path, count=8, size=128):
    """Writes a figure: a row of `count` scenes for each kind of weather in each domain."""
    rows = []
    for kind in KINDS:
        for domain in DOMAINS:
            first = 100 + 8 * len(rows)
            photos = [Photo("web-clean", first + i, kind, domain, size, size) for i in range(count)]
            rows.append(np.concatenate([render_photo(photo)[1] for photo in photos], 1))
    Image.fromarray(np.concatenate(rows)).save(path)


def main():
    parser = argparse.ArgumentParser(prog="python -m demo.photos", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weather", nargs="+", choices=KINDS, metavar="KIND",
                        help=f"write photos with this weather: one or more of {', '.join(KINDS)}")
    parser.add_argument("--out", type=Path, default=Path("photos"),
                        help="folder for the photos (default: %(default)s)")
    parser.add_argument("--figure", type=Path, metavar="FILE",
                        help="write a figure of each kind of weather in each domain")
    args = parser.parse_args()
    if not args.weather and not args.figure:
        parser.error("specify --weather or --figure")
    if args.figure:
        weather_figure(args.figure)
    if args.weather:
        write_photos(args.out, args.weather)


if __name__ == "__main__":
    main()
