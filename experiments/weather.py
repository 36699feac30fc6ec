"""Does the mini-SD produce the weather named in a caption? A classifier measures it.

    python -m experiments.weather       # results/weather-check.json, .png; minutes on two CPU cores

The classifier (the adapter's network with four outputs: clear, haze, rain, snow) is trained on
rendered photos of the pretraining domain and tested on held-out ones. All its inputs pass through
the VAE, so that the VAE's blur carries no information. Then diffusers' img2img pipeline turns
held-out clear photos into "a photo in heavy snow" (rain, haze), with clear weather as the negative
prompt, and the classifier labels the outputs.
"""
import argparse
import json
import os
from multiprocessing import Pool
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

import d4ir
from demo import SETTINGS, WEIGHTS
from demo.photos import Photo, ignore_signals, render_photo
from demo.pretrain import grid, img2img, load_img2img, to_tensor
from demo.weather import KINDS
from experiments.common import provenance
from models import load_stable_diffusion
from prompt_adapter import PromptAdapter

CLASSES = ("clear", *KINDS)


def check(folder, photos=2000, steps=600, test=400, clear=40, strengths=(0.5, 0.6, 0.7),
          guidance=SETTINGS["guidance"], device="cpu"):
    """Classifies held-out photos and the results of img2img.

    folder: a mini-SD
    photos, test, clear: numbers of photos for training, for testing and for img2img
    steps: updates of the classifier
    Returns the shares of predicted classes, {"held out": {class: {class: share}}, "strength S":
    {caption's weather: {class: share}}, ...}, and the rows of a figure, (8,3,H,W) each.
    """
    sd = load_stable_diffusion(folder, device)
    training = render_photos("pretraining", 100_000, photos, CLASSES)
    held_out = render_photos("pretraining-test", 200_000, test, CLASSES)
    content = render_photos("pretraining-test", 300_000, clear, ("clear",), "original")

    classifier = train_classifier(through_vae(sd, training), steps)
    held_out = through_vae(sd, held_out)
    result = {"held out": {}}
    for i, name in enumerate(CLASSES):
        result["held out"][name] = predict(classifier, held_out[i::len(CLASSES)])

    pipe, rows = load_img2img(folder, device), [content[:8]]
    for strength in strengths:
        result[f"strength {strength:g}"] = {}
        for kind in KINDS:
            made = img2img(pipe, content, f"a photo in heavy {kind}", strength, guidance, 20)
            result[f"strength {strength:g}"][kind] = predict(classifier, made)
            rows.append(made[:8])
    return result, rows


def render_photos(split, first, count, kinds, domain="pretraining", size=96):
    """Photos of a split, (count,3,size,size) in [0,1]; photo i has kinds[i % len(kinds)]."""
    photos = [Photo(split, first + i, kinds[i % len(kinds)], domain, size, size)
              for i in range(count)]
    with Pool(os.cpu_count(), initializer=ignore_signals) as pool:
        rendered = list(tqdm(pool.imap(render_photo, photos, 8), "render", count))
    return to_tensor(np.stack([degraded for _, degraded, _ in rendered]), "cpu")


def through_vae(sd, images, batch=50):
    """Encodes and decodes images (N,3,H,W) in [0,1]."""
    return torch.cat([sd.decode(sd.encode(part)).cpu() for part in images.split(batch)])


def train_classifier(images, steps, batch=32, lr=1e-3, seed=0):
    """Trains a classifier, (B,3,H,W) in [0,1] to logits (B,1,4).

    images: (N,3,H,W) in [0,1]; image i has the class CLASSES[i % 4]
    """
    torch.manual_seed(seed)
    network, rng = PromptAdapter(len(CLASSES), tokens=1), np.random.default_rng(seed)
    optimizer = torch.optim.AdamW(network.parameters(), lr=lr)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, steps)
    for _ in tqdm(range(steps), "classifier"):
        chosen = torch.from_numpy(rng.integers(0, len(images), batch))
        x = images[chosen]
        if rng.random() < 0.5:
            x = x.flip(-1)
        loss = F.cross_entropy(network(x)[:, 0], chosen % len(CLASSES))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return network.eval()


@torch.no_grad()
def predict(classifier, images):
    """The share of images predicted as each class: {"clear": ..., "haze": ..., ...}."""
    predicted = classifier(images)[:, 0].argmax(1)
    return {name: float((predicted == i).float().mean()) for i, name in enumerate(CLASSES)}


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sd", default=str(WEIGHTS / "mini-sd"), help="folder of a mini-SD")
    parser.add_argument("--guidance", type=float, default=SETTINGS["guidance"])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--results", type=Path, default=Path("results"))
    args = parser.parse_args()
    result, rows = check(args.sd, guidance=args.guidance, device=args.device)
    args.results.mkdir(parents=True, exist_ok=True)
    record = provenance("weather", None) | {"guidance": args.guidance} | result
    d4ir.write_text(args.results / "weather-check.json", json.dumps(record, indent=1))
    grid(rows, args.results / "weather-check.png")
    for title, part in result.items():
        for name, shares in part.items():
            line = "  ".join(f"{predicted} {share:4.0%}" for predicted, share in shares.items())
            print(f"{title:13s} {name:6s}", line)


if __name__ == "__main__":
    d4ir.run_command(main)
