"""Speed and memory of the stages, compared with the usual alternatives.

    python -m experiments.bench                    # the table: ours against the alternatives
    python -m experiments.bench --growth           # more images, larger images, larger batches
    python -m experiments.bench --sd-size 1.5      # random weights of Stable Diffusion 1.5's shape
    python -m experiments.bench --compile          # the U-Net with and without torch.compile

Each command prints its tables and writes its own section of results/bench-DEVICE.json. Takes the
flags of d4ir.py. Photos are random, adapters and students untrained; neither affects the speed.

    ratio = seconds of the alternative / seconds of ours, per image or training step
    share = FLOP / seconds / (FLOP per second of a large matrix product in the same precision)

Both sides and the matrix products are timed alternately in one process; seconds are medians over
--repeats. FLOPs are those of convolutions, matrix products and attention, counted during a call.
Peak memory (host_gib) is that of a fresh process, without memory-mapped files, which the system can
evict.
"""
import gc
import itertools
import math
import multiprocessing
import os
import re
import statistics
import tempfile
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Callable

import diffusers
import torch
import torch.nn.functional as F
import transformers
from torch import nn
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode
from torchvision.transforms import RandomCrop

import d4ir
from distill import Crops, DistillConfig, distill, teacher_outputs
from evaluate import cost, read_image, synchronized_clock
from experiments.common import machine_name, make_parser, provenance, write_section
from models import (Restorer, StableDiffusion, load_restorer, load_stable_diffusion,
                    save_restorer)
from prompt_adapter import AdapterConfig, CropPairs, PromptAdapter, save_adapter, train_adapter
from synth import SynthConfig, synthesize_photos, write_png


# ---------------------------------------------------------------- measuring

MATMUL = {"cpu": 4096, "cuda": 8192}    # side of the matrices whose product gives the peak


@dataclass
class Side:
    """One side of a row: `call` makes `count` images or training steps."""
    call: Callable
    count: int
    dtype: torch.dtype
    settings: dict

    def __post_init__(self):
        self.settings = self.settings | dict(precision=str(self.dtype).removeprefix("torch."))


def compare(ours, alternative, device, repeats):
    ours, alternative = measure([ours, alternative], device, repeats)
    ratio = alternative["seconds"] / ours["seconds"]
    return dict(ratio=ratio, ours=ours, alternative=alternative)


def measure(sides, device, repeats):
    """Seconds and TFLOP per image or step of each side, and its share of the machine's peak."""
    calls = [side.call for side in sides] + [matmul(device, side.dtype) for side in sides]
    flops = [count_flops(call) for call in calls]           # also the warm-up
    seconds = median_seconds(calls, device, repeats)
    rates = [flop / s / 1e12 for flop, s in zip(flops, seconds)]
    return [dict(seconds=s / side.count, tflop=flop / side.count / 1e12, tflop_per_s=rate,
                 peak_tflop_per_s=peak, share=rate / peak, settings=side.settings)
            for side, flop, s, rate, peak in zip(sides, flops, seconds, rates, rates[len(sides):])]


def median_seconds(calls, device, repeats):
    """The median seconds of each call, timed alternately so that other load affects all equally."""
    times = [[] for _ in calls]
    for _ in range(repeats):
        for call, values in zip(calls, times):
            start = synchronized_clock(device)
            call()
            values.append(synchronized_clock(device) - start)
    return [statistics.median(values) for values in times]


def count_flops(call):
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def matmul(device, dtype):
    """A call that multiplies two large matrices; ten times on a GPU."""
    side, count = MATMUL[device.type], 10 if device.type == "cuda" else 1
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    return lambda: [a @ b for _ in range(count)]


def in_fresh_process(function, *arguments, **named):
    """The dict that a function returns, plus the peak memory of its process: GiB of the host and of
    the GPU. None if memory ran out; the kernel then kills the process, or CUDA raises."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        try:
            return pool.submit(with_peak_memory, function, *arguments, **named).result()
        except (torch.OutOfMemoryError, BrokenProcessPool):
            return None


def in_this_process(function, *arguments, **named):
    """What a function returns, without the start-up time of a new process; None if the GPU's
    memory ran out. Peak memory counts from here."""
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    try:
        return function(*arguments, **named)
    except torch.OutOfMemoryError:
        return None


def with_peak_memory(function, *arguments, **named):
    d4ir.silence_libraries()
    kib, finished = [], threading.Event()

    def sample():                                           # Linux only
        while True:
            status = Path("/proc/self/status").read_text()
            kib.append(int(re.search(r"RssAnon:\s*(\d+)", status)[1]))
            if finished.wait(0.02):
                return

    sampler = threading.Thread(target=sample)
    sampler.start()
    try:
        result = function(*arguments, **named)
    finally:
        finished.set()
        sampler.join()
    result["host_gib"] = max(kib) / 2 ** 20
    if torch.cuda.is_initialized():
        result["gpu_gib"] = torch.cuda.max_memory_allocated() / 2 ** 30
    return result


# ---------------------------------------------------------------- our side

def random_photos(count, side):
    """Smooth random photos with grain: a list of (3,side,side) uint8."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(count, 3, 9, 9, generator=generator)
    grain = 0.02 * torch.randn(count, 3, side, side, generator=generator)
    photos = F.interpolate(coarse, (side, side), mode="bicubic") + grain
    return list((photos.clamp(0, 1) * 255).byte())


def untrained_adapter(sd, config):
    base = sd.null_prompt(config.tokens)                            # (1,N,d)
    adapter = PromptAdapter(sd.width, base.shape[1], base=base, centered=config.caption_base,
                            residual=config.residual)
    return adapter.eval().to(sd.device)


def synthesis(sd, config, size, prompter):
    """A Side that synthesizes `config.batch` images. prompter: degraded photos to prompts."""
    photos = torch.stack(random_photos(config.batch, size)) / 255

    @torch.no_grad()
    def call():
        prompts = prompter(photos.to(sd.device))                        # (B,N,d)
        return synthesize_photos(photos, prompts, sd, config, torch.Generator().manual_seed(0))

    return Side(call, config.batch, sd.dtype, asdict(config) | dict(size=size))


def adapter_training(sd, config, loader):
    """A Side of `config.steps` updates."""
    adapter = untrained_adapter(sd, config)
    call = lambda: train_adapter(adapter, sd, loader, config, log=lambda report: None)
    return Side(call, config.steps, sd.dtype, asdict(config) | dict(size=loader.size))


def distillation(student, config, loader, device, dtype, teacher=None):
    """A Side of `config.steps` updates. teacher: None if the loader has its outputs."""
    call = lambda: distill(teacher, student, loader, config, device=device, dtype=dtype,
                           log=lambda report: None)
    return Side(call, config.steps, dtype, asdict(config) | dict(student=student.config))


# ---------------------------------------------------------------- the table's rows
# Each function returns two Sides: ours and the alternative.

def ccd(run, **settings):
    """CCD against diffusers' img2img as commonly used: a text prompt, one image per call,
    float32, 25 DDIM steps."""
    ours = synthesis(run.sd, replace(run.synth, **settings), run.size,
                     untrained_adapter(run.sd, run.adapter))
    prompt = dict(prompt=d4ir.TASKS[run.args.task].captions[0])
    return ours, img2img(run, diffusers.DDIMScheduler, prompt, batch=1, evaluations=25)


def ccd_like_for_like(run):
    """The same networks, prompts, precision, batch, solver and number of U-Net evaluations."""
    sd, config = run.sd, replace(run.synth, **SynthConfig.ADDITIONS)
    null = sd.null_prompt(run.adapter.tokens).expand(config.batch, -1, -1)
    prompt = dict(prompt_embeds=null, negative_prompt_embeds=null, output_type="pt")
    solver = dict(dpm=diffusers.DPMSolverMultistepScheduler, ddim=diffusers.DDIMScheduler)
    return (synthesis(sd, config, run.size, lambda degraded: null),
            img2img(run, solver[config.scheduler], prompt, config.batch, config.steps,
                    vae=sd.vae, unet=sd.unet, text_encoder=sd.text_encoder))


def img2img(run, scheduler, prompt, batch, evaluations, **networks):
    """diffusers' pipeline with the run's strength and guidance."""
    pipe = diffusers.StableDiffusionImg2ImgPipeline.from_pretrained(
        run.args.sd, safety_checker=None, **networks).to(run.device)
    pipe.scheduler = scheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    photos = torch.stack(random_photos(batch, run.size)) / 255
    # The pipeline evaluates the U-Net floor(strength * num_inference_steps) times.
    settings = dict(strength=run.synth.strength, guidance_scale=run.synth.guidance,
                    num_inference_steps=math.ceil(evaluations / run.synth.strength))
    call = lambda: pipe(**prompt, **settings, image=photos,
                        generator=torch.Generator().manual_seed(0))
    return Side(call, batch, pipe.unet.dtype, settings | dict(
        pipeline=type(pipe).__name__, scheduler=scheduler.__name__, evaluations=evaluations,
        batch=batch, size=run.size))


def adapter_step(run):
    """Against a step that also encodes its crops and computes the gradients of the U-Net's weights,
    with larger crops, in float32."""
    config, size, photos = run.adapter, run.size, random_photos(run.adapter.batch, 2 * run.size)
    sd, crop = TrainableUNet(load_stable_diffusion(run.args.sd, run.device)), config.crop or size
    ours = adapter_training(run.sd, config, CropPairs(photos, run.sd, crop, config.batch))
    alternative = adapter_training(sd, config, EncodedEveryStep(photos, sd, size, config.batch))
    alternative.settings |= dict(latents="encoded in every step", unet="left trainable", crop=size)
    return ours, alternative


class TrainableUNet:
    """A Stable Diffusion whose U-Net `train_adapter` cannot freeze."""

    def __init__(self, sd):
        self.sd, self.unet = sd, nn.Identity()
        sd.unet.requires_grad_(True)

    def __getattr__(self, name):
        return getattr(self.sd, name)


class EncodedEveryStep(CropPairs):
    """The same crops, encoded when they are needed."""

    def __init__(self, photos, sd, size, batch):
        super().__init__(photos, sd, size, batch)
        self.sd = sd

    def batch_at(self, step):
        _, a, b, photo = super().batch_at(step)
        return self.sd.encode(a / 255), a, b, photo


def distill_step(run):
    """Against a step that decodes PNG files and runs the teacher, in float32."""
    config, crop, images = run.distill, run.distill.crop_size(run.size), random_photos(64, run.size)
    targets = list(teacher_outputs(run.teacher, images, run.device, run.dtype))
    ours = distillation(run.new_student(crop), config, Crops(images, crop, config.batch, targets),
                        run.device, run.dtype)
    alternative = distillation(run.new_student(crop), config,
                               DataLoader(PngCrops(images, crop), config.batch, shuffle=True),
                               run.device, torch.float32, run.teacher)
    alternative.settings |= dict(keep_teacher=False, images="PNG files decoded in every step")
    return ours, alternative


class PngCrops:
    """A dataset of random crops of PNG files, decoded when they are needed."""

    def __init__(self, images, crop):
        self.folder, self.crop = tempfile.TemporaryDirectory(), RandomCrop(crop)
        self.files = write_images(images, len(images), Path(self.folder.name))

    def __len__(self):
        return len(self.files)

    def __getitem__(self, index):
        return self.crop(read_image(self.files[index]))


def write_images(images, count, folder):
    """Writes `count` PNG files, repeating the images; returns their paths."""
    files = [folder / f"{i:06d}.png" for i in range(count)]
    for file, image in zip(files, itertools.cycle(images)):
        write_png(image, file)
    return files


def latency(run, size):
    """The student, reloaded from its file as for evaluation, against the teacher: one image."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "student.safetensors")
        save_restorer(run.new_student(run.distill.crop_size(run.size)), file)
        student = load_restorer(file, run.device)
    return restoration(student, size, run.device), restoration(run.teacher, size, run.device)


def restoration(model, size, device, count=10):
    """A Side that restores one image `count` times in float32."""
    x = torch.rand(1, 3, size, size, device=device).contiguous(memory_format=torch.channels_last)

    @torch.no_grad()
    def call():
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            for _ in range(count):
                model(x)

    costs = cost(model, size, runs=1)
    settings = {name: costs[name] for name in ("params", "gmacs", "peak_mb")}
    settings |= dict(network=getattr(model, "config", None), size=size, batch=1)
    return Side(call, count, x.dtype, settings)


ROWS = {"CCD, default, against img2img": ccd,
        "CCD without additions, against img2img": lambda run: ccd(run, **SynthConfig.ADDITIONS),
        "CCD without additions, like for like": ccd_like_for_like,
        "adapter step": adapter_step,
        "distillation step": distill_step,
        "student against teacher, 256 px": lambda run: latency(run, 256),
        "student against teacher, 512 px": lambda run: latency(run, 512)}


# ---------------------------------------------------------------- growth

GROWTH = dict(images=(200, 2000), size=(64, 96, 128), batch=(4, 16, 64))
USUAL = dict(images=200, size=96, batch=16)


def growth(arguments):
    """Time and peak memory of two stages, with one of images, size and batch changed at a time.
    Distillation includes reading and selecting images and computing the teacher's outputs."""
    cells = [USUAL] + [USUAL | {name: value} for name, values in GROWTH.items()
                       for value in values if value != USUAL[name]]
    return [dict(stage=stage) | cell | (in_fresh_process(run_stage, stage, arguments, **cell) or {})
            for stage in ("synth", "distill") for cell in cells]


def run_stage(stage, arguments, images, size, batch):
    """Seconds of a stage of d4ir.py, in a run folder that holds just what the stage needs."""
    with tempfile.TemporaryDirectory() as folder:
        run = make_run(["--distill-steps", 100, *arguments, "--out", folder, "--images", images,
                        "--size", size, "--batch", batch, "--distill-batch", batch])
        result = {}
        run.clean = run.degraded = random_photos(16, 2 * size)
        if stage == "synth":
            save_adapter(untrained_adapter(run.sd, run.adapter), run.out / "adapter.safetensors")
        else:
            result["steps"] = run.distill.steps
            (run.out / "synth").mkdir()
            write_images(random_photos(16, size), images, run.out / "synth")
        start = synchronized_clock(run.device)
        d4ir.STAGES[stage](run)
        return result | dict(seconds=synchronized_clock(run.device) - start)


# ---------------------------------------------------------------- Stable Diffusion 1.5

UNET = dict(sample_size=64, in_channels=4, out_channels=4, layers_per_block=2,
            block_out_channels=(320, 640, 1280, 1280), cross_attention_dim=768,
            attention_head_dim=8, norm_num_groups=32,
            down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
            up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3)
VAE = dict(sample_size=512, in_channels=3, out_channels=3, latent_channels=4, layers_per_block=2,
           block_out_channels=(128, 256, 512, 512), norm_num_groups=32, scaling_factor=0.18215,
           down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4)
TEXT = dict(vocab_size=49408, hidden_size=768, intermediate_size=3072, num_hidden_layers=12,
            num_attention_heads=12, max_position_embeddings=77)
SCHEDULE = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")

SIZES = (256, 512)
BATCHES = {"adapter": (2, 4, 8, 16, 32), "synth": (1, 2, 4, 8, 16), "distill": (1, 2, 4, 8, 16)}
# The recommended run: adapter steps (batch 16), images, distillation steps (batch 16).
RECOMMENDED = {"adapter": 3000, "synth": 4000, "distill": 60000}
# To estimate hours: NVIDIA's dense bf16 TFLOP/s with fp32 accumulation, the share of it that each
# stage reaches, and the minimum time to launch a step's kernels, in seconds; the last two are
# assumed.
GPUS = {"H100": 989, "A100": 312, "RTX 4090": 165, "RTX 3060": 25.5}
SHARES = {"adapter": 0.28, "synth": 0.35, "distill": 0.1}
LAUNCH_SECONDS = {"adapter": 0, "synth": 0, "distill": 0.03}
# To estimate the memory of an adapter step: the fixed part and the part per photo of 512 px, both
# measured on an H200 (results/README.md).
FIXED_GIB, PHOTO_GIB = 2.6, 0.85
CARDS_GIB, RESERVED_GIB = (8, 12, 24, 80), 1                # the reserve: CUDA, fragmentation


def random_sd(device, dtype):
    """A Stable Diffusion with the shape of 1.5 and random weights; every text has the same ids."""
    with torch.device("meta"):                              # no memory for weights in float32
        networks = [diffusers.UNet2DConditionModel(**UNET), diffusers.AutoencoderKL(**VAE)]
    networks = [network.to(dtype).to_empty(device=device) for network in networks]
    networks += [transformers.CLIPTextModel(transformers.CLIPTextConfig(**TEXT)).to(device, dtype)]
    for network in networks:
        network.requires_grad_(False).eval().to(memory_format=torch.channels_last)
        for parameter in network.parameters():
            parameter.normal_(std=0.02)
    unet, vae, text_encoder = networks
    tokenizer = lambda texts, max_length, **options: SimpleNamespace(
        input_ids=torch.zeros(len(texts), max_length, dtype=torch.long))
    abar = diffusers.DDIMScheduler(**SCHEDULE).alphas_cumprod
    return StableDiffusion(vae, unet, text_encoder, tokenizer, "epsilon", abar, device, dtype)


def sd_size(run, limit):
    """Measured cells, and estimates from them for the recommended run and for common GPUs."""
    cells, stopped, measured = [], [], in_fresh_process
    if run.device.type == "cuda":
        measured = in_this_process
        measured(sd_cell, "adapter", 256, 2, None, run.device, run.dtype)       # warm-up
    for stage, size in itertools.product(BATCHES, SIZES):
        for batch in BATCHES[stage]:
            start = time.time()
            cell = measured(sd_cell, stage, size, batch, run.args.student_width, run.device,
                            run.dtype)
            if cell:
                cells.append(dict(stage=stage, size=size, batch=batch) | cell)
                run.log(str(cells[-1]))
            reason = reason_to_stop(cell, time.time() - start, run.device, limit)
            if reason:
                stopped.append(dict(stage=stage, size=size, batch=batch, reason=reason))
                break
    return dict(cells=cells, stopped=stopped, recommended_run=recommended_run(cells),
                memory=memory(cells))


def reason_to_stop(cell, seconds, device, limit):
    """Why larger batches are not tried; None if they are."""
    if cell is None:
        return "out of memory"
    if 2 * seconds > limit:
        return f"the next one would take more than {limit:g} s"
    if device.type == "cpu":
        ram_gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2 ** 30
        if 2 * cell["host_gib"] > ram_gib:
            return f"the next one could need more than {ram_gib:.0f} GiB"
    return None


def sd_cell(stage, size, batch, width, device, dtype):
    """Seconds and TFLOP of an adapter step, an image or a distillation step."""
    steps, photos = 4 if device.type == "cuda" else 2, random_photos(batch, size)
    if stage == "adapter":
        sd, config = random_sd(device, dtype), AdapterConfig(batch=batch, steps=steps)
        side = adapter_training(sd, config, CropPairs(photos, sd, size, batch))
    elif stage == "synth":
        sd, config = random_sd(device, dtype), SynthConfig(batch=batch)
        side = synthesis(sd, config, size, untrained_adapter(sd, AdapterConfig()))
    else:
        config = DistillConfig(batch=batch, steps=10)
        crop, targets = config.crop_size(size), [(photo / 255).half() for photo in photos]
        side = distillation(Restorer(width, block="residual", norm=True), config,
                            Crops(photos, crop, batch, targets), device, dtype)
    memory = {}
    if device.type == "cuda":                               # before `measure` allocates matrices
        side.call()
        memory["gpu_gib"] = torch.cuda.max_memory_allocated() / 2 ** 30
    (result,) = measure([side], device, 1)
    result.pop("settings")                                  # the defaults
    return result | memory | dict(source="measured")


def recommended_run(cells):
    """Hours of each stage: measured here at its largest batch, computed for other GPUs."""
    largest, rows = {(cell["stage"], cell["size"]): cell for cell in cells}, []
    for (stage, size), cell in largest.items():
        scale = 1 if stage == "synth" else 16 / cell["batch"]           # steps of 16
        seconds = {"this device": cell["seconds"] * scale}
        for gpu, peak in GPUS.items():
            seconds[gpu] = computed_seconds(stage, cell["tflop"] * scale, peak)
        rows += [dict(stage=stage, size=size, device=name, seconds=value,
                      hours=RECOMMENDED[stage] * value / 3600,
                      source="computed" if name in GPUS else f"measured at batch {cell['batch']}")
                 for name, value in seconds.items()]
    return rows


def computed_seconds(stage, tflop, peak):
    """Estimated seconds of a step or an image of `tflop` on a GPU with this peak, TFLOP/s."""
    return max(tflop / (peak * SHARES[stage]), LAUNCH_SECONDS[stage])


def memory(cells):
    """The largest batch that fits each card (0: none), from GiB = fixed + per_sample * batch."""
    rows = []
    for stage, size in itertools.product(BATCHES, SIZES):
        gib = {cell["batch"]: cell.get("gpu_gib") or cell["host_gib"] for cell in cells
               if (cell["stage"], cell["size"]) == (stage, size)}
        if len(gib) > 1:
            first, last = min(gib), max(gib)
            per_sample = (gib[last] - gib[first]) / (last - first)
            fixed = gib[first] - per_sample * first
        elif stage == "adapter":
            fixed, per_sample = FIXED_GIB, PHOTO_GIB * (size / 512) ** 2
        else:
            continue
        for card in CARDS_GIB:
            fitting = [batch for batch in BATCHES[stage]
                       if fixed + per_sample * batch <= card - RESERVED_GIB]
            batch = max(fitting, default=0)
            rows.append(dict(stage=stage, size=size, card_gib=card, batch=batch,
                             gib=fixed + per_sample * batch,
                             source="measured" if batch in gib else "computed"))
    return rows


# ---------------------------------------------------------------- torch.compile

@torch.no_grad()
def compile_unet(sd, batch, size, repeats):
    """A U-Net evaluation with guidance, with and without torch.compile. The first call compiles."""
    prompts = sd.null_prompt().expand(2 * batch, -1, -1)
    z_t = torch.randn(2 * batch, sd.unet.config.in_channels, size // sd.factor, size // sd.factor)
    t = torch.full((len(z_t),), 500, device=sd.device)
    calls = [lambda sd=sd: sd.predict_noise(z_t, t, prompts)
             for sd in (sd, replace(sd, unet=torch.compile(sd.unet)))]
    (first,) = median_seconds(calls[1:], sd.device, 1)
    calls[0]()
    eager, compiled = median_seconds(calls, sd.device, repeats)
    return [dict(batch=batch, size=size, eager_seconds=eager, compiled_seconds=compiled,
                 ratio=eager / compiled, compile_seconds=first - compiled)]


# ---------------------------------------------------------------- the command line

def make_run(arguments):
    """The run of d4ir.py with these flags, by default with ten steps per training call."""
    steps = ["--adapter-steps", "10", "--distill-steps", "10"]
    run = d4ir.Run(d4ir.parse(["--task", "desnow", *steps, *map(str, arguments)]))
    if run.args.stage or run.args.restart or run.world_size > 1:
        raise ValueError("--stage, --restart and torchrun are for d4ir.py only")
    d4ir.check_inputs(run)
    return run


def device_name(device):
    """"cpu", "h100", "rtx-4090", ..."""
    if device.type == "cpu":
        return "cpu"
    name = torch.cuda.get_device_name(device).lower()
    return re.search(r"(rtx )?[a-z]*\d+|$", name).group().replace(" ", "-") or "gpu"


def summary(row):
    """A row of the table as it is printed, with "ours / the alternative" in a cell."""
    def both(key, scale=1):
        values = [(side | side["settings"]).get(key) for side in (row["ours"], row["alternative"])]
        return " / ".join("" if value is None else f"{scale * value:.3g}" for value in values)

    return {"row": row["row"], "ratio": row["ratio"], "ms": both("seconds", 1000),
            "GMACs": both("tflop", 500), "% of matmul peak": both("share", 100),
            "peak MB": both("peak_mb")}


def markdown(rows):
    """A list of flat dicts as a Markdown table."""
    keys = list(dict.fromkeys(key for row in rows for key in row))
    text = lambda value: f"{value:.3g}" if isinstance(value, float) else str(value)
    lines = [keys, ["---"] * len(keys)]
    lines += [[text(row.get(key, "")) for key in keys] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main(argv=None):
    parser = make_parser("bench", __doc__)
    parser.add_argument("--repeats", type=d4ir.number(int, 1), default=3,
                        help="timed runs of every call (3)")
    parser.add_argument("--growth", action="store_true",
                        help="measure how time and memory grow with images, size and batch instead")
    parser.add_argument("--sd-size", choices=["1.5"],
                        help="measure a Stable Diffusion model of this version's shape instead")
    parser.add_argument("--seconds", type=d4ir.number(float, 1), default=300,
                        help="with --sd-size: skip batches expected to take longer (300)")
    parser.add_argument("--compile", action="store_true",
                        help="measure torch.compile instead; with --sd-size, on that U-Net, 512 px")
    own, rest = parser.parse_known_args(argv)
    run = make_run(rest)
    if own.compile:
        section = "compile" + (f" sd {own.sd_size}" if own.sd_size else "")
        sd, size = (random_sd(run.device, run.dtype), 512) if own.sd_size else (run.sd, run.size)
        tables = {"compile": compile_unet(sd, run.synth.batch, size, own.repeats)}
    elif own.sd_size:
        section, tables = f"sd {own.sd_size}", sd_size(run, own.seconds)
    elif own.growth:
        section, tables = "growth", {"growth": growth(rest)}
    else:
        section, rows = "table", []
        for name, sides in ROWS.items():
            run.log(f"--- {name}")
            rows.append(dict(row=name) | compare(*sides(run), run.device, own.repeats))
        tables = {"rows": rows}
    tables |= provenance("bench", argv) | {
        "machine": machine_name(run.device), "threads": torch.get_num_threads(),
        "repeats": own.repeats, "precision": run.args.precision, "torch": torch.__version__,
        "diffusers": diffusers.__version__}
    path = own.results / f"bench-{device_name(run.device)}.json"
    write_section(path, section, tables)
    for rows in tables.values():
        if isinstance(rows, list) and rows:
            print(markdown([summary(row) if "ours" in row else row for row in rows]) + "\n")
    print(f"written: {path}, section {section!r}")


if __name__ == "__main__":
    d4ir.run_command(main)
