"""CCD, content-driven conditional diffusion: clean photos into new degraded ones.

symbol     code           shape, range
x_c        clean          (B,3,H,W) in [0,1], a photo in good weather
P          prompts        (B,N,d) = A(x_d): the weather of a photo x_d, unpaired with x_c
z_0        latents        (B,C,h,w) = E(x_c)
t_s        start          strength * T, the timestep that the content is noised to
abar_t     abar           scalar, the model's own cumulative noise schedule
eps        noise          (B,C,h,w), standard normal
w          guidance       1: none (Ho and Salimans 2022)

    perturb   z_ts = sqrt(abar_ts) z_0 + sqrt(1 - abar_ts) eps
    denoise   z_ts -> z_0 in `steps` calls of the U-Net, with eps_null + w (eps_P - eps_null) where guidance acts
    decode    x = D(z_0)

The content comes from x_c, the weather from x_d.
"""
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, UniPCMultistepScheduler
from torchvision.transforms.functional import to_pil_image
from tqdm import tqdm

SCHEDULERS = {"ddim": DDIMScheduler, "dpm": DPMSolverMultistepScheduler, "unipc": UniPCMultistepScheduler}


@dataclass
class SynthConfig:
    """The synthesis. The paper's values are not known to us: every one is our choice, by the student's PSNR."""
    images: int = 512           # images to synthesize
    batch: int = 16             # images at a time
    size: int = 0               # px, their side; 0: the Stable Diffusion's own
    strength: float = 0.6       # t_s / T in (0,1]: how much of the content is given up for the weather
    steps: int = 10             # calls of the U-Net an image, whatever the strength
    guidance: float = 2.0       # w; 1: none, and half the cost
    guidance_from: float = 0.0  # guidance acts on timesteps from this part of T ...
    guidance_to: float = 1.0    # ... to this one (Kynkaanniemi et al. 2024)
    scheduler: str = "dpm"      # ddim, dpm (DPM-Solver++) or unipc; diffusers' own
    detail: bool = True         # add back what the VAE loses of the clean photo, x_c - D(E(x_c))


def start_timestep(sd, strength, steps):
    """t_s = strength * T, to the nearest multiple of `steps`, so that all steps are alike. Raises ValueError where it can't be."""
    if not 0 < strength <= 1:
        raise ValueError(f"strength must lie in (0, 1], not {strength}")
    total = len(sd.alphas_cumprod)
    if not 1 <= steps <= round(strength * total):
        raise ValueError(f"steps must lie in 1..{round(strength * total)} at strength {strength}, not {steps}")
    return steps * min(max(1, round(strength * total / steps)), total // steps)


def perturb(latents, noise, sd, start):
    """z_ts = sqrt(abar_ts) z_0 + sqrt(1 - abar_ts) eps. latents, noise: (B,C,h,w); start: t_s in 1..T. The same shape."""
    abar = float(sd.alphas_cumprod[start - 1])
    return abar ** 0.5 * latents + (1 - abar) ** 0.5 * noise


@torch.no_grad()
def denoise(z, prompts, sd, start, *, steps, guidance=1.0, interval=(0.0, 1.0), scheduler="ddim", generator=None):
    """From z_ts (B,C,h,w) to z_0, conditioned on prompts (B,N,d), in exactly `steps` calls of the U-Net.

    Any of diffusers' solvers, over the model's own noise schedule cut off at t_s: so a low strength takes as many calls
    as a high one, where the usual img2img would drop most of them. Where guidance acts, a call holds 2B latents.
    """
    solver = few_step_solver(sd, start, steps, scheduler)
    null = sd.null_prompt(prompts.shape[1]).expand_as(prompts)
    total = len(sd.alphas_cumprod)
    for t in solver.timesteps.tolist():                    # Python ints: no waiting for the device
        if guidance != 1 and interval[0] * total <= t <= interval[1] * total:
            unconditional, conditional = sd.predict_noise(z.repeat(2, 1, 1, 1), t, torch.cat([null, prompts])).chunk(2)
            predicted = unconditional + guidance * (conditional - unconditional)
        else:
            predicted = sd.predict_noise(z, t, prompts)
        z = solver.step(predicted, t, z, **({"generator": generator} if scheduler == "ddim" else {})).prev_sample
    return z


def few_step_solver(sd, start, steps, scheduler):
    """One of diffusers' schedulers, built from the model's own config, for `steps` steps from t_s to 0."""
    if scheduler not in SCHEDULERS:
        raise ValueError(f"scheduler must be one of {', '.join(SCHEDULERS)}, not {scheduler!r}")
    abar = sd.alphas_cumprod[:start].double()
    betas = 1 - abar / torch.cat([torch.ones(1, dtype=abar.dtype), abar[:-1]])
    solver = SCHEDULERS[scheduler].from_config(
        sd.scheduler_config, trained_betas=betas.numpy(), num_train_timesteps=start, timestep_spacing="trailing",
        rescale_betas_zero_snr=False, clip_sample=False)   # betas are the model's final ones already
    solver.set_timesteps(steps)
    return solver


@torch.no_grad()
def synthesize(clean, prompts, sd, *, strength, steps, guidance=1.0, generator=None, scheduler="ddim",
               interval=(0.0, 1.0), detail=False):
    """CCD: clean (B,3,H,W) in [0,1], H and W multiples of f, and prompts (B,N,d), to new degraded photos (B,3,H,W) in [0,1].

    strength in (0,1], steps, guidance, scheduler, interval: see SynthConfig. generator: of the noise, on any device.
    detail: x + x_c - D(E(x_c)), for the fine content that the VAE blurs (our choice). Raises ValueError for what doesn't fit.
    """
    if len(clean) != len(prompts):
        raise ValueError(f"{len(clean)} clean photos but {len(prompts)} prompts")
    start = start_timestep(sd, strength, steps)
    clean = clean.to(sd.device)
    latents = sd.encode(clean)
    at = generator.device if generator is not None else sd.device
    noise = torch.randn(latents.shape, generator=generator, device=at).to(sd.device)
    z = perturb(latents, noise, sd, start)
    z = denoise(z, prompts, sd, start, steps=steps, guidance=guidance, interval=interval, scheduler=scheduler, generator=generator)
    image = sd.decode(z)
    if detail:
        image = image + clean - sd.decode(latents)
    return image.clamp(0, 1)


def draw(photos, size, index, seed, which):
    """The crop (3,size,size) in [0,1] of a random photo that image `index` is made from: the same at every call."""
    rng = np.random.default_rng([seed, index, which])
    photo = photos[rng.integers(len(photos))]
    y, x = (int(rng.integers(0, n - size + 1)) for n in photo.shape[-2:])
    return photo[:, y:y + size, x:x + size].float() / 255


def inputs(clean_photos, degraded_photos, size, indices, seed):
    """The clean and the degraded crops (B,3,size,size) in [0,1] that the images of these numbers are made from."""
    return (torch.stack([draw(clean_photos, size, i, seed, 0) for i in indices]),
            torch.stack([draw(degraded_photos, size, i, seed, 1) for i in indices]))


def synthesize_folder(clean_photos, degraded_photos, adapter, sd, config, folder, *, seed=0, rank=0, ranks=1):
    """Writes `config.images` synthesized photos to folder/000000.png and on; those that are there stay.

    clean_photos, degraded_photos: lists of (3,H,W) uint8, at least as large as the images. Of several processes,
    each makes every `ranks`-th batch. PNG files are written by threads, under another name first.
    """
    size = config.size or sd.size
    path = lambda i: folder / f"{i:06d}.png"
    groups = [range(i, min(i + config.batch, config.images)) for i in range(0, config.images, config.batch)][rank::ranks]
    done = [group for group in groups if all(path(i).exists() for i in group)]
    folder.mkdir(parents=True, exist_ok=True)
    bar = tqdm(total=sum(map(len, groups)), initial=sum(map(len, done)), desc="synth   ", unit="image", disable=None)
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as threads:
        writes = []
        for group in groups:
            if group in done:
                continue
            clean, degraded = inputs(clean_photos, degraded_photos, size, group, seed)
            with torch.no_grad():
                prompts = adapter(degraded.to(sd.device))
            images = synthesize(clean, prompts, sd, strength=config.strength, steps=config.steps, guidance=config.guidance,
                                generator=torch.Generator().manual_seed(seed * 1_000_003 + group[0]),
                                scheduler=config.scheduler, interval=(config.guidance_from, config.guidance_to), detail=config.detail)
            images = (images * 255).round().to(torch.uint8).cpu()
            writes += [threads.submit(write_png, image, path(i)) for i, image in zip(group, images)]
            bar.update(len(group))
            if bar.disable:
                print(f"synth    {group[-1] + 1:6d}/{config.images}", flush=True)
        for write in writes:
            write.result()                                 # a full disk is heard of here
    bar.close()


def write_png(image, path):
    """(3,H,W) uint8 to a PNG file, written under another name first."""
    to_pil_image(image).save(path.with_suffix(".tmp"), "PNG")
    os.replace(path.with_suffix(".tmp"), path)
