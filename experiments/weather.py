"""Does the mini-SD make the weather that its caption asks for? A classifier that was trained on the renderer judges.

    python -m experiments.weather          # results/weather-check.json and .png; a few minutes on two cores

The classifier is the adapter's network with four outputs: clear, haze, rain, snow. It learns from places of the
pretraining domain and is held against others. All that it sees, in training and after, has been through the VAE, so
that the VAE's blur tells it nothing. Then stock img2img (diffusers' own pipeline) turns clear places that nobody was
trained on into "a photo in heavy snow", "... rain", "... haze", away from clear weather, and it says what it sees.
"""
import argparse
import json
import os
import shlex
import sys
from multiprocessing import Pool
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

import d4ir
import demo
from models import load_stable_diffusion
from prompt_adapter import PromptAdapter
from synth import SynthConfig

CLASSES = ("clear", *demo.KINDS)


def places(split, first, count, kinds, domain="pretraining", size=96):
    """Photos of a split, (count,3,size,size) in [0,1], their weathers in turn."""
    jobs = [(split, first + i, kinds[i % len(kinds)], domain, size, size, False) for i in range(count)]
    with Pool(os.cpu_count(), initializer=demo.quiet) as pool:
        photos = [image for _, image, _ in tqdm(pool.imap(demo.photo, jobs, 8), "places", count)]
    return demo.to_tensor(np.stack(photos), "cpu")


def through_vae(sd, images, batch=50):
    return torch.cat([sd.decode(sd.encode(part)).cpu() for part in images.split(batch)])


def train_classifier(images, steps, batch=32, lr=1e-3, seed=0):
    """(N,3,H,W), whose weathers are CLASSES in turn, to a network that gives logits (B,1,4)."""
    torch.manual_seed(seed)
    network, rng = PromptAdapter(len(CLASSES), tokens=1), np.random.default_rng(seed)
    optimizer = torch.optim.AdamW(network.parameters(), lr=lr)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, steps)
    for _ in tqdm(range(steps), "classifier"):
        chosen = torch.from_numpy(rng.integers(0, len(images), batch))
        x = images[chosen].flip(-1) if rng.random() < 0.5 else images[chosen]
        loss = F.cross_entropy(network(x)[:, 0], chosen % len(CLASSES))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        rate.step()
    return network.eval()


@torch.no_grad()
def seen(network, images):
    """The share of the images in which the classifier sees each weather: {"clear": ..., ...}."""
    found = network(images)[:, 0].argmax(1)
    return {name: float((found == i).float().mean()) for i, name in enumerate(CLASSES)}


def check(folder, photos=2000, steps=600, test=400, clear=40, strengths=(0.5, 0.6, 0.7), guidance=SynthConfig.guidance,
          device="cpu"):
    """Returns what the classifier sees in held-out places and in what img2img makes, and a figure's rows."""
    sd = load_stable_diffusion(folder, device)
    network = train_classifier(through_vae(sd, places("pretraining", 100_000, photos, CLASSES)), steps)
    held_out = through_vae(sd, places("pretraining-test", 200_000, test, CLASSES))
    result = {"places": {name: seen(network, held_out[i::len(CLASSES)]) for i, name in enumerate(CLASSES)}}
    content = places("pretraining-test", 300_000, clear, ("clear",), "original")
    pipe, rows = demo.load_img2img(folder, device), [content[:8]]
    for strength in strengths:
        result[f"strength {strength:g}"] = {}
        for kind in demo.KINDS:
            made = demo.img2img(pipe, content, f"a photo in heavy {kind}", strength, guidance, 20)
            result[f"strength {strength:g}"][kind] = seen(network, made)
            rows.append(made[:8])
    return result, rows


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sd", default=str(d4ir.WEIGHTS / "mini-sd"))
    parser.add_argument("--guidance", type=float, default=SynthConfig.guidance)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--results", type=Path, default=Path("results"))
    args = parser.parse_args()
    result, rows = check(args.sd, guidance=args.guidance, device=args.device)
    args.results.mkdir(parents=True, exist_ok=True)
    said = shlex.join(["python", "-m", "experiments.weather", *sys.argv[1:]])
    d4ir.write_text(args.results / "weather-check.json",
                    json.dumps({"command": said, "guidance": args.guidance} | result, indent=1))
    demo.grid(rows, args.results / "weather-check.png")
    for title, part in result.items():
        for asked, found in part.items():
            print(f"{title:13s} {asked:6s}", "  ".join(f"{name} {share:4.0%}" for name, share in found.items()))


if __name__ == "__main__":
    d4ir.command(main)
