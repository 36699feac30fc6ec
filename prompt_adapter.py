"""DPA, degradation-aware prompt adapter: turns a degraded photo into a prompt for Stable Diffusion.

    loss = mean (eps - eps_theta(z_t, t, P))^2 + lambda * InfoNCE(q, k)       P = A(x_d)

symbol   in code       shape, range
x_d      degraded      (B,3,H,W) in [0,1], a web photo in bad weather; a and b are two crops of it
                       (with the addition `residual`: of its residual x_d - T(x_d))
A        adapter       the network trained here; Stable Diffusion stays frozen
P        prompts       (B,N,d), N tokens; d = the U-Net's cross-attention width
z_t      z_t           (B,C,h,w), latents of the photo at crop a, noised to level t in 0..T-1
eps      noise         (B,C,h,w), standard normal; replaced by v if the U-Net predicts v
abar_t   abar          (B,1,1,1), cumulative noise schedule of Stable Diffusion
q, k     query, key    (B,D), unit length: embeddings of the two crops
tau      temperature   scalar

Contrastive pairs: two crops of one photo share its degradation (positive); crops b of the other
photos in the batch, in all processes, are the negatives. InfoNCE with in-batch negatives (as in
SimCLR, Chen et al. 2020) is our choice of contrastive loss. Our additions are marked.
Standalone use:

    adapter = PromptAdapter(sd.width, tokens=77, base=sd.null_prompt(77))
    loader = CropPairs(photos, sd, size=512, batch=16)          # photos: list of (3,H,W) uint8
    train_adapter(adapter, sd, loader, AdapterConfig(steps=3000), checkpoint="adapter.pt")
    save_adapter(adapter, "adapter.safetensors")
    prompts = load_adapter("adapter.safetensors")(crops)        # crops: (B,3,H,W) in [0,1]
"""
import io
import itertools
import json
import math
import os
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from torch.optim.swa_utils import update_bn
from tqdm import tqdm


@dataclass
class AdapterConfig:
    """DPA settings. All values are our choice, for Stable Diffusion 1.x/2.x; not tested with it."""
    tokens: int = 0             # N, tokens per prompt; 0: the text encoder's maximum
    steps: int = 3000           # updates
    batch: int = 16             # photos per update and process, two crops of each
    crop: int = 0               # px, side of the crops; 0: same as the synthesized images
    lr: float = 1e-4            # peak learning rate of AdamW; 5% warm-up, then cosine to 10%
    contrast: float = 0.1       # lambda, weight of InfoNCE; 0: diffusion loss alone
    temperature: float = 0.1    # tau (SimCLR: 0.1)
    save_every: int = 50        # updates between reports, which also write a checkpoint
    residual: bool = False      # addition: the adapter's input is x_d - T(x_d), T: teacher
    weather_weight: float = 0.0  # addition: the diffusion loss is weighted by 1 + this * |residual|
    caption_base: bool = False  # addition: prompts are centred on the plain captions' mean
    penalty: float = 0.0        # addition: weight of ||P - base||^2 / ||base||^2 in the loss

    ADDITIONS = {"residual": False, "weather_weight": 0.0, "caption_base": False, "penalty": 0.0}

    def __post_init__(self):
        if self.batch < 2:
            raise ValueError(f"the adapter's batch must be at least 2, not {self.batch}")
        if self.temperature <= 0:
            raise ValueError(f"temperature must be positive, not {self.temperature}")
        if self.weather_weight and not self.residual:
            raise ValueError("weather_weight needs residual: switch it on (--adapter-residual) "
                             "or set --adapter-weather-weight 0")

    def active_additions(self):
        """Names of the additions that are switched on."""
        return [name for name, off in self.ADDITIONS.items() if getattr(self, name) != off]


# ---------------------------------------------------------------- the adapter and its losses

class PromptAdapter(nn.Module):
    """A: degraded photos (B,3,H,W) in [0,1] to prompts (B,N,d). The network is our choice.

    Three convolutional scales, each summarized by the mean and standard deviation of its features
    over the photo, because degradation is roughly uniform and content is not. Then a layer norm
    and an MLP.

    width: d. tokens: N. channels: of the first convolution. embedding: D. base: (1,N,d), the output
    before training (default: zeros; the null prompt is a better start).
    Additions: centered, see `centering`. residual: the input is the residual of x_d (see
    `residuals`) instead of x_d, and a batch norm over the photos replaces the layer norm.
    Raises ValueError for a base of another shape.
    """

    def __init__(self, width, tokens, channels=16, embedding=128, base=None, centered=False,
                 residual=False):
        super().__init__()
        base = torch.zeros(1, tokens, width) if base is None else base.detach().clone()
        if base.shape != (1, tokens, width):
            raise ValueError(f"the base must be {(1, tokens, width)}, not {tuple(base.shape)}")
        self.config = dict(width=width, tokens=tokens, channels=channels, embedding=embedding,
                           centered=centered, residual=residual)
        c, hidden = channels, 16 * channels
        self.encoder = nn.ModuleList([downsample(3, c, 2 * c), downsample(2 * c, 2 * c, 4 * c),
                                      downsample(4 * c, 4 * c, 8 * c)])
        norm = nn.BatchNorm1d(28 * c, affine=False) if residual else nn.LayerNorm(28 * c)
        self.mix = nn.Sequential(norm, nn.Linear(28 * c, hidden), nn.SiLU())
        self.to_prompts = nn.Sequential(nn.Linear(hidden, hidden), nn.SiLU(),
                                        centering(hidden) if centered else nn.Identity(),
                                        nn.Linear(hidden, tokens * width, bias=not centered))
        self.to_embedding = nn.Sequential(nn.Linear(hidden, hidden), nn.SiLU(),
                                          nn.Linear(hidden, embedding))
        self.register_buffer("base", base)
        for parameter in self.to_prompts[-1].parameters():
            nn.init.zeros_(parameter)                               # starts at the base

    def forward(self, degraded, with_embedding=False):
        """Prompts (B,N,d) for photos (B,3,H,W) in [0,1] of at least 8 px; on request also their
        embeddings (B,D) of unit length, which the contrastive loss compares."""
        gain = 16 if self.config["residual"] else 4                 # about unit variance
        x, statistics = gain * (degraded - 0.5), []
        for scale in self.encoder:
            x = scale(x)                                            # (B,c',H/2,W/2), /4, /8
            flat = x.flatten(2).float()                             # (B,c',HW)
            statistics += [flat.mean(2), (flat.var(2, correction=0) + 1e-5).sqrt()]
        features = self.mix(torch.cat(statistics, 1))               # (B,16c)
        change = self.to_prompts(features).float()                  # (B,Nd)
        prompts = self.base + change.unflatten(1, self.base.shape[1:])
        if with_embedding:
            return prompts, F.normalize(self.to_embedding(features).float(), dim=1)
        return prompts


def downsample(c_in, c_mid, c_out):
    """Two convolutions: (B,c_in,H,W) to (B,c_out,H/2,W/2). Zero padding would make the statistics,
    and hence the prompts, depend on the size of the crop."""
    reflect = dict(padding=1, padding_mode="reflect")
    return nn.Sequential(nn.Conv2d(c_in, c_mid, 3, **reflect), nn.SiLU(),
                         nn.Conv2d(c_mid, c_out, 3, stride=2, **reflect), nn.SiLU())


def info_nce(query, key, queue, temperature, ignore=None):
    """InfoNCE (van den Oord et al. 2018):
    mean over B of -log( exp(q.k / tau) / (exp(q.k / tau) + sum_j exp(q.n_j / tau)) ).

    query, key: (B,D), unit length. queue: (Q,D), unit length, the negatives n_j; in
    `train_adapter`, the keys of all processes. temperature: tau. ignore: (B,Q) bool, negatives to
    exclude (crops of the query's own photo).
    Returns a scalar. Raises ValueError if the shapes do not match.
    """
    if query.shape != key.shape or queue.shape[1:] != query.shape[1:]:
        shapes = tuple(tuple(x.shape) for x in (query, key, queue))
        raise ValueError(f"shapes of query, key and queue do not match: {shapes}")
    positive = (query * key).sum(1, keepdim=True)                   # (B,1)
    negative = query @ queue.T                                      # (B,Q)
    if ignore is not None:
        negative = negative.masked_fill(ignore, -torch.inf)
    logits = torch.cat([positive, negative], 1) / temperature       # (B,1+Q)
    target = torch.zeros(len(logits), dtype=torch.long, device=logits.device)
    return F.cross_entropy(logits, target)                          # class 0: the positive


def diffusion_loss(sd, z_0, prompts, t, noise, weight=1.0):
    """||target - eps_theta(z_t, t, P)||^2, mean over all elements.

    The target is what the U-Net was trained to predict: eps (Ho et al. 2020), or
    v = sqrt(abar) eps - sqrt(1 - abar) z_0 (Salimans and Ho 2022).
    z_0, noise: (B,C,h,w). prompts: (B,N,d). t: (B,) int64. Returns a scalar.
    weight: addition, (B,1,h,w), of the squared errors; see `weather_weight`.
    Raises ValueError for another prediction type.
    """
    abar = sd.alphas_cumprod.to(z_0.device)[t].view(-1, 1, 1, 1)
    z_t = abar.sqrt() * z_0 + (1 - abar).sqrt() * noise
    if sd.prediction_type == "epsilon":
        target = noise
    elif sd.prediction_type == "v_prediction":
        target = abar.sqrt() * noise - (1 - abar).sqrt() * z_0
    else:
        raise ValueError(f"prediction type {sd.prediction_type!r} is not supported")
    return (weight * (target - sd.predict_noise(z_t, t, prompts)).square()).mean()


# ---------------------------------------------------------------- training

def train_adapter(adapter, sd, loader, config, *, seed=0, checkpoint=None, log=print):
    """Trains the adapter in place; Stable Diffusion stays frozen.

    sd: a models.StableDiffusion, or anything with its predict_noise(z_t, t (B,), prompts)
      (differentiable in the prompts), unet, alphas_cumprod, prediction_type, device (a
      torch.device) and dtype.
    loader: batches (z_0 (B,C,h,w), a and b (B,3,H,W) uint8 or float in [0,1], photo numbers (B,)),
      repeated until `config.steps` updates are done; see `CropPairs`. To resume, its attribute
      `step` is set if it has one; otherwise, the batches already used are read again and skipped.
    config: tokens, crop, batch and caption_base are not read here: the caller builds the adapter
      and the loader.
    seed: of t and noise. With several processes, each needs its own seed and batches; the keys of
      all processes are negatives, except those of crops with the same photo number. Batch norms
      (additions `residual` and `caption_base`) are per process; call `update_norms` after training.
    checkpoint: path, written every `config.save_every` updates; training resumes from it.
    log: called with each report, {"stage", "step", "diffusion", "contrastive", "steps_per_s"}.
    Returns the last report; {} if training was already complete. Raises ValueError for an empty
    loader, a config whose `residual` differs from the adapter's, a penalty with a base of zeros, or
    losses or weights that are not finite.
    """
    if config.residual != adapter.config["residual"]:
        raise ValueError(f"residual is {config.residual} in the config but "
                         f"{adapter.config['residual']} in the adapter")
    if config.penalty and not adapter.base.any():
        raise ValueError("a penalty needs a base that is not zero: pass one to PromptAdapter, "
                         "such as the null prompt")
    device = sd.device
    sd.unet.requires_grad_(False).eval()
    adapter.to(device, memory_format=torch.channels_last).train()
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=config.lr, weight_decay=0.01,
                                  fused=True)
    scaler = torch.amp.GradScaler(device.type, enabled=sd.dtype is torch.float16)
    generator = torch.Generator(device)
    parts, start, report = dict(adapter=adapter, optimizer=optimizer, scaler=scaler), 0, {}
    if checkpoint and Path(checkpoint).exists():
        state = load_state(checkpoint, device)
        for name, part in parts.items():
            part.load_state_dict(state[name])
        start = state["step"]
    distributed = dist.is_initialized()
    is_main = not distributed or dist.get_rank() == 0
    model = nn.parallel.DistributedDataParallel(adapter) if distributed else adapter
    bar = tqdm(range(start, config.steps), "adapter", config.steps, initial=start, unit="step",
               disable=None if is_main else True)
    sums, count, clock = torch.zeros(2, device=device), 0, time.time()

    for step, batch in zip(bar, batches_from(loader, start)):
        # Batch: two crops of each photo (or of its residual), and the photo's latents at crop a.
        z_0, a, b, photo = (to_device(x, device) for x in batch)
        generator.manual_seed(seed * 1_000_003 + step)              # the same after a resume
        t = torch.randint(len(sd.alphas_cumprod), (len(a),), generator=generator, device=device)
        noise = torch.randn(z_0.shape, generator=generator, device=device)

        # Forward.
        with torch.autocast(device.type, sd.dtype, enabled=sd.dtype is not torch.float32):
            prompts, embeddings = model(torch.cat([a, b]), with_embedding=True)
        prompts = prompts[:len(a)]                                  # (B,N,d), of crop a
        query, key = embeddings.chunk(2)                            # (B,D) each

        # Losses.
        keys, photos = key, photo
        if distributed:
            keys, photos = Gather.apply(key), Gather.apply(photo)
        same_photo = photo[:, None] == photos                       # (B,Q)
        contrastive = info_nce(query, key, keys, config.temperature, ignore=same_photo)
        weight = 1.0
        if config.weather_weight:                                   # addition
            weight = weather_weight(a, z_0, config.weather_weight)
        diffusion = diffusion_loss(sd, z_0.float(), prompts, t, noise, weight)
        loss = diffusion + config.contrast * contrastive
        if config.penalty:                                          # addition
            loss = loss + config.penalty * prompt_penalty(prompts, adapter.base)

        # Backward and update.
        for group in optimizer.param_groups:
            group["lr"] = config.lr * learning_rate(step / config.steps)
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(adapter.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()

        # Report.
        sums += torch.stack([diffusion.detach(), contrastive.detach()])
        count += 1
        if (step + 1) % config.save_every and step + 1 < config.steps:
            continue
        losses = dict(zip(("diffusion", "contrastive"), (sums / count).tolist()))   # GPU sync point
        if not (all(map(math.isfinite, losses.values()))
                and all(p.isfinite().all() for p in adapter.parameters())):
            raise ValueError(f"adapter: losses or weights are not finite at step {step + 1}: "
                             f"{losses}. Lower the learning rate ({config.lr:g}) or use fp32")
        report = dict(stage="adapter", step=step + 1, **losses,
                      steps_per_s=round(count / (time.time() - clock), 2))
        bar.set_postfix(losses)
        if is_main:
            log(report)
        sums, count, clock = torch.zeros_like(sums), 0, time.time()

        # Checkpoint.
        if checkpoint and is_main:
            state = {name: part.state_dict() for name, part in parts.items()}
            save_state(state | dict(step=step + 1), checkpoint)
    adapter.eval()
    return report


class Gather(torch.autograd.Function):
    """Gathers (B,...) from R processes into (R B,...), the same in all; gradients reach all."""

    @staticmethod
    def forward(context, x):
        parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, x.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(context, gradient):
        gradient = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(gradient)                                   # in place
        return gradient.chunk(dist.get_world_size())[dist.get_rank()]


def learning_rate(progress):
    """Fraction of the peak at progress in [0,1]: 5% linear warm-up, then cosine to 10%."""
    return min(1.0, progress / 0.05 + 0.02) * (0.55 + 0.45 * math.cos(math.pi * progress))


# ---------------------------------------------------------------- Additions (ours)
# PSNR of the demo's student with, minus without (README.md): within the noise for each of the four;
# caption base, weather weight and penalty together: +0.4 dB on the mean of the four tasks. Without
# the residual, prompts hardly follow the weather.

def centering(hidden):
    """Addition `caption_base`: P = base + W (h - mean h) / std h, where base is the mean
    embedding of the task's plain captions ("a photo in snow").

    The captions set the mean; the photo contributes its deviation from the other photos. Uncentred
    prompts drift towards the average severity of web photos, which is lower than that of a
    teacher's training data.
    """
    return nn.BatchNorm1d(hidden, affine=False)


@torch.no_grad()
def residuals(photos, restore):
    """Addition: what the teacher T removes from each photo, 128 + 127 (x_d - T(x_d)), used as the
    adapter's input in place of x_d. It shows the degradation and little of the content.

    photos: list of (3,H,W) uint8. restore: T, one photo (3,H,W) in [0,1] to the same, on the CPU.
    Returns a list of (3,H,W) uint8, grey (128) where the teacher removes nothing. Raises
    ValueError for an output that is not finite.
    """
    removed = []
    for photo in tqdm(photos, "residuals", disable=None):
        x = photo / 255
        r = x - restore(x).clamp(0, 1)
        if not r.isfinite().all():
            raise ValueError(f"the teacher's output for photo {len(removed)} is not finite")
        removed.append((128 + 127 * r).round().to(torch.uint8))
    return removed


def weather_weight(residual, z_0, strength):
    """Addition: weights (B,1,h,w) of the diffusion loss, about 1 + strength * |x_d - T(x_d)|.

    residual: (B,3,H,W) in [0,1], see `residuals`. z_0: (B,C,h,w). Flakes and streaks cover little
    of a photo: without weights, the prompts depend on them less.
    """
    removed = (2 * residual - 1).abs().mean(1, keepdim=True)        # (B,1,H,W)
    return 1 + strength * F.adaptive_avg_pool2d(removed, z_0.shape[-2:])


def update_norms(adapter, loader, step, batches=32):
    """Additions `residual` and `caption_base`: recomputes the batch norms' statistics. Call it
    after `train_adapter` (precise batch norm, Wu and Johnson 2021).

    Running statistics lag behind the weights: with them, the mean prompt deviated from the base by
    0.2 to 2 times the norm of the base; with recomputed statistics, by about 0.1 times.
    loader: as for `train_adapter`; its batches from update `step` on are used.
    """
    rows = itertools.islice(batches_from(loader, step), batches)
    update_bn((to_device(torch.cat([a, b]), adapter.base.device) for _, a, b, _ in rows), adapter)


def prompt_penalty(prompts, base):
    """Addition `penalty`: ||P - base||^2 / ||base||^2, mean over B. prompts: (B,N,d). base:
    (1,N,d), not zero. Returns a scalar.

    Without it, the demo's rain prompts end up 2.6 ||base|| away from the base (with it, only
    0.8 ||base||), outside the distribution that the U-Net was trained on.
    """
    return (prompts - base).square().sum((1, 2)).mean() / base.square().sum()


# ---------------------------------------------------------------- batches and files

class CropPairs:
    """Endless batches of crop pairs: (latents of a (B,C,h,w), a and b (B,3,size,size) uint8, photo
    numbers (B,)). Each batch is a deterministic function of seed and step.

    photos: list of (3,H,W) uint8, at least `size` px high and wide; each is also used mirrored.
    sd: provides encode and factor (px per latent). size: a multiple of 8 latents (8 * factor px).
    The latents are computed once and then cropped: re-encoding every crop made a step take 1.67
    times as long. Crop b is the one of eight candidates that is farthest from a. Mirroring and the
    choice of b are ours. inputs: addition, the photos' residuals (`residuals`), from which a and b
    are then cropped. Raises ValueError for an invalid size, for smaller photos, or without photos.
    """

    @torch.no_grad()
    def __init__(self, photos, sd, size, batch, seed=0, inputs=None):
        if size % (8 * sd.factor) or min((min(p.shape[1:]) for p in photos), default=0) < size:
            raise ValueError(f"crops of {size} px need at least one photo, no smaller photos, "
                             f"and a size that is a multiple of {8 * sd.factor} px")
        self.inputs = photos if inputs is None else inputs
        self.size, self.batch, self.seed = size, batch, seed
        self.step, self.factor, self.latents = 0, sd.factor, []     # second half: mirrored photos
        for i in tqdm(range(2 * len(photos)), "latents", disable=None):
            photo = pick(photos, i)
            height, width = (n // sd.factor * sd.factor for n in photo.shape[-2:])
            z = sd.encode(photo[None, :, :height, :width].float() / 255)
            self.latents.append(z[0].half().cpu())                  # (C,h,w)

    def __iter__(self):
        while True:
            yield self.batch_at(self.step)                          # set `step` to resume there
            self.step += 1

    def batch_at(self, step):
        rng, rows, f = np.random.default_rng([self.seed, step]), [], self.factor
        first = step * self.batch
        for i in shuffled_epochs(len(self.latents), first, self.batch, self.seed):
            z, photo, side = self.latents[i], pick(self.inputs, i), self.size // f
            corners = rng.integers([z.shape[1] - side + 1, z.shape[2] - side + 1], size=(9, 2))
            distances = abs(corners[1:] - corners[0]).max(1)
            (y, x), (y_b, x_b) = corners[0], corners[1 + distances.argmax()]    # in latents
            rows.append((z[:, y:y + side, x:x + side],
                         photo[:, y * f:y * f + self.size, x * f:x * f + self.size],
                         photo[:, y_b * f:y_b * f + self.size, x_b * f:x_b * f + self.size],
                         torch.tensor(i % len(self.inputs))))
        return [torch.stack(column) for column in zip(*rows)]


def pick(photos, i):
    """Photo i of n, or photo i - n mirrored."""
    return photos[i] if i < len(photos) else photos[i - len(photos)].flip(-1)


def shuffled_epochs(n, first, count, seed):
    """Samples first ... first + count - 1 of an endless sequence of shuffles of 0 ... n - 1."""
    epochs = range(first // n, (first + count - 1) // n + 1)
    order = np.concatenate([np.random.default_rng([seed, epoch, n]).permutation(n)
                            for epoch in epochs])
    return order[first % n:][:count]


def batches_from(loader, step):
    """Batches of a loader, repeated without end, from update `step` on. Raises ValueError if there
    are none."""
    if hasattr(loader, "step"):
        loader.step, step = step, 0
    while True:
        batch = None
        for batch in loader:
            if step > 0:                                            # seen before the interruption
                step -= 1
            else:
                yield batch
        if batch is None:
            raise ValueError("the loader yielded no batch: it is empty, or an iterator, which can "
                             "be read only once")


def to_device(x, device):
    """Copies to a device, from pinned memory to a GPU; uint8 images become floats in [0,1]."""
    if device.type == "cuda" and x.device.type == "cpu":
        x = x.pin_memory()
    x = x.to(device, non_blocking=True)
    return x / 255 if x.dtype is torch.uint8 else x


def load_state(path, device):
    """Reads a checkpoint. Raises ValueError, with the path, if it is damaged."""
    try:
        return torch.load(path, map_location=device, weights_only=True)
    except (torch.OutOfMemoryError, OSError):                   # the file may be intact
        raise
    except Exception as error:                                  # torch raises many types
        reason = str(error).partition("\n")[0]
        raise ValueError(f"{path}: not a readable checkpoint ({reason}); delete it to start this "
                         "stage again") from None


def save_state(state, path):
    """torch.save under a temporary name; a full disk raises OSError and leaves the old file."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    Path(f"{path}.tmp").write_bytes(buffer.getbuffer())
    os.replace(f"{path}.tmp", path)


def save_adapter(adapter, path):
    """Writes the adapter as safetensors, with its architecture in the metadata."""
    state = {k: v.cpu().contiguous() for k, v in adapter.state_dict().items()}
    save_file(state, f"{path}.tmp", metadata={"adapter": json.dumps(adapter.config)})
    os.replace(f"{path}.tmp", path)


def load_adapter(path, device="cpu"):
    """Loads what `save_adapter` wrote, frozen and in eval mode. Raises ValueError, with the path,
    for other files."""
    try:
        with safe_open(path, "pt") as file:
            # Cloned into aligned memory: otherwise, kernels may round differently than in training.
            state = {k: file.get_tensor(k).clone() for k in file.keys()}
            config = json.loads((file.metadata() or {})["adapter"])
        with torch.device("meta"):                          # no allocation before the size check
            adapter = PromptAdapter(**config)
        adapter.load_state_dict(state, assign=True)
        adapter.float()
    except Exception as error:                              # safetensors has error types of its own
        reason = " ".join(str(error).split())
        raise ValueError(f"{path}: not an adapter of this project ({reason})") from None
    return adapter.requires_grad_(False).eval().to(device)
