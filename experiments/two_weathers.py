"""Does the student improve if the prompts come from weather that looks like the test set's?

    python -m experiments.two_weathers --task desnow    # results/two-weathers-desnow.json and .png

The demo renders two sets of web photos, and two test sets, in the same kind of weather but with
different looks (LOOKS: size, shape and density vary together). Scenes, crops and noise are the
same, so that nothing else differs; the addition `select` then chooses among the images. One adapter
is trained on all web photos, because its prompts are centred on the mean of its photos. For each
look, students are trained on images synthesized with the prompts of its web photos, and evaluated
on both test sets. A plain caption ("a photo in snow") gives the same images for both (row
sd-plain). The result is the table of PSNR, and

    margin = mean over test sets of (PSNR with the same look - PSNR with the other look)

for each seed. All seeds share the adapter and the images. Takes the flags of d4ir.py, except
--degraded and --test.
"""
import json
from dataclasses import replace
from pathlib import Path
from statistics import fmean

import d4ir
from demo.photos import TEST, TEST_SIZE, WEB_DEGRADED, WEB_SIZE, Photo, write_photo
from demo.weather import DOMAINS
from evaluate import figure, list_images, read_image
from experiments.common import make_parser, provenance
from experiments.compare import make_bench, summary
from synth import draw_crops

# The looks: fields of demo.weather.Weather, within the ranges of the teacher's training photos.
LOOKS = {
    "desnow": {
        "small": dict(flake_size=(0.7, 1.0), flake_cover=(0.14, 0.24), flake_blur=(0.0, 1.0)),
        "large": dict(flake_size=(1.7, 2.2), flake_cover=(0.04, 0.10), flake_blur=(0.0, 3.0))},
    "derain": {
        "slanted": dict(streak_length=(14, 22), streak_width=(0.6, 0.8), streak_angle=(15, 30)),
        "vertical": dict(streak_length=(40, 60), streak_width=(0.9, 1.2), streak_angle=(-3, 3))},
}


def write_looks(folder, task):
    """Writes web photos, FOLDER/LOOK/degraded, and test sets, FOLDER/test/LOOK/{input,target}."""
    kind = d4ir.TASKS[task].weather[0]
    for look, ranges in LOOKS[task].items():
        for domain in ("web", "original"):
            DOMAINS[f"{domain}, {look}"] = replace(DOMAINS[domain], **ranges)
        web, test = folder / look / "degraded", folder / "test" / look
        for path in (web, test / "input", test / "target"):
            path.mkdir(parents=True, exist_ok=True)
        jobs = []
        for i in range(WEB_DEGRADED // 2):                # in all, as many as in the default run
            photo = Photo("web-degraded", i, kind, f"web, {look}", *WEB_SIZE)
            jobs.append((photo, None, web / f"{i:04d}.png"))
        for i in range(TEST):
            photo = Photo("original-test", i, kind, f"original, {look}", *TEST_SIZE, True)
            jobs.append((photo, test / f"target/{i:04d}.png", test / f"input/{i:04d}.png"))
        for job in jobs:
            if not job[2].exists():
                write_photo(job)


def margin(rows, looks, seed):
    """The mean, over test sets, of the PSNR with the same look minus that with the other look.
    rows: {name: the metrics of each seed}."""
    psnr = lambda row, look: rows[row][seed][f"psnr_rgb, {look}"]
    a, b = looks
    return fmean([psnr(a, a) - psnr(b, a), psnr(b, b) - psnr(a, b)])


def main(argv=None):
    parser = make_parser("two_weathers", __doc__, seeds="students per row")
    parser.add_argument("--task", choices=LOOKS, required=True)
    parser.add_argument("--out", type=Path, metavar="DIR",
                        help="folder of the run (runs/two-weathers/TASK)")
    own, rest = parser.parse_known_args(argv)
    out, looks = own.out or Path("runs/two-weathers") / own.task, LOOKS[own.task]
    photos = out / "photos"
    write_looks(photos, own.task)
    bench = make_bench([*rest, "--task", own.task, "--out", str(out), "--test",
                        str(photos / "test"), "--degraded", str(photos / next(iter(looks)))])
    run = bench.run
    degraded = {look: d4ir.load_photos(photos / look / "degraded", run.size, run, "--degraded")
                for look in looks}
    adapter = bench.adapter("both", [photo for web in degraded.values() for photo in web])
    images = {look: bench.synthesize(look, adapter, degraded=web)
              for look, web in degraded.items()}
    images["sd-plain"] = bench.images("sd-plain")
    rows = {name: bench.students(name, lambda: made, own.seeds) for name, made in images.items()}

    result = {"task": own.task, "looks": looks, "seeds": own.seeds,
              "rows": {name: summary(results) for name, results in rows.items()},
              "margins": [margin(rows, looks, seed) for seed in range(own.seeds)]}
    result |= provenance("two_weathers", argv) | {"seed": run.args.seed}
    own.results.mkdir(parents=True, exist_ok=True)
    path = own.results / f"two-weathers-{own.task}"
    crops = lambda photos, stream: draw_crops(photos, run.size, run.args.seed, range(5), stream)
    columns = {"clean": crops(bench.photos("clean", run.size), 0)}
    columns |= {f"degraded, {look}": crops(web, 1) for look, web in degraded.items()}
    for name in rows:                   # before selection: the rows of the figure correspond
        files = list_images(out / name / "synth")[:5]
        columns[f"synthesized, {name}"] = [read_image(file) / 255 for file in files]
    figure(columns, path.with_suffix(".png"))
    d4ir.write_text(path.with_suffix(".json"), json.dumps(result, indent=1))
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    d4ir.run_command(main)
