"""Trains the demo's weights: the mini-SD (VAE, U-Net and text encoder) and the teacher.

    python -m demo.pretrain                      # everything, in hours (demo/README.md); resumes
    python -m demo.pretrain --stage teacher      # one of them
    python -m demo.pretrain --unet-steps 60000   # any field of `Pretraining` is an option

The work folder (--work) holds the rendered photos, a checkpoint and a figure of each stage, and
`log.jsonl` (stage, step, loss, steps per second; one line every `save_every` steps) with its curves
in `losses.png`. Finished weights go to --weights.
"""
import argparse
import copy
import json
import math
import os
import shutil
import time
from dataclasses import asdict, dataclass
from functools import partial
from multiprocessing import Pool
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import (AutoencoderKL, DDIMScheduler, StableDiffusionImg2ImgPipeline,
                       StableDiffusionPipeline, UNet2DConditionModel)
from diffusers.models.attention_processor import AttnProcessor
from tqdm import tqdm
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from demo import WEIGHTS
from demo.photos import Photo, ignore_signals, render_photo
from demo.weather import AMOUNTS, CLEAR, KINDS, to_pil
from evaluate import plot_losses
from models import Restorer, has_bf16, save_restorer

STAGES = ("vae", "unet", "teacher")


@dataclass
class Pretraining:
    """Training settings. All are our choice, for a few hours on two CPU cores."""
    photos: int = 20000             # training photos of the mini-SD; a quarter in clear weather
    size: int = 128                 # px, side of the training photos
    vae_steps: int = 2500
    vae_batch: int = 8
    vae_crop: int = 64              # px
    vae_lr: float = 2e-3
    kl: float = 1e-6                # weight of the KL term, a mean over latents
    unet_steps: int = 16000
    unet_batch: int = 32
    unet_crop: int = 64             # px; the U-Net takes any size and is used at 96 px
    unet_lr: float = 4e-4
    latent_scale: float = 1.5       # scaling factor of the latents; larger: survives more noise
    ema: float = 0.999              # decay of the moving average of the weights
    t_shift: float = -0.1           # mean of the logit-normal over t; below 0: less noise
    drop_caption: float = 0.1       # probability of the empty caption, the null prompt
    teacher_photos: int = 12000     # training photos of the teacher, original domain
    teacher_steps: int = 18000
    teacher_batch: int = 16
    teacher_crop: int = 64          # px
    teacher_lr: float = 2e-3
    save_every: int = 250           # steps between checkpoints
    seed: int = 0


def pretrain(config, work, weights, device, stages=STAGES):
    """Trains the given stages and writes their weights.

    Each stage resumes from its checkpoint in the work folder. The U-Net needs the VAE: its stage
    also trains the VAE if that is unfinished.
    """
    work.mkdir(parents=True, exist_ok=True)
    weights.mkdir(parents=True, exist_ok=True)
    device = torch.device(device)
    autocast = partial(torch.autocast, device.type, torch.bfloat16, enabled=has_bf16(device))
    if "vae" in stages or "unet" in stages:
        vae, seconds = train_vae(config, work, device, autocast)
        print(f"VAE: {seconds / 60:.0f} minutes")
    if "teacher" in stages:
        teacher, seconds = train_teacher(config, work, device, autocast)
        save_restorer(teacher, weights / "teacher.safetensors")
        print(f"teacher: {seconds / 60:.0f} minutes")
    if "unet" in stages:
        seconds = train_unet(config, vae, work, device, autocast)
        shutil.copytree(work / "mini-sd", weights / "mini-sd", dirs_exist_ok=True)
        print(f"U-Net: {seconds / 60:.0f} minutes")


# ---------------------------------------------------------------- VAE

def haar_latents(x):
    """The latents that the VAE is trained to produce: (B,3,H,W) in [-1,1] to (B,6,H/2,W/2), linear.

    For each 2x2 px: the mean and the horizontal, vertical and diagonal differences of luma (Haar),
    and the means of two chroma channels, doubled. A VAE without this target gives all channels
    about the same variance, so that noise hides coarse and fine detail at the same level. Here, as
    in the spectrum of photos, coarse detail survives more noise than fine detail, and shifting a
    flake by an even number of px shifts its latents. The U-Net's training computes them with one
    convolution.
    """
    haar = torch.tensor([[1, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]])
    haar = haar.view(4, 1, 2, 2) / 2
    luma = torch.ones(1, 3, 1, 1) / 3 ** 0.5
    norm = torch.tensor([2, 6]).view(2, 1, 1, 1) ** 0.5
    chroma = torch.tensor([[1, 0, -1], [1, -2, 1]]).view(2, 3, 1, 1) / norm
    kernels = torch.cat([haar * luma, 2 * haar[:1] * chroma])           # (6,3,2,2)
    return F.conv2d(x, kernels.to(x), stride=2)


def new_vae():
    """An untrained VAE: f = 2, 6 latent channels."""
    # Two groups per norm: in short trials, training started faster than with eight.
    vae = AutoencoderKL(down_block_types=("DownEncoderBlock2D",) * 2,
                        up_block_types=("UpDecoderBlock2D",) * 2,
                        block_out_channels=(24, 48), layers_per_block=1, latent_channels=6,
                        norm_num_groups=2, mid_block_add_attention=False, sample_size=96)
    with torch.no_grad():
        vae.quant_conv.bias[6:] = -6                    # start with little noise in the latents
        vae.quant_conv.weight[6:] *= 0.1
    return vae


def train_vae(config, work, device, autocast):
    """Trains the VAE. Returns it, in evaluation mode, and the training time in seconds.

    loss = L1 + L2 of pixels + 0.3 L1 of pixel differences (keeps thin streaks)
           + L2 between the posterior mean and `haar_latents` + kl * KL
    """
    photos, _ = render_mixture(config, work)
    torch.manual_seed(config.seed)
    trainer = Trainer("vae", {"vae": new_vae()}, config.vae_lr, config.vae_steps, work, config,
                      device)
    vae = trainer.modules["vae"]
    rng = np.random.default_rng([config.seed, trainer.start])
    source = batches(photos, config.vae_batch, config.vae_crop, rng)
    for step in range(trainer.start, trainer.steps):
        x = to_tensor(next(source), device) * 2 - 1
        x = x.contiguous(memory_format=torch.channels_last)

        # Forward.
        with autocast():
            posterior = vae.encode(x).latent_dist
            y = vae.decode(posterior.sample()).sample
        mean, logvar = posterior.mean.float(), posterior.logvar.float()

        # Losses.
        error = y.float() - x
        loss = error.abs().mean() + error.square().mean()
        loss = loss + 0.3 * (error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean())
        loss = loss + (mean - haar_latents(x)).square().mean()
        loss = loss + config.kl * 0.5 * (mean ** 2 + logvar.exp() - 1 - logvar).mean()

        if trainer.update(step, loss):
            grid([(x[:8] + 1) / 2, (y[:8] + 1) / 2], work / "vae.png")
    return trainer.averaged()["vae"], trainer.seconds


# ---------------------------------------------------------------- U-Net and text encoder

def new_unet():
    """An untrained U-Net that is conditioned on its prompt twice.

    Once through cross-attention, as in Stable Diffusion, and once pooled and added to the timestep
    embedding, as in DeepFloyd IF. With cross-attention alone, at a quarter of the latents'
    resolution, it hardly learned to use the prompt in such a short training run.
    """
    return UNet2DConditionModel(
        sample_size=48, in_channels=6, out_channels=6, block_out_channels=(48, 96, 128, 128),
        down_block_types=("DownBlock2D",) * 2 + ("CrossAttnDownBlock2D",) * 2,
        up_block_types=("CrossAttnUpBlock2D",) * 2 + ("UpBlock2D",) * 2,
        layers_per_block=1, cross_attention_dim=128, attention_head_dim=4, norm_num_groups=16,
        addition_embed_type="text", addition_embed_type_num_heads=8)


def new_scheduler():
    """Stable Diffusion's noise schedule, with v-prediction."""
    return DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear",
                         prediction_type="v_prediction", clip_sample=False, set_alpha_to_one=False,
                         steps_offset=1, timestep_spacing="leading")


def new_text(folder):
    """A tokenizer for the captions and an untrained CLIP text encoder, (B,N) tokens to (B,N,128).

    Each word of the captions is one token; other text is split into letters. Writes `vocab.json`
    and `merges.txt` into the folder.
    """
    phrases = [f"a photo in {amount} {kind}" for amount in AMOUNTS for kind in KINDS]
    phrases += ["clear weather dark grey bright air small medium large short long streaks flakes",
                "faint falling straight blown to the left right with mist of"]
    words = sorted(set(" ".join(phrases).split()))
    letters = [chr(i) for i in range(33, 127)]
    vocabulary = letters + [letter + "</w>" for letter in letters]
    merges = []
    for word in words:
        pieces = [*word[:-1], word[-1] + "</w>"]
        while len(pieces) > 1:              # merge from the left: s n o w, sn o w, sno w, snow
            first, second, *rest = pieces
            if (first, second) not in merges:
                merges.append((first, second))
            if first + second not in vocabulary:
                vocabulary.append(first + second)
            pieces = [first + second, *rest]
    vocabulary += ["<|startoftext|>", "<|endoftext|>"]
    start, end = len(vocabulary) - 2, len(vocabulary) - 1
    folder.mkdir(parents=True, exist_ok=True)
    indices = {token: i for i, token in enumerate(vocabulary)}
    (folder / "vocab.json").write_text(json.dumps(indices))
    lines = ["#version: 0.2"] + [" ".join(pair) for pair in merges]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n")
    tokenizer = CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"),
                              model_max_length=32)
    text = CLIPTextModel(CLIPTextConfig(
        vocab_size=len(vocabulary), hidden_size=128, intermediate_size=256, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=32, bos_token_id=start, eos_token_id=end,
        pad_token_id=end))
    # Unit length: with CLIP's initialization (0.2), embeddings of rare words hardly changed.
    vectors = text.get_input_embeddings().weight
    vectors.data /= vectors.std() * vectors.shape[1] ** 0.5
    return tokenizer, text


def random_caption(phrases, rng, drop):
    """A caption made of some of a photo's phrases; empty with probability `drop`."""
    if rng.random() < drop:
        return ""
    first = phrases[0]
    if rng.random() <= 0.1:
        first = " ".join(word for word in first.split() if word not in AMOUNTS)
    return ", ".join([first] + [phrase for phrase in phrases[1:] if rng.random() > 0.3])


def mirrored_caption(text):
    """The caption of the horizontally mirrored photo: "left" and "right" are exchanged."""
    opposite = {"left": "right", "right": "left"}
    return " ".join(opposite.get(word, word) for word in text.split())


def train_unet(config, vae, work, device, autocast):
    """Trains the U-Net and the text encoder by v-prediction on `haar_latents`.

    Writes WORK/mini-sd and figures of samples. Returns the training time in seconds.
    """
    photos, phrases = render_mixture(config, work)
    torch.manual_seed(config.seed)
    tokenizer, text = new_text(work / "tokenizer")
    unet, scheduler = new_unet(), new_scheduler()
    unet.set_attn_processor(AttnProcessor())        # for few tokens, faster on a CPU than SDPA
    trainer = Trainer("unet", {"unet": unet, "text": text}, config.unet_lr, config.unet_steps, work,
                      config, device)
    rng = np.random.default_rng([config.seed, trainer.start])
    generator = torch.Generator().manual_seed(config.seed + trainer.start)
    vae.register_to_config(scaling_factor=config.latent_scale)
    variance = float(scaled_latents(photos[:500], config, device).var())
    abar = scheduler.alphas_cumprod.to(device)
    n, crop = config.unet_batch, config.unet_crop
    for step in range(trainer.start, trainer.steps):
        # Batch: random crops, half of them mirrored, and their captions.
        chosen = rng.integers(0, len(photos), n)
        corners = rng.integers(0, config.size - crop + 1, (n, 2))
        mirror = rng.random(n) < 0.5
        crops, captions = [], []
        for k, (y, x), mirrored in zip(chosen, corners, mirror):
            image = photos[k, y:y + crop, x:x + crop]
            caption = random_caption(phrases[k], rng, config.drop_caption)
            crops.append(image[:, ::-1] if mirrored else image)
            captions.append(mirrored_caption(caption) if mirrored else caption)
        tokens = tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt")
        tokens = tokens.input_ids.to(device)
        z_0 = scaled_latents(np.stack(crops), config, device)
        z_0 = z_0.contiguous(memory_format=torch.channels_last)

        # Noise; t is logit-normal (Esser et al. 2024).
        eps = torch.randn(z_0.shape, generator=generator)
        eps = eps.to(z_0, memory_format=torch.channels_last)
        t = torch.sigmoid(torch.randn(n, generator=generator) + config.t_shift)
        t = (t * scheduler.config.num_train_timesteps).long().to(device)
        z_t = scheduler.add_noise(z_0, eps, t)

        # Forward and loss, divided by the variance of v so that all t have equal weight.
        with autocast():
            v = unet(z_t, t, text(tokens).last_hidden_state).sample
        error = (v.float() - scheduler.get_velocity(z_0, eps, t)).square().mean((1, 2, 3))
        loss = (error / (abar[t] + (1 - abar[t]) * variance)).mean()

        if trainer.update(step, loss) and (step + 1) % (4 * config.save_every) == 0:
            current = {k: p.clone() for k, p in trainer.modules.state_dict().items()}
            save_mini_sd(work / "mini-sd", vae, trainer.averaged(), tokenizer, scheduler)
            trainer.modules.load_state_dict(current)
            trainer.modules.train()
            sample_figure(work / "mini-sd", work / f"unet-{step + 1:06d}.png", device)
    save_mini_sd(work / "mini-sd", vae, trainer.averaged(), tokenizer, scheduler)
    sample_figure(work / "mini-sd", work / "unet.png", device)
    return trainer.seconds


def scaled_latents(images, config, device):
    """(B,H,W,3) uint8 photos to the U-Net's latents (B,6,H/2,W/2)."""
    return haar_latents(to_tensor(images, device) * 2 - 1) * config.latent_scale


def save_mini_sd(folder, vae, modules, tokenizer, scheduler):
    """Writes a Stable Diffusion model in diffusers' folder layout, fp16 safetensors."""
    vae, text, unet = (copy.deepcopy(module).to(torch.float16)
                       for module in (vae, modules["text"], modules["unet"]))
    pipe = StableDiffusionPipeline(vae=vae, text_encoder=text, unet=unet, tokenizer=tokenizer,
                                   scheduler=scheduler, safety_checker=None,
                                   feature_extractor=None, requires_safety_checker=False)
    pipe.save_pretrained(folder)
    # Otherwise transformers would load the text encoder in fp16 next to a U-Net in fp32.
    config = folder / "text_encoder" / "config.json"
    config.write_text(config.read_text().replace('"float16"', '"float32"'))


# ---------------------------------------------------------------- samples by img2img

def load_img2img(folder, device):
    """The img2img pipeline of diffusers for a mini-SD, without progress bars."""
    pipe = StableDiffusionImg2ImgPipeline.from_pretrained(folder, torch_dtype=torch.float32,
                                                          safety_checker=None).to(device)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def img2img(pipe, clear, caption, strength, guidance, steps):
    """Edits clear photos (B,3,H,W) in [0,1] towards a caption and away from clear weather.

    steps: evaluations of the U-Net, at any strength
    Returns (B,3,H,W) in [0,1], on the CPU.
    """
    result = pipe([caption] * len(clear), negative_prompt=[CLEAR] * len(clear), image=clear,
                  strength=strength, guidance_scale=guidance,
                  num_inference_steps=round(steps / strength), output_type="pt",
                  generator=torch.Generator(pipe.device).manual_seed(0))
    return result.images.cpu()


def sample_figure(folder, path, device, strength=0.6):
    """Writes a figure: a row of held-out clear scenes, then a row of them in each weather."""
    pipe = load_img2img(folder, device)
    photos = [Photo("pretraining-test", i, "clear", "original", 96, 96) for i in range(8)]
    clear = to_tensor(np.stack([render_photo(photo)[1] for photo in photos]), device)
    rows = [clear]
    for kind in KINDS:
        rows.append(img2img(pipe, clear, f"a photo in heavy {kind}", strength, 3.0, 15))
    grid(rows, path)


# ---------------------------------------------------------------- teacher

def train_teacher(config, work, device, autocast):
    """Trains one Restorer for all kinds of weather. Returns it and the training time in seconds.

    Minimizes the negative PSNR (as NAFNet does). In the same time, rain improved by 0.6 dB
    with L1 and by 3.7 dB with this loss.
    """
    photos, _ = render_split(work / "original", "original", config.teacher_photos, KINDS,
                             config.size, with_clean=True)
    torch.manual_seed(config.seed)
    teacher = Restorer(40, encoder=(1, 1, 2), middle=2, decoder=(1, 1, 1),
                       window=config.teacher_crop)
    trainer = Trainer("teacher", {"teacher": teacher}, config.teacher_lr, config.teacher_steps,
                      work, config, device)
    rng = np.random.default_rng([config.seed, trainer.start])
    source = batches(photos, config.teacher_batch, config.teacher_crop, rng)
    for step in range(trainer.start, trainer.steps):
        clean, degraded = to_tensor(next(source), device).unbind(1)
        with autocast():
            restored = teacher(degraded.contiguous(memory_format=torch.channels_last))
        mse = (restored.float() - clean).square().mean((1, 2, 3))
        loss = (mse + 1e-5).log10().mean() / 10                 # -PSNR / 100 dB
        if trainer.update(step, loss):
            grid([degraded[:8], restored[:8], clean[:8]], work / "teacher.png")
    return trainer.averaged()["teacher"], trainer.seconds


# ---------------------------------------------------------------- shared by the stages

class Trainer:
    """AdamW with warm-up and cosine decay, averaged weights, a checkpoint, a log and a bar."""

    def __init__(self, name, modules, lr, steps, work, config, device):
        self.name, self.steps, self.config, self.start = name, steps, config, 0
        self.checkpoint, self.log = work / f"{name}.pt", work / "log.jsonl"
        self.modules = torch.nn.ModuleDict(modules)
        self.modules.to(device, memory_format=torch.channels_last).train()
        self.optimizer = torch.optim.AdamW(self.modules.parameters(), lr=lr, weight_decay=1e-4,
                                           betas=(0.9, 0.99), fused=True)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda step: relative_rate(step, steps))
        self.average = {k: v.detach().clone() for k, v in self.modules.state_dict().items()}
        self.seconds, self.loss = 0.0, None
        if self.checkpoint.exists():
            state = torch.load(self.checkpoint, map_location=device, weights_only=True)
            self.modules.load_state_dict(state["modules"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.schedule.load_state_dict(state["rate"])
            self.average, self.start = state["average"], state["step"]
            self.seconds = state["seconds"]
        self.reported = self.start                              # the step of the last report
        self.started = time.time() - self.seconds
        self.bar = tqdm(total=steps, initial=self.start, desc=name, unit="step")

    def update(self, step, loss):
        """One update of the weights. Returns True at steps with a report and a checkpoint."""
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.modules.parameters(), 1.0)
        self.optimizer.step()
        self.schedule.step()

        # Moving average of the weights, over fewer steps at first.
        decay = min(self.config.ema, (1 + step) / (10 + step))
        with torch.no_grad():
            for name, value in self.modules.state_dict().items():
                if value.is_floating_point():
                    self.average[name].lerp_(value, 1 - decay)

        loss = loss.detach()
        self.loss = loss if self.loss is None else self.loss.lerp(loss, 0.02)
        self.bar.update()
        if (step + 1) % self.config.save_every and step + 1 < self.steps:
            return False
        self.save(step + 1)
        return True

    def save(self, step):
        """Writes the checkpoint and appends the smoothed loss to the log."""
        loss = round(float(self.loss), 6)                       # GPU sync point
        before, self.seconds = self.seconds, time.time() - self.started
        state = {"modules": self.modules.state_dict(), "optimizer": self.optimizer.state_dict(),
                 "rate": self.schedule.state_dict(), "average": self.average, "step": step,
                 "seconds": self.seconds}
        temporary = self.checkpoint.with_suffix(".tmp")
        torch.save(state, temporary)
        os.replace(temporary, self.checkpoint)
        speed = (step - self.reported) / max(self.seconds - before, 1e-9)
        self.reported = step
        self.bar.set_postfix(loss=f"{loss:.4f}")
        line = {"stage": self.name, "step": step, "loss": loss,
                "steps_per_s": round(speed, 3)}
        with self.log.open("a") as file:
            file.write(json.dumps(line) + "\n")
        plot_losses(self.log, self.log.with_name("losses.png"))

    def averaged(self):
        """The modules with the averaged weights, in evaluation mode."""
        self.modules.load_state_dict(self.average)
        return self.modules.eval()


def relative_rate(step, steps):
    """Learning rate relative to its peak: 200 steps of warm-up, cosine decay to 2 %."""
    warm_up = min(1, (step + 1) / 200)
    cosine = 0.5 * (1 + math.cos(math.pi * min(1, step / steps)))
    return warm_up * (0.02 + 0.98 * cosine)


def render_mixture(config, work):
    """The mini-SD's training photos, (N,size,size,3) uint8, and their captions' phrases."""
    return render_split(work / "mixture", "pretraining", config.photos, ("clear",) + KINDS,
                        config.size)


def render_split(path, split, count, kinds, size, with_clean=False):
    """Renders training photos of a split, in the domain of the same name, on all cores, once.

    Photo i has the weather kinds[i % len(kinds)]. Writes PATH.npy and PATH.json.
    Returns the photos, (count,size,size,3) or, as pairs of clean and degraded,
    (count,2,size,size,3), uint8, memory-mapped; and a list of the captions' phrases.
    """
    data, captions = path.with_suffix(".npy"), path.with_suffix(".json")
    shape = (count, 2, size, size, 3) if with_clean else (count, size, size, 3)
    if not captions.exists() or np.load(data, mmap_mode="r").shape != shape:
        captions.unlink(missing_ok=True)                        # written last: marks it complete
        path.parent.mkdir(parents=True, exist_ok=True)
        array = np.lib.format.open_memmap(data, "w+", np.uint8, shape)
        photos = [Photo(split, i, kinds[i % len(kinds)], split, size, size, with_clean)
                  for i in range(count)]
        phrases = []
        with Pool(os.cpu_count(), initializer=ignore_signals) as pool:
            rendered = tqdm(pool.imap(render_photo, photos, 16), f"render {path.name}", count)
            for i, (clean, degraded, caption) in enumerate(rendered):
                array[i] = np.stack([clean, degraded]) if with_clean else degraded
                phrases.append(caption)
        array.flush()
        captions.write_text(json.dumps(phrases))
    return np.load(data, mmap_mode="r"), json.loads(captions.read_text())


def batches(photos, size, crop, rng):
    """Yields random crops (B,...,crop,crop,3) of photos (N,...,H,W,3), half of them mirrored."""
    height, width = photos.shape[-3:-1]
    while True:
        crops = []
        for i in rng.integers(0, len(photos), size):
            y = rng.integers(0, height - crop + 1)
            x = rng.integers(0, width - crop + 1)
            part = photos[i][..., y:y + crop, x:x + crop, :]
            crops.append(part[..., ::-1, :] if rng.random() < 0.5 else part)
        yield np.stack(crops)


def to_tensor(batch, device):
    """(...,H,W,3) uint8 to (...,3,H,W) float32 in [0,1]."""
    return torch.from_numpy(np.array(batch)).to(device).movedim(-1, -3).float() / 255


def grid(rows, path):
    """Writes rows of images, (B,3,H,W) tensors in [0,1], as one picture."""
    rows = [torch.cat(list(row.detach().float().cpu()), -1) for row in rows]    # (3,H,B*W)
    to_pil(torch.cat(rows, -2).permute(1, 2, 0).numpy()).save(path)


def main():
    parser = argparse.ArgumentParser(prog="python -m demo.pretrain", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("runs/pretrain"),
                        help="folder for renderings, checkpoints and figures (%(default)s)")
    parser.add_argument("--weights", type=Path, default=WEIGHTS,
                        help="folder for the finished weights (%(default)s)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu",
                        help="(%(default)s)")
    parser.add_argument("--stage", nargs="+", choices=STAGES, default=STAGES,
                        help="what to train (all)")
    for name, value in asdict(Pretraining()).items():
        flag = "--" + name.replace("_", "-")
        parser.add_argument(flag, type=type(value), default=value, help="(%(default)s)")
    args = vars(parser.parse_args())
    config = Pretraining(**{name: args[name] for name in asdict(Pretraining())})
    pretrain(config, args["work"], args["weights"], args["device"], args["stage"])


if __name__ == "__main__":
    main()
