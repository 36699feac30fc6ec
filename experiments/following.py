"""Does each synthesized image reproduce the weather of its reference photo?

    python -m experiments.following --task desnow       # results/following-desnow.json and .png

Takes the flags of d4ir.py and uses the adapter and the images of its run folder (--out), which the
same command makes first if they are missing. With r = x - T(x), what the teacher T removes from a
photo x, three properties of the weather are

    amount = mean |r|
    lean   = 2 J_xy / (J_xx + J_yy) = sin(2 theta) * coherence,   J: structure tensor of r,
             theta: direction of its gradients, across the streaks
    scale  = spectral centroid of r, in cycles per px

For each, the result is the Spearman correlation between the degraded photos and the images that
are synthesized with their prompts. "captions" are the renderer's exact descriptions of the same
photos in place of the learned prompts (demo photos only); "ceiling" is the correlation between two
crops of one degraded photo, which may overlap. With 384 images, the standard error of a correlation
is about 0.05.

"contrast" tests the adapter's embedding on weather and scenes that it was not trained on (demo
photos only): how often the nearest of 128 crops is the one from the same photo, and how often a
crop is nearer to the same weather in another scene than to other weather in the same scene. Both
are means over four groups of 128 photos; the standard error is about 0.02.
"""
import json

import numpy as np
import torch
from torchvision.transforms.functional import pil_to_tensor
from tqdm import tqdm

import d4ir
from evaluate import figure, list_images, read_image, restore
from experiments.common import make_parser, provenance
from prompt_adapter import load_adapter, residuals
from synth import draw_crops, synthesize_photos

PROPERTIES = ("amount", "lean", "scale")


def weather_properties(removed):
    """amount, lean and scale of r (3,H,W): an array (3,)."""
    r = removed.mean(0).double().numpy()                                # (H,W)
    d_y, d_x = np.gradient(r)
    j_xx, j_yy, j_xy = (d_x ** 2).mean(), (d_y ** 2).mean(), (d_x * d_y).mean()
    power = np.abs(np.fft.rfft2(r - r.mean())) ** 2                     # (H,W/2+1)
    f_y, f_x = np.fft.fftfreq(r.shape[0])[:, None], np.fft.rfftfreq(r.shape[1])[None]
    centroid = (np.hypot(f_y, f_x) * power).sum() / (power.sum() + 1e-12)
    lean = 2 * j_xy / (j_xx + j_yy + 1e-12)
    return np.array([float(removed.abs().mean()), lean, centroid])


@torch.no_grad()
def measure(run, images):
    """The properties of the weather in images (3,H,W) in [0,1]: an array (n,3)."""
    rows = []
    for image in images:
        x = image[None].to(run.device)
        rows.append(weather_properties((x - run.teacher(x).clamp(0, 1))[0].float().cpu()))
    return np.stack(rows)


def spearman(a, b):
    """Rank correlation of each property between two arrays (n,3): {"amount", "lean", "scale"}."""
    rank = lambda x: x.argsort(0).argsort(0)
    return {name: float(np.corrcoef(rank(a)[:, i], rank(b)[:, i])[0, 1])
            for i, name in enumerate(PROPERTIES)}


def photo_number(run, index):
    """The number of the degraded photo behind synthesized image `index`, as synth.draw_crops
    chooses it."""
    return int(np.random.default_rng([run.args.seed, index, 1]).integers(len(run.degraded)))


def second_crops(run, indices):
    """Another crop (3,size,size) in [0,1] of the degraded photo behind each image."""
    return [draw_crops([run.degraded[photo_number(run, i)]], run.size, run.args.seed, [i], 2)[0]
            for i in indices]


def exact_captions(run, indices):
    """The renderer's description of the degraded photo behind each synthesized image, {index:
    caption}; None if the photos are not the demo's."""
    if run.args.degraded.resolve() != (run.out / "demo" / run.args.task / "degraded").resolve():
        return None
    from demo.photos import caption
    weather = d4ir.TASKS[run.args.task].weather
    return {i: caption(weather, photo_number(run, i)) for i in indices}


def render_weather(kind, scene, weather, size):
    """Scene number `scene` in weather number `weather` of the web domain, (3,size,2 size) uint8."""
    from demo.scenes import render_scene
    from demo.weather import WEB, add_weather, to_pil
    clean, depth = render_scene(np.random.default_rng([1, scene]), size, 2 * size)
    degraded, _ = add_weather(clean, depth, kind, WEB, np.random.default_rng([2, weather]))
    return pil_to_tensor(to_pil(degraded))


@torch.no_grad()
def contrast(run, adapter, count=128, groups=4):
    """{"top_1", "same_weather_first"}: see the top of this file; means over groups of `count`
    photos. Chance is 1 / count and 0.5."""
    def embed(scenes, weather):
        """Embeddings (n,D) of the left halves of `count` photos, and of their right halves."""
        images = [render_weather(kinds[i % len(kinds)], *numbers, run.size)
                  for i, numbers in enumerate(zip(scenes, weather))]
        if adapter.config["residual"]:
            images = residuals(images, lambda x: restore(run.teacher, x))
        halves = (torch.stack(images) / 255).to(run.device).chunk(2, -1)    # (n,3,size,size) each
        return [adapter(half, with_embedding=True)[1] for half in halves]

    kinds, found, nearer = d4ir.TASKS[run.args.task].weather, [], []
    for first in range(0, 2 * count * groups, 2 * count):
        even = range(first, first + 2 * count, 2)
        odd = range(first + 1, first + 2 * count, 2)
        query, key = embed(even, even)
        _, same_weather = embed(odd, even)
        same_scene, _ = embed(even, odd)
        found.append((query @ key.T).argmax(1).cpu() == torch.arange(count))
        nearer.append((query * same_weather).sum(1) > (query * same_scene).sum(1))
    return {"top_1": float(torch.cat(found).float().mean()),
            "same_weather_first": float(torch.cat(nearer).float().mean())}


def synthesize_captions(run, captions):
    """D4IR's images with the exact caption of each degraded photo in place of its prompt."""
    images, batch = [], run.synth.batch
    for first in tqdm(range(0, run.synth.images, batch), "captions", disable=None):
        indices = range(first, min(first + batch, run.synth.images))
        clean = draw_crops(run.clean, run.size, run.args.seed, indices, 0)
        prompts = run.sd.text_prompt([captions[i] for i in indices], run.adapter.tokens)
        generator = torch.Generator().manual_seed(run.args.seed * 1_000_003 + first)
        images += synthesize_photos(clean, prompts, run.sd, run.synth, generator).cpu()
    return images


def following_figure(run, adapter, captions, indices, path):
    """One clean photo and one noise sample with the prompts of several degraded photos."""
    seed = run.args.seed
    clean = draw_crops(run.clean, run.size, seed, [0], 0)
    degraded = draw_crops(run.degraded, run.size, seed, indices, 1)
    inputs = draw_crops(run.adapter_inputs(adapter), run.size, seed, indices, 1)
    columns = {"degraded": degraded,
               "from its learned prompt": d4ir.synthesize_each(
                   run, clean, adapter(inputs.to(run.device)))}
    if captions:
        exact = run.sd.text_prompt([captions[i] for i in indices], run.adapter.tokens)
        columns["from its exact caption"] = d4ir.synthesize_each(run, clean, exact)
    figure(columns, path)


def main(argv=None):
    own, rest = make_parser("following", __doc__).parse_known_args(argv)
    run = d4ir.main([*rest, "--stage", "adapter", "synth"])
    args, indices = run.args, range(run.synth.images)
    degraded = measure(run, draw_crops(run.degraded, run.size, args.seed, indices, 1))
    images = [read_image(path) / 255 for path in list_images(run.out / "synth")]
    captions = exact_captions(run, indices)
    result = {"task": args.task, "n_images": len(images),
              "d4ir": spearman(degraded, measure(run, images))}
    if captions:
        made = synthesize_captions(run, captions)
        result["captions"] = spearman(degraded, measure(run, made))
    result["ceiling"] = spearman(degraded, measure(run, second_crops(run, indices)))
    own.results.mkdir(parents=True, exist_ok=True)
    path = own.results / f"following-{args.task}"
    adapter = load_adapter(run.out / "adapter.safetensors", run.device)
    following_figure(run, adapter, captions, indices[:8], path.with_suffix(".png"))
    if captions:
        result["contrast"] = contrast(run, adapter)
    result |= provenance("following", argv) | {"seed": args.seed}
    d4ir.write_text(path.with_suffix(".json"), json.dumps(result, indent=1))
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    d4ir.run_command(main)
