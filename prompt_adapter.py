"""DPA, the degradation-aware prompt adapter: learns what bad weather looks like, as a prompt.

A light encoder A takes a degraded photo to N tokens that a frozen Stable Diffusion reads in place
of a text's.

symbol   code          shape, range
x_d      degraded      (B,3,H,W) in [0,1], a photo in bad weather; crops a and b of it
z_t      z_t           (B,C,h,w), crop a's latents, noised to timestep t in 0..T-1
eps      noise         (B,C,h,w), standard normal
abar_t   abar          (B,1,1,1), the model's own cumulative noise schedule
P        prompts       (B,N,d) = A(x_d), d = the U-Net's cross-attention width
q, k     query, key    (B,D), unit length: embeddings of the two crops; k by the momentum encoder
tau      temperature

    loss = ||eps - eps_theta(z_t, t, P)||^2 + lambda * InfoNCE(q, k)        t in 0..t_max T - 1

The squares are divided by their target's variance: 1 for eps, not so where a model predicts v.

Two crops of one photo share their weather (positive); crops of other photos do not (negatives, from
a queue). The prompt that denoises crop a comes from crop b, as far from a as the photo allows and in
another tone: what the two share is the weather, and little of the content and of the light (our
choice; `cross_crop`, `jitter`).
"""
import copy
import io
import json
import math
import os
import time
from dataclasses import dataclass
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
    """DPA, the adapter's training. All values are our choice; the paper's are not known to us."""
    tokens: int = 0             # N, tokens in a prompt; 0: as many as the text model's
    steps: int = 120            # updates
    batch: int = 16             # crops an update, of each process
    lr: float = 1e-4            # AdamW's peak; 5 % of the updates warm up, then a cosine to 10 %
    t_max: float = 0.4          # noise levels up to this part of T: where weather is decided
    contrast: float = 0.1       # lambda, the weight of InfoNCE; 0: the diffusion loss alone
    temperature: float = 0.2    # tau (MoCo v2: 0.2)
    queue: int = 512            # negatives kept
    momentum: float = 0.99      # of the key encoder; MoCo's 0.999 is for longer trainings
    drop: float = 0.0           # share of prompts replaced by the null one; a frozen U-Net knows it
    jitter: float = 0.4         # how far the tone of what A sees in training is changed; 0: not
    cross_crop: bool = True     # the prompt for crop a comes from crop b; off: from a itself
    save_every: int = 50        # updates between checkpoints, and between reports

    def __post_init__(self):
        if self.batch < 2:
            raise ValueError("the adapter's batch must hold at least 2: prompts are relative to "
                             "the batch's mean")
        if self.queue < self.batch:
            raise ValueError(f"the queue must hold a batch: {self.queue} against {self.batch}")
        if not 0 < self.t_max <= 1:
            raise ValueError(f"t_max must lie in (0, 1], not {self.t_max}")
        if self.temperature <= 0:
            raise ValueError(f"the temperature must be above 0, not {self.temperature}")


class PromptAdapter(nn.Module):
    """A: a degraded photo to N prompt tokens. Convolutions, then the mean and deviation of their
    features at three scales: weather is the same all over a photo, content is not.

        P = B + W (f(x_d) - mean f) / deviation f

    A caption's prompt B says how much weather there is, the photo how its own differs from the
    other photos'. Without the mean taken off, the diffusion loss draws all prompts to the web
    photos' own amount of weather, which is less than a teacher has seen (our choice).

    width: d, the U-Net's cross-attention width. tokens: N. base: B (1,N,d), which stays as it is;
    zeros if None. Raises ValueError for a base of another shape.
    """

    def __init__(self, width, tokens, channels=32, embedding=128, base=None):
        super().__init__()
        base = torch.zeros(1, tokens, width) if base is None else base.detach().clone()
        if base.shape != (1, tokens, width):
            raise ValueError(f"the base must be {(1, tokens, width)}, not {tuple(base.shape)}")
        self.config = dict(width=width, tokens=tokens, channels=channels, embedding=embedding)
        c, hidden = channels, 16 * channels

        def scale(inner, outer):                                    # halves height and width
            return nn.Sequential(nn.Conv2d(inner, max(inner, c), 3, 1, 1), nn.SiLU(),
                                 nn.Conv2d(max(inner, c), outer, 3, 2, 1), nn.SiLU())

        self.scales = nn.ModuleList([scale(3, 2 * c), scale(2 * c, 4 * c), scale(4 * c, 8 * c)])
        self.mix = nn.Sequential(nn.LayerNorm(28 * c), nn.Linear(28 * c, hidden), nn.SiLU())
        self.to_prompts = nn.Sequential(nn.Linear(hidden, hidden), nn.SiLU(),
                                        nn.BatchNorm1d(hidden, affine=False),
                                        nn.Linear(hidden, tokens * width, bias=False))
        self.project = nn.Sequential(nn.Linear(hidden, hidden), nn.SiLU(),
                                     nn.Linear(hidden, embedding))
        self.register_buffer("base", base)
        nn.init.zeros_(self.to_prompts[-1].weight)                  # starts at the caption

    def forward(self, degraded, with_embedding=False):
        """degraded: (B,3,H,W) in [0,1], any size from 8 px. Returns the prompts (B,N,d), and on
        demand the embedding (B,D) of unit length that the contrastive loss compares."""
        x, pooled = degraded * 4 - 2, []                            # about unit variance
        for scale in self.scales:
            x = scale(x)                                            # (B,c',H/2,W/2), /4, /8
            flat = x.flatten(2).float()
            pooled += [flat.mean(2), (flat.var(2, correction=0) + 1e-5).sqrt()]
        features = self.mix(torch.cat(pooled, 1))                   # (B,16c)
        shape = len(x), *self.base.shape[1:]
        prompts = self.base + self.to_prompts(features).float().view(shape)
        if with_embedding:
            return prompts, F.normalize(self.project(features).float(), dim=1)
        return prompts


def info_nce(query, key, queue, temperature, ignore=None):
    """InfoNCE (van den Oord et al. 2018) against a queue (MoCo; He et al. 2020), the mean over B of
    -log( exp(q.k / tau) / (exp(q.k / tau) + sum_j exp(q.n_j / tau)) ).

    query, key: (B,D) of unit length. queue: (K,D), the negatives n_j. ignore: (B,K) bool, those
    that are none, since they show the query's own photo. Returns a scalar.
    Raises ValueError where the shapes don't fit.
    """
    if query.shape != key.shape or queue.shape[1:] != query.shape[1:]:
        shapes = tuple(tuple(x.shape) for x in (query, key, queue))
        raise ValueError(f"query, key and queue don't fit: {shapes}")
    positive = (query * key).sum(1, keepdim=True)                   # (B,1)
    negative = query @ queue.T                                      # (B,K)
    if ignore is not None:
        negative = negative.masked_fill(ignore, -torch.inf)
    logits = torch.cat([positive, negative], 1) / temperature       # (B,1+K), the first is right
    return F.cross_entropy(logits, torch.zeros(len(logits), dtype=torch.long, device=logits.device))


def diffusion_loss(sd, latents, prompts, t, noise):
    """||target - eps_theta(z_t, t, P)||^2 / variance of the target, mean. The target is what the
    model was trained for: eps (Ho et al. 2020), whose variance is 1, or v = sqrt(abar) eps -
    sqrt(1 - abar) z_0 (Salimans and Ho 2022), whose variance depends on t unless z_0's is 1.

    latents (z_0), noise: (B,C,h,w). prompts: (B,N,d). t: (B,) int64. Returns a scalar.
    """
    abar = sd.alphas_cumprod.to(latents.device)[t].view(-1, 1, 1, 1)
    z_t = abar.sqrt() * latents + (1 - abar).sqrt() * noise
    if sd.prediction_type == "epsilon":
        target, variance = noise, 1
    else:
        target = abar.sqrt() * noise - (1 - abar).sqrt() * latents
        variance = abar + (1 - abar) * latents.var()
    return ((sd.predict_noise(z_t, t, prompts) - target) ** 2 / variance).mean()


def jitter(images, amount, generator):
    """Random contrast and tint of each of (B,3,H,W) in [0,1], on the generator's device: the tone
    is the other thing that two crops share, and the easier to learn."""
    draw = lambda n: amount * (2 * torch.rand(len(images), n, 1, 1, generator=generator,
                                              device=images.device) - 1)
    return ((images - 0.5) * (1 + draw(1)) + 0.5 + draw(3) / 2).clamp(0, 1) if amount else images


class CropPairs:
    """Batches of two crops a, b of each of B photos, without end:
    (latents of a (B,C,h,w), a and b (B,3,size,size) uint8, the photos' numbers (B,)).

    photos: list of (3,H,W) uint8, at least `size` px high and wide. The latents of whole photos are
    computed once and kept: a crop of them is close to the latents of the crop, and encoding each
    crop would make a step 1.67 times as long. b is the farthest from a of eight crops.
    """

    def __init__(self, photos, sd, size, batch, seed=0):
        self.photos, self.size, self.batch, self.seed = photos, size, batch, seed
        self.factor, self.latents = sd.factor, []
        for photo in tqdm(photos, "latents ", disable=None):
            height, width = (n // sd.factor * sd.factor for n in photo.shape[-2:])
            z = sd.encode(photo[None, :, :height, :width].float() / 255)
            self.latents.append(z[0].half().cpu())

    def __len__(self):
        return len(self.photos)

    def crop(self, i, y, x):
        """Photo i from latent (y, x) on: its latents, and the photo."""
        f, size = self.factor, self.size
        return (self.latents[i][:, y:y + size // f, x:x + size // f],
                self.photos[i][:, y * f:y * f + size, x * f:x * f + size])

    def __iter__(self):
        rng = np.random.default_rng(self.seed)
        order = chain.from_iterable(rng.permutation(len(self.photos)) for _ in repeat(None))
        while True:
            rows = []
            for i in islice(order, self.batch):
                room = [n - self.size // self.factor + 1 for n in self.latents[i].shape[-2:]]
                first, *others = rng.integers(room, size=(9, 2))
                far = max(others, key=lambda corner: abs(corner - first).max())
                (z, a), (_, b) = self.crop(i, *first), self.crop(i, *far)
                rows.append((z, a, b, torch.tensor(i)))
            yield tuple(torch.stack(column) for column in zip(*rows))


def train_adapter(adapter, sd, loader, config, *, seed=0, checkpoint=None):
    """Trains A in place; the Stable Diffusion is frozen.

    sd: a models.StableDiffusion, or what has its predict_noise, null_prompt, unet, alphas_cumprod,
      prediction_type, device and dtype (CropPairs: encode and factor).
    loader: batches as CropPairs gives them, of at least 2, crops as uint8 or as floats in [0,1];
      gone through again and again until `config.steps` updates are done.
    checkpoint: a path; written every `config.save_every` updates, gone on from where it is there.
    Returns the mean losses of the last updates, {"diffusion", "contrastive"}; {} if none was left.
    Of several processes each has its own batches, queue and means; they share the gradients.
    Raises ValueError for an empty loader.
    """
    if not len(loader):
        raise ValueError("the adapter's loader is empty")
    device, steps = sd.device, config.steps
    sd.unet.requires_grad_(False)                                   # frozen
    adapter.to(device, memory_format=torch.channels_last).train()
    null = sd.null_prompt(adapter.config["tokens"])                 # (1,N,d)
    key_encoder = copy.deepcopy(adapter).requires_grad_(False)      # moves by momentum alone
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=config.lr, weight_decay=0.01)
    scaler = torch.amp.GradScaler(device.type, enabled=sd.dtype is torch.float16)
    generator = torch.Generator(device).manual_seed(seed)
    shape = config.queue, adapter.config["embedding"]
    queue = F.normalize(torch.randn(shape, generator=generator, device=device), dim=1)      # (K,D)
    queue_photo = torch.full((config.queue,), -1, device=device)    # whose crop a negative is
    levels = max(1, round(config.t_max * len(sd.alphas_cumprod)))
    start, losses = 0, {}
    if checkpoint and Path(checkpoint).exists():
        state = torch.load(checkpoint, map_location=device, weights_only=True)
        for name, part in dict(adapter=adapter, key_encoder=key_encoder, optimizer=optimizer,
                               scaler=scaler).items():
            part.load_state_dict(state[name])
        queue, queue_photo, start = state["queue"], state["queue_photo"], state["step"]
    parallel = dist.is_initialized()
    follower = parallel and dist.get_rank() > 0                     # says and writes nothing
    model = nn.parallel.DistributedDataParallel(adapter) if parallel else adapter
    batches = islice(chain.from_iterable(repeat(loader)), start, None)   # as if uninterrupted
    bar = tqdm(total=steps, initial=start, desc="adapter ", unit="step",
               disable=follower or None)
    sums, counted, clock = torch.zeros(2, device=device), 0, time.time()

    for step, batch in zip(range(start, steps), batches):
        latents, a, b, photo = (x.to(device) for x in batch)
        latents = latents.float()
        a, b = (x / 255 if x.dtype is torch.uint8 else x for x in (a, b))
        generator.manual_seed(seed * 1_000_003 + step)       # so a resumed run draws the same
        source, other = (b, a) if config.cross_crop else (a, b)
        source, other = (jitter(x, config.jitter, generator) for x in (source, other))
        for group in optimizer.param_groups:
            group["lr"] = config.lr * learning_rate(step / steps)
        t = torch.randint(levels, (len(a),), generator=generator, device=device)
        noise = torch.randn(latents.shape, generator=generator, device=device)
        dropped = torch.rand(len(a), 1, 1, generator=generator, device=device) < config.drop

        with torch.autocast(device.type, sd.dtype, enabled=sd.dtype is not torch.float32):
            prompts, query = model(source, with_embedding=True)
            with torch.no_grad():
                _, key = key_encoder(other, with_embedding=True)
        own = photo[:, None] == queue_photo                         # (B,K)
        contrastive = info_nce(query, key, queue, config.temperature, own)
        prompts = torch.where(dropped, null, prompts)
        diffusion = diffusion_loss(sd, latents, prompts, t, noise)
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
            queue = torch.cat([key, queue])[:config.queue]          # the newest first
            queue_photo = torch.cat([photo, queue_photo])[:config.queue]
            sums += torch.stack([diffusion.detach(), contrastive.detach()])
        counted += 1
        bar.update()
        if (step + 1) % config.save_every == 0 or step + 1 == steps:
            means = (sums / counted).tolist()                       # the device is waited for here
            losses = dict(zip(("diffusion", "contrastive"), means))
            bar.set_postfix(losses)
            if bar.disable and not follower:                        # no terminal: a plain line
                speed = counted / (time.time() - clock)
                print(f"adapter  {step + 1:6d}/{steps}  diffusion {means[0]:.4f}  "
                      f"contrastive {means[1]:.4f}  {speed:.2f} step/s", flush=True)
            sums, counted, clock = torch.zeros_like(sums), 0, time.time()
            if checkpoint and not follower:
                state = io.BytesIO()                                # a full disk is an OSError so
                torch.save(dict(adapter=adapter.state_dict(), key_encoder=key_encoder.state_dict(),
                                optimizer=optimizer.state_dict(), scaler=scaler.state_dict(),
                                queue=queue, queue_photo=queue_photo, step=step + 1), state)
                Path(f"{checkpoint}.tmp").write_bytes(state.getbuffer())
                os.replace(f"{checkpoint}.tmp", checkpoint)
    bar.close()
    adapter.eval()
    return losses


def learning_rate(done):
    """The share of the peak at a part `done` in [0,1]: 5 % warm-up, then a cosine to 10 %."""
    return min(1.0, done / 0.05 + 0.02) * (0.55 + 0.45 * math.cos(math.pi * done))


def save_adapter(adapter, path):
    """Writes the adapter alone, as safetensors; its shape is in the metadata."""
    state = {k: v.detach().cpu().contiguous() for k, v in adapter.state_dict().items()}
    save_file(state, f"{path}.tmp", metadata={"adapter": json.dumps(adapter.config)})
    os.replace(f"{path}.tmp", path)


def load_adapter(path, device="cpu"):
    """The adapter that `save_adapter` wrote, in eval mode. Raises ValueError for other files."""
    try:
        with safe_open(path, "pt") as file:
            state = {k: file.get_tensor(k) for k in file.keys()}
            config = json.loads((file.metadata() or {})["adapter"])
            adapter = PromptAdapter(**config)
            adapter.load_state_dict(state)
    except Exception as error:                             # safetensors raises private kinds
        said = str(error).partition("\n")[0]
        raise ValueError(f"{path}: not an adapter of this project ({said})") from None
    return adapter.requires_grad_(False).eval().to(device)
