"""Do learned prompts carry the look of their photos? An experiment that no caption can win.

    python -m experiments.two_weathers --task desnow    # results/two-weathers-desnow.json

Two sets of web photos show the same kind of weather with different looks, A and B, on the same
scenes; two test sets have the same looks. D4IR is run on the photos of each look, and each of its
students is tested on both: the diagonal of the 2x2 table (prompts of A tested on A, of B on B)
should exceed the rest. "caption" is one student of the task's caption, which is the same for both.
Takes the flags of d4ir.py; demo photos only.
"""
import json
from dataclasses import replace
from pathlib import Path
from statistics import fmean

import d4ir
from demo.photos import TEST, TEST_SIZE, WEB_DEGRADED, WEB_SIZE, Photo, write_photo
from demo.weather import DOMAINS
from evaluate import evaluate, find_pairs
from experiments.common import machine_name, make_parser, provenance
from experiments.compare import Bench, check_settings, summary
from models import load_restorer

# Ranges of demo.weather.Weather; all others are those of the web photos and of the test set.
LOOKS = {
    "derain": {
        "A": ("fine slanted streaks", dict(
            streak_length=(7, 12), streak_width=(0.5, 0.7), streak_angle=(20, 35))),
        "B": ("long vertical streaks", dict(
            streak_length=(34, 60), streak_width=(0.9, 1.3), streak_angle=(-5, 5)))},
    "desnow": {
        "A": ("small, dense flakes", dict(
            flake_size=(0.6, 0.9), flake_cover=(0.12, 0.2), flake_blur=(0, 1))),
        "B": ("large, sparse flakes", dict(
            flake_size=(1.6, 2.2), flake_cover=(0.03, 0.08), flake_blur=(0, 3)))},
}


def write_look(folder, kind, look, ranges):
    """Writes FOLDER/degraded (web photos) and FOLDER/test/{input,target} of one look."""
    web, original = f"web {look}", f"original {look}"
    DOMAINS[web], DOMAINS[original] = (replace(DOMAINS[name], **ranges)
                                       for name in ("web", "original"))
    jobs = [(Photo("web-degraded", i, kind, web, *WEB_SIZE), None,
             folder / f"degraded/{i:04d}.png") for i in range(WEB_DEGRADED)]
    jobs += [(Photo("original-test", i, kind, original, *TEST_SIZE, with_clean=True),
              folder / f"test/target/{i:04d}.png", folder / f"test/input/{i:04d}.png")
             for i in range(TEST)]
    for job in jobs:
        for path in job[1:]:
            if path:
                path.parent.mkdir(parents=True, exist_ok=True)
        if not job[2].exists():
            write_photo(job)


def students(bench, looks, seeds):
    """Distils the students. Returns {source: [paths, one per seed]}."""
    paths = {}
    for source in (*looks, "caption"):
        if source == "caption":
            make = lambda: bench.synthesize("caption", bench.captions())
        else:
            folder = bench.run.out / source / "degraded"
            photos = d4ir.load_photos(folder, bench.run.size, bench.run, "--degraded")
            adapter = bench.adapter(source, photos)
            make = lambda: bench.synthesize(source, adapter, None, photos)
        bench.students(source, make, seeds)
        first = bench.run.args.seed
        paths[source] = [bench.run.out / source / f"student-{seed}.safetensors"
                         for seed in range(first, first + seeds)]
    return paths


def main(argv=None):
    parser = make_parser("two_weathers", __doc__)
    parser.add_argument("--seeds", type=d4ir.number(int, 1), default=3, help="students per row (3)")
    own, rest = parser.parse_known_args(argv)
    run = d4ir.Run(d4ir.parse(rest))
    args = run.args
    if args.task not in LOOKS:
        parser.error(f"--task must be one of {', '.join(LOOKS)}")
    if args.out == Path("runs") / args.task:
        args.out = run.out = Path("runs/two-weathers") / args.task
    d4ir.check_inputs(run)
    check_settings(run, None)
    d4ir.write_demo_photos(run)
    looks = LOOKS[args.task]
    for look, (_, ranges) in looks.items():
        write_look(run.out / look, d4ir.TASKS[args.task].weather[0], look, ranges)

    paths, table = students(Bench(run, None), looks, own.seeds), {}
    for look in looks:
        pairs = find_pairs(run.out / look / "test")
        table[look] = {"input": evaluate(None, pairs)["psnr_rgb"]}
        for source, files in paths.items():
            results = [evaluate(load_restorer(file, run.device), pairs) for file in files]
            psnr = [{"psnr_rgb": result["psnr_rgb"]} for result in results]
            table[look][source] = summary(psnr)["psnr_rgb"]
    mean = lambda test, source: table[test][source]["mean"]
    advantage = fmean([mean("A", "A") - mean("A", "B"), mean("B", "B") - mean("B", "A")])
    result = {"task": args.task, "seeds": own.seeds, "n_images": TEST,
              "looks": {look: title for look, (title, _) in looks.items()},
              "psnr_rgb on the test set of": table, "diagonal above the rest": advantage,
              "machine": machine_name(run.device)} | provenance("two_weathers", argv)
    own.results.mkdir(parents=True, exist_ok=True)
    d4ir.write_text(own.results / f"two-weathers-{args.task}.json", json.dumps(result, indent=1))
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    d4ir.run_command(main)
