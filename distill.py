"""PKD, pixel-wise knowledge distillation: trains the student to reproduce the teacher's outputs.

    loss = mean |S(x) - T(x)|

symbol   in code            shape, range
x        x                  (B,3,h,w) in [0,1], random crops of the synthesized images
T, S     teacher, student   (B,3,h,w) -> (B,3,h,w); T is clamped to [0,1]

T(x) is computed once per image and cropped with it (keep_teacher off: computed for each crop).
There is no ground truth, and no other loss. L1 is our choice of pixel-wise loss. Our addition,
`select`, chooses the images before the training starts.
"""
import io
import math
import os
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm


@dataclass
class DistillConfig:
    """PKD settings. All values are our choice, for large photos; not tested on them."""
    steps: int = 60000          # updates
    batch: int = 16             # crops per update and process
    crop: int = 0               # px; 0: two thirds of the images' side, at most 256
    lr: float = 2e-3            # peak learning rate of AdamW; 5% warm-up, then cosine to 1%
    keep_teacher: bool = True   # compute T(x) once per image and store it; off: for every crop
    save_every: int = 100       # updates between reports, which also write a checkpoint
    select: float = 1.0         # addition: fraction of images used: those with the highest gain

    ADDITIONS = {"select": 1.0}                                 # the value that means "off"

    def __post_init__(self):
        if not 0 < self.select <= 1:
            raise ValueError(f"select must be in (0, 1], not {self.select}")

    def active_additions(self):
        """Names of the additions that are switched on."""
        return [name for name, off in self.ADDITIONS.items() if getattr(self, name) != off]

    def crop_size(self, side):
        """px, side of the crops from images of this side."""
        return self.crop or min(256, 2 * side // 3)


def distill(teacher, student, loader, config, *, device="cpu", dtype=torch.float32,
            checkpoint=None, log=print):
    """Trains the student in place on the teacher's outputs.

    teacher, student: modules, (B,3,h,w) in [0,1] to the same; the teacher is frozen, and may be
      None if the loader provides its outputs.
    loader: batches x (B,3,h,w), uint8 or float in [0,1], or (x, T(x)), repeated until
      `config.steps` updates are done; see `Crops`. To resume, its attribute `step` is set if it has
      one; otherwise, the batches already used are read again and skipped.
    device: where both are moved. dtype: of the autocast around both; the student's weights stay
      float32.
    checkpoint: path, written every `config.save_every` updates; training resumes from it.
    log: called with each report, {"stage", "step", "l1", "steps_per_s"}.
    Returns the last mean L1; None if training was already complete.
    Raises ValueError for an empty loader, or for a loss or weights that are not finite.
    """
    device = torch.device(device)
    student.to(device, memory_format=torch.channels_last).train()
    if teacher is not None:
        teacher.to(device).requires_grad_(False).eval()
    optimizer = torch.optim.AdamW(student.parameters(), lr=config.lr, betas=(0.9, 0.99),
                                  weight_decay=1e-4, fused=True)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype is torch.float16)
    start, l1 = 0, None
    parts = dict(student=student, optimizer=optimizer, scaler=scaler)
    if checkpoint and Path(checkpoint).exists():
        state = load_state(checkpoint, device)
        for name, part in parts.items():
            part.load_state_dict(state[name])
        start = state["step"]
    distributed = dist.is_initialized()
    is_main = not distributed or dist.get_rank() == 0
    model = nn.parallel.DistributedDataParallel(student) if distributed else student
    bar = tqdm(range(start, config.steps), "distill", config.steps, initial=start, unit="step",
               disable=None if is_main else True)
    total, count, clock = torch.zeros((), device=device), 0, time.time()

    for step, batch in zip(bar, batches_from(loader, start)):
        # Batch.
        x, *targets = batch if isinstance(batch, (tuple, list)) else [batch]
        x = to_device(x, device).contiguous(memory_format=torch.channels_last)

        # Forward and loss.
        with torch.autocast(device.type, dtype, enabled=dtype is not torch.float32):
            if not targets:
                with torch.no_grad():
                    y = teacher(x)
                targets = [torch.where(y.isfinite(), y.clamp(0, 1), torch.nan)]  # NaN: raises below
            restored = model(x)
        loss = F.l1_loss(restored.float(), to_device(targets[0], device).float())

        # Backward and update.
        for group in optimizer.param_groups:
            group["lr"] = config.lr * learning_rate(step / config.steps)
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()

        # Report.
        total += loss.detach()
        count += 1
        if (step + 1) % config.save_every and step + 1 < config.steps:
            continue
        l1 = float(total) / count                               # GPU sync point
        if not (math.isfinite(l1) and all(p.isfinite().all() for p in student.parameters())):
            raise ValueError(f"distill: loss or weights are not finite at step {step + 1}: {l1}. "
                             f"Lower the learning rate ({config.lr:g}), use fp32, or check the "
                             "teacher's outputs")
        bar.set_postfix(l1=f"{l1:.4f}")
        if is_main:
            log(dict(stage="distill", step=step + 1, l1=l1,
                     steps_per_s=round(count / (time.time() - clock), 2)))
        total, count, clock = torch.zeros_like(total), 0, time.time()

        # Checkpoint.
        if checkpoint and is_main:
            state = {name: part.state_dict() for name, part in parts.items()} | {"step": step + 1}
            save_state(state, checkpoint)
    student.eval()
    return l1


def learning_rate(progress):
    """Fraction of the peak at progress in [0,1]: 5% linear warm-up, then cosine to 1%."""
    return min(1.0, progress / 0.05 + 0.02) * (0.505 + 0.495 * math.cos(math.pi * progress))


# ---------------------------------------------------------------- Additions (ours)
# PSNR of the demo's student with, minus without (README.md): selection +0.9 dB in rain, +0.8 dB in
# snow, -0.4 dB in haze, where the demo does not use it.

def teacher_gains(images, outputs, clean):
    """PSNR(T(x), x_c) - PSNR(x, x_c) in dB of each synthesized image x: how well the teacher
    restores the clean photo x_c that it was made from.

    images: x, (3,H,W) uint8. outputs: T(x), (3,H,W) in [0,1]. clean: x_c, (3,H,W) in [0,1]; three
    iterables. Returns a list of floats. No extra data is needed. The gain is high if
    x shows weather that the teacher was trained on, and low if x is clear or otherwise distorted.
    """
    mse = lambda a, b: max(1e-10, float((a.float() - b.float()).square().mean()))
    return [10 * math.log10(mse(x / 255, x_c) / mse(y, x_c))
            for x, y, x_c in zip(images, outputs, clean)]


def select_best(gains, share):
    """Addition `select`: indices of the images with the highest gains, in ascending order.
    share: in (0,1], of all images; at least one is chosen."""
    count = max(1, round(share * len(gains)))
    return sorted(np.argsort(gains, kind="stable")[-count:].tolist())


# ---------------------------------------------------------------- batches and files

class Crops:
    """Endless batches of random crops, mirrored half of the time: x (B,3,crop,crop) uint8, or
    (x, T(x)). Each batch is a deterministic function of seed and step.

    images: (3,H,W) uint8, a list or a tensor (N,3,H,W). targets: T(x) for each of them, (3,H,W) in
      [0,1], or None.
    Raises ValueError if an image is smaller than the crop.
    """

    def __init__(self, images, crop, batch, targets=None, seed=0):
        self.images, self.crop, self.batch, self.seed = images, crop, batch, seed
        self.targets, self.step = targets, 0
        smallest = min((min(image.shape[1:]) for image in images), default=0)
        if not 0 < crop <= smallest:
            raise ValueError(f"a crop of {crop} px does not fit into the smallest of {len(images)} "
                             f"training images, {smallest} px")

    def __iter__(self):
        while True:
            yield self.batch_at(self.step)                          # set `step` to resume there
            self.step += 1

    def batch_at(self, step):
        rng, n, rows = np.random.default_rng([self.seed, step]), len(self.images), []
        sources = [self.images] if self.targets is None else [self.images, self.targets]
        for i in shuffled_epochs(n, step * self.batch, self.batch, self.seed):
            y, x = (int(rng.integers(side - self.crop + 1)) for side in self.images[i].shape[-2:])
            crops = [source[i][:, y:y + self.crop, x:x + self.crop] for source in sources]
            rows.append([crop.flip(-1) for crop in crops] if rng.random() < 0.5 else crops)
        batch = [torch.stack(column) for column in zip(*rows)]          # (B,3,crop,crop) each
        return batch if len(batch) > 1 else batch[0]


@torch.no_grad()
def teacher_outputs(teacher, images, device, dtype=torch.float32, names=None):
    """Yields T(x), (3,H,W) float16 in [0,1] on the CPU, for each image (3,H,W) uint8. Raises
    ValueError, with the image's entry in `names`, for an output that is not finite."""
    teacher.to(device).eval()
    for name, image in zip(names or range(len(images)), tqdm(images, "teacher", disable=None)):
        x = to_device(image[None], torch.device(device))
        with torch.autocast(x.device.type, dtype, enabled=dtype is not torch.float32):
            y = teacher(x.contiguous(memory_format=torch.channels_last))
        if not y.isfinite().all():
            raise ValueError(f"the teacher's output for image {name} is not finite in {dtype}")
        yield y[0].float().clamp(0, 1).half().cpu()


def on_disk(images, folder):
    """Writes images (3,H,W) of one size to an unnamed file in `folder` and returns them as one
    memory-mapped tensor (N,3,H,W), so that memory does not limit their number. The file disappears
    with the tensor. Raises ValueError if there are no images or their sizes differ, and OSError if
    the disk is full."""
    shapes = []
    with tempfile.TemporaryFile(dir=folder) as file:
        for image in images:
            file.write(image.numpy().tobytes())
            shapes.append(tuple(image.shape))
        if len(set(shapes)) != 1:
            raise ValueError(f"the images must all have one size, not {sorted(set(shapes))}")
        return torch.from_numpy(np.memmap(file, image.numpy().dtype, "r+",
                                          shape=(len(shapes), *shapes[0])))


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
