"""PKD, pixel-wise knowledge distillation: the student learns to do what the teacher does.

symbol   code               shape, range
x        degraded           (B,3,h,w) in [0,1], random crops of the synthesized photos, mirrored
                            half of the time
T, S     teacher, student   (B,3,h,w) -> (B,3,h,w)

    loss = ||S(x) - T(x)||_1        and nothing else: there is no ground truth
"""
import io
import math
import os
import time
from dataclasses import dataclass
from itertools import chain, islice, repeat
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from tqdm import tqdm


@dataclass
class DistillConfig:
    """PKD, the distillation. All values are our choice; the paper's are not known to us."""
    steps: int = 1500           # updates; 4500 for all
    batch: int = 16             # crops an update, of each process
    crop: int = 0               # px; 0: two thirds of the image's side, at most 256
    lr: float = 2e-3            # AdamW's peak; 5 % of the updates warm up, then a cosine to 1 %
    keep_teacher: bool = True   # compute T(x) once, for whole images; off: for every crop anew
    save_every: int = 100       # updates between checkpoints, and between reports


class Crops:
    """Batches of random crops, without end: x (B,3,crop,crop) uint8, or (x, T(x)).

    images: list of (3,H,W) uint8. targets: T(x) for them, (3,H,W) in [0,1], if they are kept.
    """

    def __init__(self, images, crop, batch, targets=None, seed=0):
        self.images, self.crop, self.batch, self.seed = images, crop, batch, seed
        self.targets = targets

    def __len__(self):
        return len(self.images)

    def __iter__(self):
        rng = np.random.default_rng(self.seed)
        order = chain.from_iterable(rng.permutation(len(self.images)) for _ in repeat(None))
        while True:
            rows = []
            for i in islice(order, self.batch):
                y, x = (int(rng.integers(n - self.crop + 1)) for n in self.images[i].shape[-2:])
                mirrored = rng.random() < 0.5
                pair = [self.images[i]] + ([self.targets[i]] if self.targets else [])
                pair = [image[:, y:y + self.crop, x:x + self.crop] for image in pair]
                rows.append([image.flip(-1) for image in pair] if mirrored else pair)
            batch = [torch.stack(column) for column in zip(*rows)]
            yield batch if self.targets else batch[0]


@torch.no_grad()
def teacher_outputs(teacher, images, device, dtype=torch.float32, batch=8):
    """T(x) for a list of (3,H,W) uint8 images: a list of (3,H,W) float16 in [0,1] on the CPU."""
    outputs, i = [], 0
    bar = tqdm(total=len(images), desc="teacher ", unit="image", disable=None)
    while i < len(images):
        n = 1                                              # as many of one size as come in a row
        while n < min(batch, len(images) - i) and images[i + n].shape == images[i].shape:
            n += 1
        x = torch.stack(images[i:i + n]).to(device, memory_format=torch.channels_last) / 255
        with torch.autocast(x.device.type, dtype, enabled=dtype is not torch.float32):
            y = teacher(x)
        outputs += y.float().clamp(0, 1).half().cpu().unbind()
        bar.update(n)
        i += n
    bar.close()
    return outputs


def distill(teacher, student, loader, config, *, device="cpu", dtype=torch.float32,
            checkpoint=None):
    """Trains the student in place to give the teacher's outputs.

    teacher, student: (B,3,h,w) in [0,1] to the same. The teacher is frozen; None will do where the
      loader brings its outputs.
    loader: batches x (B,3,h,w), uint8 or floats in [0,1], or pairs (x, T(x)); gone through again
      and again until `config.steps` updates are done.
    dtype: of the autocast around the forward pass; the student's weights stay float32.
    checkpoint: a path; written every `config.save_every` updates, gone on from where it is there.
    Returns the mean L1 of the last updates; None if none was left.
    Raises ValueError for an empty loader.
    """
    if not len(loader):
        raise ValueError("the distillation's loader is empty")
    device, steps = torch.device(device), config.steps
    student.to(device, memory_format=torch.channels_last).train()
    if teacher is not None:
        teacher.to(device).requires_grad_(False).eval()             # frozen
    optimizer = torch.optim.AdamW(student.parameters(), lr=config.lr, betas=(0.9, 0.99),
                                  weight_decay=1e-4)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype is torch.float16)
    start, mean = 0, None
    if checkpoint and Path(checkpoint).exists():
        state = torch.load(checkpoint, map_location=device, weights_only=True)
        for name, part in dict(student=student, optimizer=optimizer, scaler=scaler).items():
            part.load_state_dict(state[name])
        start = state["step"]
    parallel = dist.is_initialized()
    follower = parallel and dist.get_rank() > 0                     # says and writes nothing
    model = nn.parallel.DistributedDataParallel(student) if parallel else student
    batches = islice(chain.from_iterable(repeat(loader)), start, None)   # as if uninterrupted
    bar = tqdm(total=steps, initial=start, desc="distill ", unit="step", disable=follower or None)
    total, counted, clock = torch.zeros((), device=device), 0, time.time()

    for step, batch in zip(range(start, steps), batches):
        x, *target = batch if isinstance(batch, (tuple, list)) else [batch]
        x = x.to(device, memory_format=torch.channels_last)
        x = x / 255 if x.dtype is torch.uint8 else x
        for group in optimizer.param_groups:
            group["lr"] = config.lr * learning_rate(step / steps)

        with torch.autocast(device.type, dtype, enabled=dtype is not torch.float32):
            with torch.no_grad():
                target = target[0].to(device) if target else teacher(x).clamp(0, 1)
            restored = model(x)
        loss = (restored.float() - target.float()).abs().mean()

        optimizer.zero_grad(set_to_none=True)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()

        total += loss.detach()
        counted += 1
        bar.update()
        if (step + 1) % config.save_every == 0 or step + 1 == steps:
            mean = float(total) / counted                           # the device is waited for here
            bar.set_postfix(L1=f"{mean:.4f}")
            if bar.disable and not follower:                        # no terminal: a plain line
                speed = counted / (time.time() - clock)
                print(f"distill  {step + 1:6d}/{steps}  L1 {mean:.4f}  {speed:.2f} step/s",
                      flush=True)
            total, counted, clock = torch.zeros_like(total), 0, time.time()
            if checkpoint and not follower:
                state = io.BytesIO()                                # a full disk is an OSError so
                torch.save(dict(student=student.state_dict(), optimizer=optimizer.state_dict(),
                                scaler=scaler.state_dict(), step=step + 1), state)
                Path(f"{checkpoint}.tmp").write_bytes(state.getbuffer())
                os.replace(f"{checkpoint}.tmp", checkpoint)
    bar.close()
    student.eval()
    return mean


def learning_rate(done):
    """The share of the peak at a part `done` in [0,1]: 5 % warm-up, then a cosine to 1 %."""
    return min(1.0, done / 0.05 + 0.02) * (0.505 + 0.495 * math.cos(math.pi * done))
