"""DPA, the degradation-aware prompt adapter: learns from web photos what bad weather looks like, as a prompt.

A light encoder A takes a degraded photo to N tokens that a frozen Stable Diffusion reads in place of a text's.

symbol     code           shape, range
x_d        degraded       (B,3,H,W) in [0,1], a photo in bad weather; crops a and b of it
z_t        z_t            (B,C,h,w), crop a's latents, noised to timestep t in 0..T-1
eps        noise          (B,C,h,w), standard normal
abar_t     abar           (B,1,1,1), the model's own cumulative noise schedule
P          prompts        (B,N,d) = A(x_d), d = the U-Net's cross-attention width
q, k       query, key     (B,D), unit length: embeddings of crops b and a; k by the momentum encoder (MoCo)
tau        temperature

    loss = ||eps - eps_theta(z_t, t, P)||^2 + lambda * InfoNCE(q, k)

Two crops of one photo share their weather (positive); crops of other photos do not (negatives, from a queue). The
prompt that denoises crop a comes from crop b: what the two share is the weather and not the content, so content has
no way into the prompt (our choice; `cross_crop`).
"""
import copy
import json
import os
import time
from dataclasses import asdict, dataclass
from itertools import chain, islice, repeat
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from tqdm import tqdm


@dataclass
class AdapterConfig:
    """The adapter and its training. The paper's values are not known to us: every one is our choice."""
    tokens: int = 8             # N, tokens in a prompt
    steps: int = 400            # updates
    batch: int = 16             # crops an update
    lr: float = 1e-3            # AdamW's peak; 5 % of the updates warm up, then a cosine to a tenth
    contrast: float = 0.1       # lambda, the weight of InfoNCE; 0 leaves the diffusion loss alone
    temperature: float = 0.2    # tau (MoCo v2: 0.2)
    queue: int = 512            # negatives kept
    momentum: float = 0.99      # of the key encoder; MoCo's 0.999 is for longer trainings
    drop: float = 0.1           # share of prompts replaced by the null prompt, so that guidance is possible
    cross_crop: bool = True     # the prompt for crop a is computed from crop b; off: from a itself
    save_every: int = 50        # updates between checkpoints


class PromptAdapter(nn.Module):
    """A: a degraded photo to N prompt tokens. Convolutions, then the mean and deviation of their features at three
    scales: weather is the same all over a photo, content is not.

    width: d, the U-Net's cross-attention width. tokens: N.
    """

    def __init__(self, width, tokens=8, channels=32, embedding=128):
        super().__init__()
        self.config = {"width": width, "tokens": tokens, "channels": channels, "embedding": embedding}
        c = channels
        conv = lambda i, o, stride: nn.Sequential(nn.Conv2d(i, o, 3, stride, 1), nn.SiLU())
        self.scales = nn.ModuleList([nn.Sequential(conv(3, c, 1), conv(c, 2 * c, 2)),
                                     nn.Sequential(conv(2 * c, 2 * c, 1), conv(2 * c, 4 * c, 2)),
                                     nn.Sequential(conv(4 * c, 4 * c, 1), conv(4 * c, 8 * c, 2))])
        self.mix = nn.Sequential(nn.LayerNorm(28 * c), nn.Linear(28 * c, 16 * c), nn.SiLU())
        self.to_prompts = nn.Sequential(nn.Linear(16 * c, 16 * c), nn.SiLU(), nn.Linear(16 * c, tokens * width))
        self.project = nn.Sequential(nn.Linear(16 * c, 16 * c), nn.SiLU(), nn.Linear(16 * c, embedding))
        self.base = nn.Parameter(torch.zeros(1, tokens, width))     # training starts it at the null prompt
        nn.init.normal_(self.to_prompts[-1].weight, std=0.01)
        nn.init.zeros_(self.to_prompts[-1].bias)

    def forward(self, degraded, with_embedding=False):
        """degraded: (B,3,H,W) in [0,1], any size of at least 8 px. Returns the prompts (B,N,d), and on demand the
        embedding (B,D) of unit length that the contrastive loss compares."""
        x, pooled = degraded * 4 - 2, []
        for scale in self.scales:
            x = scale(x)                                            # (B,2c,H/2,W/2), (B,4c,H/4,W/4), (B,8c,H/8,W/8)
            flat = x.flatten(2).float()
            pooled += [flat.mean(2), (flat.var(2, correction=0) + 1e-5).sqrt()]
        features = self.mix(torch.cat(pooled, 1))                   # (B,16c)
        prompts = self.base + self.to_prompts(features).float().unflatten(1, self.base.shape[1:])
        return (prompts, F.normalize(self.project(features).float(), dim=1)) if with_embedding else prompts


def info_nce(query, key, queue, temperature, ignore=None):
    """InfoNCE (van den Oord et al. 2018) against a queue (MoCo; He et al. 2020):
    mean over B of -log( exp(q.k / tau) / (exp(q.k / tau) + sum_j exp(q.n_j / tau)) ).

    query, key: (B,D) of unit length; queue: (K,D), the negatives n_j; ignore: (B,K) bool, negatives that are none
    because they show the query's own photo. Returns a scalar. Raises ValueError where the shapes don't fit.
    """
    if query.shape != key.shape or queue.shape[1:] != query.shape[1:]:
        raise ValueError(f"query {tuple(query.shape)}, key {tuple(key.shape)} and queue {tuple(queue.shape)} don't fit")
    positive = (query * key).sum(1, keepdim=True)                   # (B,1)
    negative = query @ queue.T                                      # (B,K)
    if ignore is not None:
        negative = negative.masked_fill(ignore, -torch.inf)
    logits = torch.cat([positive, negative], 1) / temperature
    return F.cross_entropy(logits, torch.zeros(len(query), dtype=torch.long, device=query.device))


def diffusion_loss(sd, latents, prompts, t, noise):
    """||target - eps_theta(z_t, t, P)||^2, mean; target: eps (Ho et al. 2020) or v = sqrt(abar) eps - sqrt(1 - abar) z_0
    (Salimans and Ho 2022), as the model was trained. latents, noise: (B,C,h,w); prompts: (B,N,d); t: (B,) int64."""
    abar = sd.alphas_cumprod.to(latents.device)[t].view(-1, 1, 1, 1)
    z_t = abar.sqrt() * latents + (1 - abar).sqrt() * noise
    target = noise if sd.prediction_type == "epsilon" else abar.sqrt() * noise - (1 - abar).sqrt() * latents
    return F.mse_loss(sd.predict_noise(z_t, t, prompts), target)


class CropPairs:
    """Endless batches of two crops a, b of each photo: (latents of a, a, b, photo's number), without end.

    photos: list of (3,H,W) uint8, at least `size` px high and wide. The latents of every whole photo are computed
    once and kept; a crop of them is the latents of a crop, since the VAE is convolutional.
    """

    def __init__(self, photos, sd, size, batch, seed=0):
        self.photos, self.size, self.batch, self.seed, self.factor = photos, size, batch, seed, sd.factor
        self.latents = []
        for photo in tqdm(photos, "latents ", disable=None):
            height, width = (n // sd.factor * sd.factor for n in photo.shape[-2:])
            self.latents.append(sd.encode(photo[None, :, :height, :width].float() / 255)[0].half().cpu())

    def __len__(self):
        return len(self.photos)

    def __iter__(self):
        rng, f, side = np.random.default_rng(self.seed), self.factor, self.size // self.factor
        order = chain.from_iterable(rng.permutation(len(self.photos)) for _ in repeat(None))
        while True:
            chosen = list(islice(order, self.batch))
            corners = [[[int(rng.integers(0, n - side + 1)) for n in self.latents[i].shape[-2:]] for _ in "ab"] for i in chosen]
            crop = lambda i, y, x: self.photos[i][:, y * f:y * f + self.size, x * f:x * f + self.size]
            yield (torch.stack([self.latents[i][:, y:y + side, x:x + side] for i, ((y, x), _) in zip(chosen, corners)]).float(),
                   torch.stack([crop(i, *a) for i, (a, _) in zip(chosen, corners)]).float() / 255,
                   torch.stack([crop(i, *b) for i, (_, b) in zip(chosen, corners)]).float() / 255,
                   torch.tensor(chosen))


def train_adapter(adapter, sd, loader, config, *, seed=0, checkpoint=None):
    """Trains A in place; the Stable Diffusion is frozen.

    loader: batches (latents of crop a (B,C,h,w), crop a, crop b (B,3,H,W) in [0,1], photo number (B,)), as CropPairs
      gives them; it is gone through again and again until `config.steps` updates are done.
    checkpoint: a path; written every `config.save_every` updates and gone on from when it is there.
    Returns the mean losses of the last updates, {"diffusion", "contrastive"}. Raises ValueError for an empty loader.
    """
    if not len(loader):
        raise ValueError("the adapter's loader is empty")
    device = sd.device
    adapter.to(device, memory_format=torch.channels_last).train()
    null = sd.null_prompt(adapter.config["tokens"])                                         # (1,N,d)
    with torch.no_grad():
        adapter.base.copy_(null)
    key_encoder = copy.deepcopy(adapter).requires_grad_(False)                              # moves by momentum alone
    sd.unet.requires_grad_(False)                                                           # frozen
    generator = torch.Generator(device).manual_seed(seed)
    queue = F.normalize(torch.randn(config.queue, adapter.config["embedding"], generator=generator, device=device), dim=1)
    queue_photo = torch.full((config.queue,), -1, device=device)                            # whose crop a negative is
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=config.lr, weight_decay=0.01)
    scaler = torch.amp.GradScaler(device.type, enabled=sd.dtype is torch.float16)
    start, position = 0, 0
    if checkpoint and Path(checkpoint).exists():
        state = torch.load(checkpoint, map_location=device, weights_only=True)
        adapter.load_state_dict(state["adapter"])
        key_encoder.load_state_dict(state["key_encoder"])
        optimizer.load_state_dict(state["optimizer"])
        scaler.load_state_dict(state["scaler"])
        generator.set_state(state["generator"].cpu())
        queue, queue_photo, start, position = state["queue"], state["queue_photo"], state["step"], state["position"]
    parallel = dist.is_initialized()
    model = nn.parallel.DistributedDataParallel(adapter) if parallel else adapter
    batches = islice(chain.from_iterable(repeat(loader)), start, None)                      # the same ones as uninterrupted
    bar = tqdm(total=config.steps, initial=start, desc="adapter ", unit="step", disable=None)
    sums, counted, clock = torch.zeros(2, device=device), 0, time.time()

    for step, (latents, a, b, photo) in zip(range(start, config.steps), batches):
        latents, a, b, photo = (x.to(device, non_blocking=True) for x in (latents, a, b, photo))
        for group in optimizer.param_groups:
            group["lr"] = config.lr * learning_rate(step / config.steps)
        t = torch.randint(0, len(sd.alphas_cumprod), (len(a),), generator=generator, device=device)
        noise = torch.randn(latents.shape, generator=generator, device=device)
        dropped = torch.rand(len(a), 1, 1, generator=generator, device=device) < config.drop

        with torch.autocast(device.type, sd.dtype, enabled=sd.dtype is not torch.float32):
            prompts, query = model(b, with_embedding=True)
            if not config.cross_crop:
                prompts, _ = model(a, with_embedding=True)
            with torch.no_grad():
                _, key = key_encoder(a, with_embedding=True)
            contrastive = info_nce(query, key, queue, config.temperature, photo[:, None] == queue_photo)
            diffusion = diffusion_loss(sd, latents, torch.where(dropped, null, prompts), t, noise)
            loss = diffusion + config.contrast * contrastive

        optimizer.zero_grad(set_to_none=True)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(adapter.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()

        with torch.no_grad():
            for k, q in zip(key_encoder.parameters(), adapter.parameters()):
                k.lerp_(q, 1 - config.momentum)
            slots = torch.arange(position, position + len(key), device=device) % config.queue
            queue[slots], queue_photo[slots] = key, photo
            position = (position + len(key)) % config.queue
            sums += torch.stack([diffusion.detach(), contrastive.detach()])
        counted += 1
        bar.update()
        if (step + 1) % config.save_every == 0 or step + 1 == config.steps:
            losses = dict(zip(("diffusion", "contrastive"), (sums / counted).tolist()))     # the device is waited for here
            report(bar, step + 1, config.steps, losses, counted / (time.time() - clock))
            sums, counted, clock = torch.zeros_like(sums), 0, time.time()
            if checkpoint and not (parallel and dist.get_rank()):
                state = {"adapter": adapter.state_dict(), "key_encoder": key_encoder.state_dict(),
                         "optimizer": optimizer.state_dict(), "scaler": scaler.state_dict(), "queue": queue,
                         "queue_photo": queue_photo, "generator": generator.get_state(), "step": step + 1, "position": position}
                torch.save(state, f"{checkpoint}.tmp")
                os.replace(f"{checkpoint}.tmp", checkpoint)
    bar.close()
    adapter.eval()
    return losses if start < config.steps else {}


def learning_rate(done):
    """The share of the peak rate at a part `done` in [0,1] of the training: 5 % warm-up, a cosine to a tenth."""
    return min(1.0, done / 0.05 + 0.02) * (0.55 + 0.45 * float(np.cos(np.pi * done)))


def report(bar, step, steps, losses, speed):
    """The losses, behind the bar on a terminal; elsewhere on a plain line."""
    bar.set_postfix({name: f"{value:.4f}" for name, value in losses.items()})
    if bar.disable:
        print(f"adapter  {step:6d}/{steps}  " + "  ".join(f"{n} {v:.4f}" for n, v in losses.items()) + f"  {speed:.2f} step/s", flush=True)


def save_adapter(adapter, path):
    """Writes the adapter alone, as safetensors; its shape is in the metadata."""
    save_file({k: v.detach().cpu().contiguous() for k, v in adapter.state_dict().items()}, f"{path}.tmp",
              metadata={"adapter": json.dumps(adapter.config)})
    os.replace(f"{path}.tmp", path)


def load_adapter(path, device="cpu"):
    """The adapter in a file that `save_adapter` wrote, in eval mode. Raises ValueError for any other file."""
    try:
        with safe_open(path, "pt") as file:
            adapter = PromptAdapter(**json.loads(file.metadata()["adapter"]))
            adapter.load_state_dict({k: file.get_tensor(k) for k in file.keys()})
    except Exception as error:                             # safetensors raises its own, private kinds
        raise ValueError(f"{path}: not an adapter of this project ({error})") from None
    return adapter.requires_grad_(False).eval().to(device)
