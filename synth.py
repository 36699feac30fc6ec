"""CCD, content-driven conditional diffusion: clean photos into new degraded ones.

symbol   code       shape, range
x_c      clean      (B,3,H,W) in [0,1], a photo in good weather
P        prompts    (B,N,d) = A(x_d): the weather of a photo x_d, unpaired with x_c
P_-      negative   (1,N,d), a text's prompt: what guidance leads away from
z_0      latents    (B,C,h,w) = E(x_c)
t_s      start      strength * T in 1..T, how many noise levels up the content goes
abar_t   abar       scalar, the model's own cumulative noise schedule
eps      noise      (B,C,h,w), standard normal
w        guidance   1: none (Ho and Salimans 2022)
x        image      (B,3,H,W) in [0,1], the synthesized photo

    perturb   z_ts = sqrt(abar_ts) z_0 + sqrt(1 - abar_ts) eps
    denoise   z_ts -> z_w in `steps` calls of the U-Net, each eps_- + w (eps_P - eps_-)
    anchor    x = D(z_w) + a (x_c - D(z_-)): z_- from the same z_ts with the negative prompt alone
    veil      x = a x_c + b instead, a and b smooth: what D(z_w) is of D(z_-); z_w then starts
              from the latents of x_c made as bright as x_d

The content comes from x_c, the weather from x_d. Negative prompt and anchor are our choice. At the
strength that weather needs, fine content drowns in the noise and is made up anew, in z_w and z_-
alike; a is how much of the contrast the weather leaves at each place (haze: its transmission). What
D(z_w) shows beyond a D(z_-) + b is streaks and flakes, but in haze it is made-up content. And haze
is bright, but what is left of x_c at the highest noise level is its brightness, which would stay.
"""
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, UniPCMultistepScheduler
from torchvision.transforms.functional import to_pil_image
from tqdm import tqdm

SCHEDULERS = {"ddim": partial(DDIMScheduler, clip_sample=False, set_alpha_to_one=True),
              "dpm": DPMSolverMultistepScheduler, "unipc": UniPCMultistepScheduler}


@dataclass
class SynthConfig:
    """CCD, the synthesis. All values are our choice; the paper's are not known to us."""
    images: int = 256           # images to synthesize
    batch: int = 16             # images at a time
    size: int = 0               # px, their side; 0: the Stable Diffusion's own
    strength: float = 0.95      # t_s / T in (0,1]: how much content is given up for the weather
    steps: int = 10             # steps of the solver, whatever the strength
    guidance: float = 3.5       # w; 1: none; 8 for dehaze
    guidance_from: float = 0.0  # guidance acts on timesteps from this part of T on ...
    guidance_to: float = 1.0    # ... to this one (Kynkaanniemi et al. 2024)
    negative_prompt: str = "a photo in clear weather"   # a text that guidance leads away from
    scheduler: str = "dpm"      # ddim, dpm (DPM-Solver++) or unipc; diffusers' own
    anchor: bool = True         # the clean photo's own fine content, at half the cost again
    veil: bool = False          # the weather has no shape of its own: x = a x_c + b; on for dehaze


def start_timestep(sd, strength, steps):
    """t_s = strength * T, to the nearest multiple of `steps`: all steps are of one length.

    Raises ValueError where strength is not in (0,1], or more steps than noise levels are asked for.
    """
    if not 0 < strength <= 1:
        raise ValueError(f"strength must lie in (0, 1], not {strength}")
    total = len(sd.alphas_cumprod)
    if not 1 <= steps <= round(strength * total):
        raise ValueError(f"steps must lie in 1..{round(strength * total)} at strength {strength}, "
                         f"not {steps}")
    return steps * min(round(strength * total / steps), total // steps)


def perturb(latents, noise, sd, start):
    """z_ts = sqrt(abar_ts) z_0 + sqrt(1 - abar_ts) eps. latents, noise: (B,C,h,w)."""
    abar = float(sd.alphas_cumprod[start - 1])
    return abar ** 0.5 * latents + (1 - abar) ** 0.5 * noise


@torch.no_grad()
def denoise(z, prompts, sd, start, *, steps, guidance=1, negative=None, interval=(0.0, 1.0),
            scheduler=SynthConfig.scheduler):
    """From z_ts (B,C,h,w) to z_w, conditioned on prompts (B,N,d), in exactly `steps` U-Net calls.

    Where guidance acts, on timesteps in interval * T, a call holds 2B latents, and leads away from
    negative (1,N,d), the null prompt by default.
    """
    solver = few_step_solver(sd, start, steps, scheduler)
    if guidance != 1:
        negative = sd.null_prompt(prompts.shape[1]) if negative is None else negative
        pairs = torch.cat([negative.expand_as(prompts), prompts])                   # (2B,N,d)
    low, high = (part * len(sd.alphas_cumprod) for part in interval)
    for t in solver.timesteps.tolist():                    # Python ints: no waiting
        if guidance != 1 and low <= t <= high:
            away, towards = sd.predict_noise(z.repeat(2, 1, 1, 1), t, pairs).chunk(2)
            predicted = away + guidance * (towards - away)
        else:
            predicted = sd.predict_noise(z, t, prompts)
        z = solver.step(predicted, t, z).prev_sample
    return z


def few_step_solver(sd, start, steps, scheduler):
    """One of diffusers' schedulers, for `steps` steps from t_s to 0 of the model's own schedule.

    The schedule is cut off at t_s: so a low strength takes as many steps as a high one, where the
    usual img2img would drop most of them.
    """
    if scheduler not in SCHEDULERS:
        raise ValueError(f"scheduler must be one of {', '.join(SCHEDULERS)}, not {scheduler!r}")
    abar = sd.alphas_cumprod[:start].double()
    betas = 1 - abar / torch.cat([torch.ones(1, dtype=abar.dtype), abar[:-1]])
    solver = SCHEDULERS[scheduler](num_train_timesteps=start, trained_betas=betas.numpy(),
                                   prediction_type=sd.prediction_type, timestep_spacing="trailing")
    solver.set_timesteps(steps)
    return solver


@torch.no_grad()
def synthesize(clean, prompts, sd, *, strength, steps, guidance=SynthConfig.guidance,
               generator=None, scheduler=SynthConfig.scheduler, interval=(0.0, 1.0),
               negative_prompt=SynthConfig.negative_prompt, anchor=SynthConfig.anchor,
               veil=SynthConfig.veil, brightness=None):
    """CCD: new degraded photos (B,3,H,W) in [0,1] from clean ones and prompts.

    clean: (B,3,H,W) in [0,1], H and W multiples of what the U-Net needs (8 f for SD).
    prompts: (B,N,d). generator: of the noise, on any device. brightness: (B,) in [0,1], the mean of
    each x_d, for a veil; clean's own if None. The others: see SynthConfig.
    Raises ValueError for what doesn't fit.
    """
    if len(clean) != len(prompts):
        raise ValueError(f"{len(clean)} clean photos but {len(prompts)} prompts")
    start = start_timestep(sd, strength, steps)
    clean = clean.to(sd.device)
    latents = sd.encode(clean)
    device = generator.device if generator is not None else sd.device
    noise = torch.randn(latents.shape, generator=generator, device=device).to(sd.device)
    z = lit = perturb(latents, noise, sd, start)           # lit: as bright as x_d
    if veil and brightness is not None:
        brighter = brightness.to(sd.device).view(-1, 1, 1, 1) - clean.mean((1, 2, 3), keepdim=True)
        lit = perturb(sd.encode((clean + brighter).clamp(0, 1)), noise, sd, start)
    negative = sd.text_prompt(negative_prompt, prompts.shape[1])
    image = sd.decode(denoise(lit, prompts, sd, start, steps=steps, guidance=guidance,
                              negative=negative, interval=interval, scheduler=scheduler))
    if anchor or veil:
        plain = sd.decode(denoise(z, negative.expand_as(prompts), sd, start, steps=steps,
                                  scheduler=scheduler))
        a, b = local_fit(plain, image)
        if veil:
            image = mean_around(a) * clean + mean_around(b)
        else:
            image = image + a * (clean - plain)
    return image.clamp(0, 1)


def local_fit(plain, image):
    """a, b of image = a plain + b around each pixel, by least squares, a of all channels together.

    plain, image: (B,3,H,W) to a (B,1,H,W) in [0,1], the contrast that is left, and b (B,3,H,W).
    The guided filter's model (He et al. 2010); a is 1 where all is flat.
    """
    mean_plain, mean_image = mean_around(plain), mean_around(image)
    covariance = (mean_around(plain * image) - mean_plain * mean_image).sum(1, keepdim=True)
    variance = (mean_around(plain * plain) - mean_plain ** 2).sum(1, keepdim=True)
    flat = 3e-4                                            # a variance that tells nothing
    a = ((covariance + flat) / (variance + flat)).clamp(0, 1)
    return a, mean_image - a * mean_plain


def mean_around(x):
    """The mean over 17x17 px around each pixel: (B,C,H,W) to the same."""
    return F.avg_pool2d(x, 17, 1, 8, count_include_pad=False)


def draw(photos, size, seed, index, which):
    """The crop (3,size,size) in [0,1] that image `index` is made from: the same at every call."""
    rng = np.random.default_rng([seed, index, which])
    photo = photos[rng.integers(len(photos))]
    y, x = (int(rng.integers(n - size + 1)) for n in photo.shape[-2:])
    return photo[:, y:y + size, x:x + size] / 255


def inputs(clean_photos, degraded_photos, size, seed, indices):
    """The crops x_c and x_d (B,3,size,size) in [0,1] that these images are made from."""
    return (torch.stack([draw(photos, size, seed, i, which) for i in indices])
            for which, photos in enumerate((clean_photos, degraded_photos)))


def synthesize_folder(clean_photos, degraded_photos, adapter, sd, config, folder, *, seed=0,
                      rank=0, ranks=1):
    """Writes `config.images` synthesized photos to folder/000000.png ...; batches there stay.

    clean_photos, degraded_photos: lists of (3,H,W) uint8, at least as large as the images.
    Of several processes, each makes every `ranks`-th batch.
    """
    folder.mkdir(parents=True, exist_ok=True)
    size, options = config.size or sd.size, dict(
        strength=config.strength, steps=config.steps, guidance=config.guidance,
        scheduler=config.scheduler, interval=(config.guidance_from, config.guidance_to),
        negative_prompt=config.negative_prompt, anchor=config.anchor, veil=config.veil)
    path = lambda i: folder / f"{i:06d}.png"
    first = range(0, config.images, config.batch)[rank::ranks]
    groups = [range(i, min(i + config.batch, config.images)) for i in first]
    groups = [group for group in groups if not all(path(i).exists() for i in group)]
    bar = tqdm(total=sum(map(len, groups)), desc="synth   ", unit="image",
               disable=True if rank else None)
    writes = []
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as threads:
        for group in groups:
            clean, degraded = inputs(clean_photos, degraded_photos, size, seed, group)
            with torch.no_grad():
                prompts = adapter(degraded.to(sd.device))
            generator = torch.Generator().manual_seed(seed * 1_000_003 + group[0])
            images = synthesize(clean, prompts, sd, generator=generator,
                                brightness=degraded.mean((1, 2, 3)), **options)
            images = (images * 255).round().to(torch.uint8).cpu()
            for write in writes:
                write.result()                             # a full disk is heard of here
            writes = [threads.submit(write_png, x, path(i)) for i, x in zip(group, images)]
            bar.update(len(group))
            if bar.disable and not rank:
                print(f"synth    {group[-1] + 1:6d}/{config.images}", flush=True)
        for write in writes:
            write.result()
    bar.close()


def write_png(image, path):
    """(3,H,W) uint8 to a PNG file, written under another name first."""
    to_pil_image(image).save(path.with_suffix(".tmp"), "PNG")
    os.replace(path.with_suffix(".tmp"), path)
