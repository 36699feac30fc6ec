"""CCD, content-driven conditional diffusion: synthesizes degraded photos from clean ones.

    z_0  = E(x_c)                                                encode the clean photo
    z_ts = sqrt(abar_ts) z_0 + sqrt(1 - abar_ts) eps             perturb
    z_0' = solve from t_s to 0 with eps_theta(z_t, t, P)         denoise, conditioned on P = A(x_d)
    x    = D(z_0')                                               decode

symbol   in code     shape, range
x_c      clean       (B,3,H,W) in [0,1], a photo in good weather: the content
P        prompts     (B,N,d), prompts of a degraded photo x_d, unpaired with x_c: the degradation
z_t      z           (B,C,h,w), latents at noise level t
t_s      timesteps   [t_s, ..., t_1], in 0..T-1; t_s is about strength * T
abar_t   abar        (T,), cumulative noise schedule of Stable Diffusion;
                     alpha_t = sqrt(abar_t), sigma_t = sqrt(1 - abar_t)
eps      noise       (B,C,h,w), standard normal
w        guidance    classifier-free guidance: eps_- + w (eps_P - eps_-) (Ho and Salimans 2022)
x        (returned)  (B,3,H,W) in [0,1], the synthesized photo

`synthesize` is the paper's method; guidance, solvers and all settings are our choice. The additions
below it are ours. Standalone use:

    config = SynthConfig(strength=0.6, guidance=7, steps=20)
    image = synthesize(clean, prompts, sd, config)      # sd: see `synthesize`
"""
import math
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers.utils.torch_utils import randn_tensor
from torchvision.transforms.functional import to_pil_image
from tqdm import tqdm


@dataclass
class SynthConfig:
    """CCD settings. All values are our choice, for Stable Diffusion 1.x/2.x; not tested with it."""
    images: int = 4000          # number of images to synthesize
    batch: int = 16             # images per batch; guidance doubles the U-Net's batch
    size: int = 0               # px, side of the images; 0: Stable Diffusion's own size
    strength: float = 0.6       # t_s / T in (0,1]; higher: more degradation, less of the content
    steps: int = 20             # U-Net evaluations per trajectory, independent of strength
    guidance: float = 7.0       # w; 1: no guidance
    scheduler: str = "dpm"      # ODE solver: ddim, or dpm for DPM-Solver++(2M)
    negative_prompt: str = ""   # addition: text to guide away from; empty: the null prompt
    anchor: bool = False        # addition: detail residual from a weather-free trajectory

    ADDITIONS = {"negative_prompt": "", "anchor": False}        # the values that mean "off"

    def __post_init__(self):
        if not 0 < self.strength <= 1:
            raise ValueError(f"strength must be in (0, 1], not {self.strength}")
        if not math.isfinite(self.guidance):
            raise ValueError(f"guidance must be finite, not {self.guidance}")
        if self.scheduler not in SOLVERS:
            raise ValueError(f"scheduler must be one of {', '.join(SOLVERS)}, "
                             f"not {self.scheduler!r}")
        if self.negative_prompt and self.guidance == 1 and not self.anchor:
            raise ValueError("negative_prompt has no effect at guidance 1 without the anchor: set "
                             "--negative-prompt ''")

    def active_additions(self):
        """Names of the additions that are switched on."""
        return [name for name, off in self.ADDITIONS.items() if getattr(self, name) != off]


# ---------------------------------------------------------------- the paper's method

@torch.no_grad()
def synthesize(clean, prompts, sd, config, generator=None):
    """CCD: degraded photos (B,3,H,W) in [0,1]: content from `clean`, degradation from `prompts`.

    clean: (B,3,H,W) in [0,1]; H and W as the VAE and U-Net need them (SD 1.5: multiples of 64).
    prompts: (B,N,d). generator: torch.Generator of the noise.
    sd: a models.StableDiffusion, or anything with its encode (images to scaled latents), decode (to
      images in [0,1]), predict_noise(z_t, t: int, prompts) (what the U-Net predicts: eps or v),
      null_prompt(N) (1,N,d), alphas_cumprod (T,) > 0 on the CPU, and prediction_type ("epsilon" or
      "v_prediction"). It moves its inputs to its device.
    Raises ValueError for an unsuitable size, batch or number of steps, and if an addition
    is switched on.
    """
    if config.active_additions():
        raise ValueError(f"use synthesize_with_additions for {config.active_additions()}")
    timesteps = choose_timesteps(len(sd.alphas_cumprod), config.strength, config.steps)
    z_0 = sd.encode(clean)                                                      # (B,C,h,w)
    noise = randn_tensor(z_0.shape, generator, z_0.device)
    z = perturb(z_0, noise, sd, timesteps[0])
    z = denoise(z, prompts, sd, timesteps, config.guidance, scheduler=config.scheduler)
    return sd.decode(z)


def perturb(z_0, noise, sd, t):
    """z_t = sqrt(abar_t) z_0 + sqrt(1 - abar_t) eps. z_0, noise: (B,C,h,w). t: int in 0..T-1."""
    alpha, sigma = alpha_sigma(sd.alphas_cumprod, t)
    return alpha * z_0 + sigma * noise


@torch.no_grad()
def denoise(z, prompts, sd, timesteps, guidance=1.0, negative=None, scheduler="dpm"):
    """z_ts (B,C,h,w) to z_0' (B,C,h,w), in exactly len(timesteps) U-Net evaluations.

    prompts: (B,N,d). timesteps: decreasing, equally spaced ints. guidance: w; 1 for none.
    negative: (1,N,d), the prompt to guide away from if w is not 1; the null prompt if None.
    """
    if len(z) != len(prompts):
        raise ValueError(f"{len(z)} clean photos but {len(prompts)} prompts")
    if guidance != 1:
        negative = sd.null_prompt(prompts.shape[1]) if negative is None else negative
        both = torch.cat([negative.expand_as(prompts), prompts.to(negative.device)])    # (2B,N,d)

    def model(z_t, t):
        """Estimates of z_0 and eps, after guidance."""
        if guidance == 1:
            output = sd.predict_noise(z_t, t, prompts)
        else:
            out_negative, out_prompt = sd.predict_noise(torch.cat([z_t, z_t]), t, both).chunk(2)
            output = out_negative + guidance * (out_prompt - out_negative)
        return to_z_0_eps(output, z_t, *alpha_sigma(sd.alphas_cumprod, t), sd.prediction_type)

    return SOLVERS[scheduler](model, z, timesteps, sd.alphas_cumprod)


def to_z_0_eps(output, z_t, alpha, sigma, prediction_type):
    """Converts a U-Net's output (B,C,h,w) at z_t to estimates of z_0 and eps."""
    if prediction_type == "epsilon":
        return (z_t - sigma * output) / alpha, output
    if prediction_type == "v_prediction":                   # v = alpha eps - sigma z_0
        return alpha * z_t - sigma * output, alpha * output + sigma * z_t
    raise ValueError(f"prediction type {prediction_type!r} is not supported")


def ddim(model, z, timesteps, abar):
    """DDIM with eta = 0 (Song et al. 2021). model: (z_t, t) -> estimates of z_0 and eps."""
    for t, t_next in zip(timesteps, [*timesteps[1:], -1]):
        z_0, eps = model(z, t)
        alpha, sigma = alpha_sigma(abar, t_next)
        z = alpha * z_0 + sigma * eps
    return z


def dpm_solver(model, z, timesteps, abar):
    """DPM-Solver++(2M) (Lu et al. 2022): second order; its first and last steps are first order.

    model: (z_t, t) -> estimates of z_0 and eps. With lambda_t = log(alpha_t / sigma_t):
    z_next = sigma_next / sigma z - alpha_next (exp(-h) - 1) D,    h = lambda_next - lambda
    D = z_0 + h / (2 h_last) (z_0 - z_0_last)
    """
    z_0_last, h_last = None, None
    for t, t_next in zip(timesteps, timesteps[1:]):
        z_0, _ = model(z, t)
        (alpha, sigma), (alpha_next, sigma_next) = alpha_sigma(abar, t), alpha_sigma(abar, t_next)
        h = math.log(alpha_next / sigma_next) - math.log(alpha / sigma)
        D = z_0 if z_0_last is None else z_0 + h / (2 * h_last) * (z_0 - z_0_last)
        z = sigma_next / sigma * z - alpha_next * math.expm1(-h) * D
        z_0_last, h_last = z_0, h
    return model(z, timesteps[-1])[0]                       # the step to sigma = 0


SOLVERS = {"ddim": ddim, "dpm": dpm_solver}


def alpha_sigma(abar, t):
    """sqrt(abar_t) and sqrt(1 - abar_t) as floats (no GPU sync); t = -1, the clean end: 1 and 0."""
    a = float(abar[t]) if t >= 0 else 1.0
    return a ** 0.5, (1 - a) ** 0.5


def choose_timesteps(total, strength, steps):
    """`steps` equally spaced timesteps [t_s, ..., t_1], down from t_s = strength * total.

    The spacing divides t_s + 1, so that the last step ends at -1, the clean image; this moves t_s
    by at most `steps`. diffusers' img2img drops steps at low strength instead.
    Raises ValueError if there are more steps than noise levels below t_s.
    """
    if not 1 <= steps <= round(strength * total):
        raise ValueError(f"steps must be in 1..{round(strength * total)} at strength {strength}, "
                         f"not {steps}")
    spacing = min(round(strength * total / steps), total // steps)
    return [spacing * i - 1 for i in range(steps, 0, -1)]


# ---------------------------------------------------------------- Additions (ours)
# PSNR of the demo's student with, minus without (README.md): anchor +2.6 dB in rain, +1.6 dB in
# snow; negative prompt +0.8 and +0.6 dB. Neither is used in haze.

@torch.no_grad()
def synthesize_with_additions(clean, prompts, sd, config, generator=None):
    """`synthesize` with a negative prompt and, optionally, the anchor. The same shapes; `sd` also
    needs text_prompt(text, tokens), (1,N,d), and device. Raises ValueError for an unsuitable
    size, batch or number of steps."""
    timesteps = choose_timesteps(len(sd.alphas_cumprod), config.strength, config.steps)
    negative = sd.text_prompt(config.negative_prompt, prompts.shape[1])         # (1,N,d)
    z_0 = sd.encode(clean)
    noise = randn_tensor(z_0.shape, generator, z_0.device)
    z = perturb(z_0, noise, sd, timesteps[0])
    image = sd.decode(denoise(z, prompts, sd, timesteps, config.guidance, negative,
                              config.scheduler))
    if not config.anchor:
        return image
    plain = denoise(z, negative.expand_as(prompts), sd, timesteps, scheduler=config.scheduler)
    return add_anchor(image, sd.decode(plain), clean.to(sd.device))


def add_anchor(image, plain, clean):
    """Anchor: x = D(z_P) + a (x_c - D(z_-)). Adds back the detail that denoising loses.

    image = D(z_P), plain = D(z_-), clean = x_c: (B,3,H,W) in [0,1]. Returns x, of the same shape.
    Strong weather needs a high strength, at which fine content is lost in the noise. z_- starts
    from the same noisy latents but is denoised with the negative prompt alone (if that is off, the
    null prompt): it has lost the same detail, and shows no weather. a is the local contrast that
    survives the weather.
    """
    return (image + remaining_contrast(image, plain) * (clean - plain)).clamp(0, 1)


def remaining_contrast(image, plain):
    """a of the least-squares fit image = a plain + b in 17x17 px around each pixel: (B,3,H,W) in
    [0,1] to (B,1,H,W) in [0,1], shared by the channels (guided filter, He et al. 2010)."""
    mean = lambda x: F.avg_pool2d(x, 17, 1, 8, count_include_pad=False)
    covariance = (mean(plain * image) - mean(plain) * mean(image)).sum(1, keepdim=True)
    variance = (mean(plain * plain) - mean(plain) ** 2).sum(1, keepdim=True)
    flat = 3e-4                                             # a tends to 1 in flat regions
    return ((covariance + flat) / (variance + flat)).clamp(0, 1)


def synthesize_photos(clean, prompts, sd, config, generator=None):
    """`synthesize` with the additions that are switched on in the config; the same shapes."""
    if config.active_additions():
        return synthesize_with_additions(clean, prompts, sd, config, generator)
    return synthesize(clean, prompts, sd, config, generator)


# ---------------------------------------------------------------- folders of images

def draw_crops(photos, size, seed, indices, stream):
    """Random crops (B,3,size,size) in [0,1] for the images of these indices; the same every time.

    photos: list of (3,H,W) uint8. stream: 0 for clean photos, 1 for degraded ones.
    """
    crops = []
    for index in indices:
        rng = np.random.default_rng([seed, index, stream])
        photo = photos[rng.integers(len(photos))]
        y, x = (int(rng.integers(n - size + 1)) for n in photo.shape[-2:])
        crops.append(photo[:, y:y + size, x:x + size] / 255)
    return torch.stack(crops)


@torch.no_grad()
def synthesize_folder(clean_photos, degraded_photos, adapter, sd, config, folder, *, seed=0,
                      rank=0, world_size=1):
    """Writes `config.images` synthesized photos to folder/000000.png ...; keeps finished batches.

    clean_photos, degraded_photos: lists of (3,H,W) uint8, at least as large as the images.
    adapter: degraded photos (B,3,H,W) in [0,1] to prompts (B,N,d); in eval mode, on sd.device. With
      the addition `residual`, pass the photos' residuals as degraded_photos.
    sd: as for `synthesize_with_additions`; if `config.size` is 0, it also needs size (px).
    Process `rank` of `world_size` makes every `world_size`-th batch.
    Raises ValueError for images that are not finite, as can happen in fp16.
    """
    folder, size = Path(folder), config.size or sd.size
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{i:06d}.png" for i in range(config.images)]
    batches = [range(first, min(first + config.batch, config.images))
               for first in range(rank * config.batch, config.images, world_size * config.batch)]
    pending = [indices for indices in batches if not all(paths[i].exists() for i in indices)]
    bar = tqdm(total=sum(map(len, pending)), desc="synth", unit="image",
               disable=True if rank else None)
    writes = ()
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as threads:
        for indices in pending:
            clean = draw_crops(clean_photos, size, seed, indices, 0)
            degraded = draw_crops(degraded_photos, size, seed, indices, 1)
            generator = torch.Generator().manual_seed(seed * 1_000_003 + indices[0])
            prompts = adapter(degraded.to(sd.device))                           # (B,N,d)
            images = synthesize_photos(clean, prompts, sd, config, generator)
            if not images.isfinite().all():
                raise ValueError("the synthesized images are not finite: use --precision bf16 or "
                                 "fp32, or another --sd")
            images = (images * 255).round().to(torch.uint8).cpu()               # GPU sync point
            list(writes)                                    # the previous batch; raises its errors
            writes = threads.map(write_png, images, [paths[i] for i in indices])
            bar.update(len(indices))
            if bar.disable and not rank:
                print(f"synth    {indices[-1] + 1:6d}/{config.images}", flush=True)
        list(writes)
    bar.close()


def write_png(image, path):
    """Writes (3,H,W) uint8 as a PNG file, under a temporary name first."""
    to_pil_image(image).save(path.with_suffix(".tmp"), "PNG")
    os.replace(path.with_suffix(".tmp"), path)
