"""Tests: the mathematics against an independent form, the real command line on a tiny budget, every documented error.

    pytest                             # a few minutes on two cores, no GPU, no download
    pytest -m "slow or not slow"       # the slow ones too
"""
import argparse
import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import d4ir
import demo
import distill
import evaluate
import models
import prompt_adapter
import synth
from experiments import compare, weather

HERE = Path(__file__).resolve().parent
MINI = HERE / "weights" / "mini-sd"
TINY = ["--adapter-steps", "4", "--adapter-batch", "4", "--images", "6", "--steps", "2", "--distill-steps", "6", "--distill-batch", "4"]
cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
torch.set_num_threads(os.cpu_count())


def run(*arguments, **options):
    """The real command line, in its own process."""
    return subprocess.run([sys.executable, str(HERE / "d4ir.py"), *map(str, arguments)], capture_output=True, text=True, **options)


def noise(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def photo(seed, height, width):
    """A smooth random photo (3,H,W) in [0,1]."""
    return nn.functional.interpolate(noise(seed, 1, 3, 9, 9).mul(0.3).add(0.5), (height, width), mode="bicubic")[0].clamp(0, 1)


def save(image, path, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = demo.picture(image.permute(1, 2, 0).numpy()) if isinstance(image, torch.Tensor) else image
    image.save(path, **options)
    return path


def make_sd(folder, prediction_type="epsilon", **unet):
    """A Stable Diffusion 1.5 in shape, of tiny random weights, saved by diffusers."""
    from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    torch.manual_seed(0)
    tokenizer, text = demo.new_text(folder / "text")
    vae = AutoencoderKL(down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
                        block_out_channels=(8, 8, 8, 8), layers_per_block=1, latent_channels=4, norm_num_groups=2, scaling_factor=0.18215)
    settings = dict(sample_size=8, in_channels=4, out_channels=4, block_out_channels=(8, 16, 16, 16), layers_per_block=1,
                    down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",), up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
                    cross_attention_dim=128, attention_head_dim=2, norm_num_groups=2) | unet
    scheduler = PNDMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", skip_prk_steps=True,
                              set_alpha_to_one=False, steps_offset=1, prediction_type=prediction_type)
    StableDiffusionPipeline(vae=vae, text_encoder=text, unet=UNet2DConditionModel(**settings), tokenizer=tokenizer, scheduler=scheduler,
                            safety_checker=None, feature_extractor=None, requires_safety_checker=False).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session", params=["epsilon", "v_prediction"])
def sd(request, tmp_path_factory):
    return models.load_stable_diffusion(make_sd(tmp_path_factory.mktemp("sd") / request.param, request.param))


class Oracle:
    """A model that knows z_0: whatever it is asked, it predicts the exact eps or v."""

    def __init__(self, z0, prediction_type):
        from diffusers import DDIMScheduler
        scheduler = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type=prediction_type)
        self.alphas_cumprod, self.prediction_type, self.z0, self.calls = scheduler.alphas_cumprod, prediction_type, z0, 0

    def null_prompt(self, tokens):
        return torch.zeros(1, tokens, 4)

    def predict_noise(self, z_t, t, prompts):
        self.calls += 1
        z0 = self.z0.repeat(len(z_t) // len(self.z0), 1, 1, 1)
        abar = self.alphas_cumprod[t]
        eps = (z_t - abar.sqrt() * z0) / (1 - abar).sqrt()
        return eps if self.prediction_type == "epsilon" else abar.sqrt() * eps - (1 - abar).sqrt() * z0


# ---------------------------------------------------------------- DPA

def test_info_nce_is_the_double_loop():
    q, k, queue = (nn.functional.normalize(noise(i, n, 8), dim=1) for i, n in ((1, 5), (2, 5), (3, 11)))
    ignore = noise(4, 5, 11) > 1
    total = 0.0
    for i in range(5):
        positive = math.exp(float(q[i] @ k[i]) / 0.2)
        negatives = sum(math.exp(float(q[i] @ queue[j]) / 0.2) for j in range(11) if not ignore[i, j])
        total -= math.log(positive / (positive + negatives)) / 5
    assert prompt_adapter.info_nce(q, k, queue, 0.2, ignore).item() == pytest.approx(total, abs=1e-5)
    with pytest.raises(ValueError, match=r"\(5, 8\)"):
        prompt_adapter.info_nce(q, k[:3], queue, 0.2)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_diffusion_loss_is_zero_for_a_model_that_knows(prediction_type):
    z0, eps, prompts = noise(1, 3, 4, 8, 8), noise(2, 3, 4, 8, 8), noise(3, 3, 2, 4)
    oracle, t = Oracle(z0, prediction_type), torch.tensor([10, 500, 990])
    oracle.predict_noise = lambda z, t, p: Oracle.predict_noise(oracle, z, t.view(-1, 1, 1, 1), p)
    assert prompt_adapter.diffusion_loss(oracle, z0, prompts, t, eps).item() < 1e-6
    right = oracle.predict_noise
    oracle.predict_noise = lambda z, t, p: right(z, t, p) + 0.5
    abar = oracle.alphas_cumprod[t]
    variance = torch.ones(3) if prediction_type == "epsilon" else abar + (1 - abar) * z0.var()
    assert prompt_adapter.diffusion_loss(oracle, z0, prompts, t, eps).item() == pytest.approx((0.25 / variance).mean().item(), abs=1e-3)
    z0, eps = 3 * noise(1, 2, 4, 64, 64), noise(2, 2, 4, 64, 64)           # whatever the latents' scale: 1 for who knows nothing
    oracle.predict_noise = lambda z, t, p: torch.zeros_like(z)
    for t in (0, 300, 600, 999):
        assert prompt_adapter.diffusion_loss(oracle, z0, prompts, torch.tensor([t, t]), eps).item() == pytest.approx(1, rel=0.05)


def test_gradients_reach_the_adapter_and_nothing_else(sd):
    adapter = prompt_adapter.PromptAdapter(sd.width, 4, base=sd.text_prompt("a photo in heavy snow", 4))
    nn.init.normal_(adapter.to_prompts[-1].weight, std=0.01)
    latents, degraded = noise(1, 4, 4, 8, 8), torch.stack([photo(i, 64, 64) for i in range(4)])
    prompts, embedding = adapter(degraded, with_embedding=True)
    loss = prompt_adapter.diffusion_loss(sd, latents, prompts, torch.tensor([100, 300, 500, 700]), noise(3, 4, 4, 8, 8))
    (loss + prompt_adapter.info_nce(embedding, embedding.detach(), noise(4, 6, 128), 0.2)).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in adapter.parameters())
    for frozen in (sd.unet, sd.vae, sd.text_encoder):
        assert all(p.grad is None and not p.requires_grad for p in frozen.parameters())


def test_adapter_training_learns_resumes_and_leaves_the_unet_alone(sd, tmp_path):
    photos = [(photo(i, 80, 96) * 255).to(torch.uint8) for i in range(5)]
    before = [p.clone() for p in sd.unet.parameters()]

    def train(steps, checkpoint, stop=None):
        torch.manual_seed(0)
        adapter = prompt_adapter.PromptAdapter(sd.width, 4, base=sd.null_prompt(4))
        config = prompt_adapter.AdapterConfig(drop=0.3, steps=steps, batch=2, queue=8, save_every=2)
        loader = prompt_adapter.CropPairs(photos, sd, 64, 2)
        if stop:                                           # killed after `stop` updates
            rest, count = sd.predict_noise, iter(range(stop))
            def mortal(*a):
                if next(count, None) is None:
                    raise KeyboardInterrupt
                return rest(*a)
            sd.predict_noise = mortal
            try:
                with pytest.raises(KeyboardInterrupt):
                    prompt_adapter.train_adapter(adapter, sd, loader, config, checkpoint=checkpoint)
            finally:
                del sd.predict_noise
        else:
            prompt_adapter.train_adapter(adapter, sd, loader, config, checkpoint=checkpoint)
        return adapter.state_dict()

    whole = train(6, None)
    train(6, tmp_path / "a.pt", stop=5)
    resumed = train(6, tmp_path / "a.pt")
    assert all(torch.allclose(whole[k], resumed[k], atol=1e-6) for k in whole)
    assert torch.equal(whole["base"], sd.null_prompt(4)) and whole["to_prompts.3.weight"].abs().sum() > 0
    assert all(torch.equal(a, b) for a, b in zip(before, sd.unet.parameters()))
    for loader, settings, said in (([], {}, "empty"), (photos, {"batch": 1}, "batch"), (photos, {"queue": 2}, "queue"), (photos, {"t_max": 1.5}, "t_max"),
                                   (photos, {"temperature": 0.0}, "temperature")):
        with pytest.raises(ValueError, match=said):
            prompt_adapter.train_adapter(prompt_adapter.PromptAdapter(sd.width, 4), sd, loader, prompt_adapter.AdapterConfig(**settings))


def test_the_prompt_of_crop_a_comes_from_crop_b(sd):
    class Spy(prompt_adapter.PromptAdapter):
        def forward(self, x, with_embedding=False):
            seen.append(x.clone())
            return super().forward(x, with_embedding)
    a, b = photo(1, 64, 64).expand(2, 3, 64, 64), photo(2, 64, 64).expand(2, 3, 64, 64)
    batch = (noise(0, 2, 4, 8, 8), a, b, torch.tensor([0, 1]))
    for cross in (True, False):
        seen = []
        config = prompt_adapter.AdapterConfig(steps=1, batch=2, queue=4, cross_crop=cross, jitter=0)
        prompt_adapter.train_adapter(Spy(sd.width, 4), sd, [batch], config)
        from_b, from_a = (sum(torch.equal(x, crop) for x in seen) for crop in (b, a))
        assert (from_b, from_a) == (1, 1)
        assert torch.equal(seen[0], b if cross else a)     # the prompt's first, then the key's


def test_jitter_changes_the_tone_and_keeps_the_rest():
    x = 0.3 + 0.4 * torch.stack([photo(i, 32, 40) for i in range(16)])
    made = lambda amount: prompt_adapter.jitter(x, amount, torch.Generator().manual_seed(0))
    assert torch.equal(made(0), x) and torch.equal(made(0.4), made(0.4))
    y = made(0.4)
    assert y.shape == x.shape and y.min() >= 0 and y.max() <= 1
    assert 0.05 < (y - x).mean((2, 3)).std() < 0.2 and 0.1 < (y.std((2, 3)) / x.std((2, 3))).std() < 0.4
    for before, after in zip(x.flatten(0, 1), y.flatten(0, 1)):
        assert torch.corrcoef(torch.stack([before.flatten(), after.flatten()]))[0, 1] > 0.9


def test_prompts_start_at_the_caption_and_keep_its_mean():
    base, photos = noise(0, 1, 4, 32), torch.stack([photo(i, 48, 48) for i in range(8)])
    adapter = prompt_adapter.PromptAdapter(32, 4, base=base)
    assert torch.allclose(adapter(photos), base.expand(8, -1, -1))
    nn.init.normal_(adapter.to_prompts[-1].weight, std=0.1)
    for _ in range(100):
        prompts = adapter(photos)
    assert torch.allclose(prompts.mean(0, keepdim=True), base, atol=1e-4) and prompts.std(0).mean() > 0.1
    adapter.eval()                                         # by then it knows the mean
    assert torch.allclose(adapter(photos).mean(0, keepdim=True), base, atol=1e-2)
    assert torch.allclose(adapter(photos)[:1], adapter(photos[:1]), atol=1e-4)
    with pytest.raises(ValueError, match=r"must be \(1, 4, 32\)"):
        prompt_adapter.PromptAdapter(32, 4, base=noise(0, 3, 4, 32))


def test_adapter_file(tmp_path):
    adapter = prompt_adapter.PromptAdapter(32, 4, base=noise(0, 1, 4, 32))
    nn.init.normal_(adapter.to_prompts[-1].weight)
    adapter(torch.stack([photo(i, 48, 48) for i in range(4)]))     # a mean and a deviation of its own
    adapter.eval()
    prompt_adapter.save_adapter(adapter, tmp_path / "a.safetensors")
    x = photo(1, 50, 70)[None]
    assert torch.equal(prompt_adapter.load_adapter(tmp_path / "a.safetensors")(x), adapter(x))
    assert adapter(x).shape == (1, 4, 32)
    (tmp_path / "b").write_bytes(b"no")
    with pytest.raises(ValueError, match="not an adapter"):
        prompt_adapter.load_adapter(tmp_path / "b")


# ---------------------------------------------------------------- CCD

def test_perturb_has_the_variance_of_the_closed_form():
    oracle = Oracle(None, "epsilon")
    for start in (1, 400, 1000):
        z = synth.perturb(torch.full((1, 1, 500, 500), 2.0), noise(start, 1, 1, 500, 500), oracle, start)
        abar = float(oracle.alphas_cumprod[start - 1])
        assert z.mean().item() == pytest.approx(2 * math.sqrt(abar), abs=0.01)
        assert z.var().item() == pytest.approx(1 - abar, rel=0.02, abs=1e-5)


@pytest.mark.parametrize("scheduler", list(synth.SCHEDULERS))
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_denoise_makes_exactly_the_steps_and_finds_what_the_model_knows(scheduler, prediction_type):
    z0 = noise(1, 2, 4, 8, 8)
    for strength in (0.05, 0.37, 0.6, 1.0):
        for steps, guidance in ((1, 1), (4, 2.0), (7, 1), (20, 3.0)):
            oracle = Oracle(z0, prediction_type)
            start = synth.start_timestep(oracle, strength, steps)
            z = synth.perturb(z0, noise(2, 2, 4, 8, 8), oracle, start)
            out = synth.denoise(z, noise(3, 2, 3, 4), oracle, start, steps=steps, guidance=guidance, scheduler=scheduler)
            assert oracle.calls == steps
            assert (out - z0).abs().max() < 1e-3, (strength, steps)


def test_guidance_and_its_interval():
    """With a null prompt that predicts 0 and a prompt that predicts 1, guidance w predicts w."""
    oracle = Oracle(noise(1, 1, 4, 4, 4), "epsilon")
    sizes = []
    oracle.predict_noise = lambda z, t, p: sizes.append(len(z)) or p.mean((1, 2)).view(-1, 1, 1, 1).expand_as(z)
    z, prompts = noise(2, 1, 4, 4, 4), torch.ones(1, 2, 4)
    guided = synth.denoise(z, prompts, oracle, 600, steps=1, guidance=3.0, scheduler="ddim")
    plain = synth.denoise(z, 3 * prompts, oracle, 600, steps=1, guidance=1, scheduler="ddim")
    assert torch.allclose(guided, plain, atol=1e-5) and sizes == [2, 1]
    away = synth.denoise(z, prompts, oracle, 600, steps=1, guidance=3.0, negative=prompts[:, :1] * 2, scheduler="ddim")
    assert torch.allclose(away, synth.denoise(z, -prompts, oracle, 600, steps=1, scheduler="ddim"), atol=1e-5)
    sizes.clear()
    synth.denoise(z, prompts, oracle, 1000, steps=10, guidance=3.0, interval=(0.3, 0.7), scheduler="dpm")
    assert sizes == [1, 1, 1, 2, 2, 2, 2, 1, 1, 1]


def test_synthesize_is_repeatable_and_says_what_does_not_fit(sd):
    clean, prompts = photo(1, 64, 72).expand(2, 3, 64, 72), noise(2, 2, 4, sd.width)
    go = lambda seed, **more: synth.synthesize(clean, prompts, sd, steps=2, generator=torch.Generator().manual_seed(seed),
                                               **{"strength": 0.5, "guidance": 2.0} | more)
    one = go(1)
    assert one.shape == clean.shape and one.min() >= 0 and one.max() <= 1
    assert torch.equal(one, go(1)) and not torch.equal(one, go(2))
    assert not torch.equal(one, go(1, anchor=False)) and not torch.equal(one, go(1, negative_prompt=""))
    for wrong, message in (({"strength": 0.0}, "strength"), ({"strength": 1.1}, "1.1"), ({"scheduler": "euler"}, "ddim"),
                           ({"strength": 0.001}, "steps must lie in 1..1")):
        with pytest.raises(ValueError, match=message):
            go(1, **wrong)
    with pytest.raises(ValueError, match="2 clean photos but 1 prompts"):
        synth.synthesize(clean, prompts[:1], sd, strength=0.5, steps=2)


def test_the_anchor_keeps_content_and_lets_haze_fade_it(sd):
    """A prompt that asks for no weather gives the clean photo back; where contrast goes, fine content goes with it."""
    clean = photo(1, 64, 72)[None]
    go = lambda **more: synth.synthesize(clean, sd.text_prompt("a photo in clear weather", 4), sd, strength=0.8, steps=2,
                                         guidance=3.0, **more)
    assert torch.allclose(go(), clean, atol=1e-4) and not torch.allclose(go(anchor=False), clean, atol=0.2)
    assert torch.allclose(go(veil=True, anchor=False), clean, atol=1e-4)
    plain = noise(1, 2, 3, 40, 48).sigmoid()
    for found, true in zip(synth.local_fit(plain, 0.4 * plain + 0.5), (0.4, 0.5)):
        assert torch.allclose(found, torch.tensor(true), atol=0.02)


def test_a_veil_has_no_shape_of_its_own(sd, monkeypatch):
    """What the U-Net shows in haze and the clean photo has not does not get through; even haze does, exactly."""
    clean, hazy = photo(1, 64, 72)[None], lambda x: 0.4 * x + 0.5
    made_up = hazy(clean) + 0.2 * (torch.rand(1, 1, 64, 72, generator=torch.Generator().manual_seed(0)) - 0.5)

    def go(image, **more):
        images = iter([image, clean])                      # D(z_w), D(z_-)
        monkeypatch.setattr(type(sd), "decode", lambda self, z: next(images))
        return synth.synthesize(clean, sd.null_prompt(4), sd, strength=0.5, steps=1, **more)

    off = lambda x: (x - hazy(clean)).abs().mean()
    assert off(go(hazy(clean), veil=True)) < 0.01 and off(go(made_up)) > 0.04 and off(go(made_up, veil=True)) < 0.02


def test_a_veil_starts_as_bright_as_the_degraded_photo(sd, monkeypatch):
    clean, encode, seen = 0.3 * photo(1, 64, 72)[None], type(sd).encode, []
    monkeypatch.setattr(type(sd), "encode", lambda self, x: (seen.append(x.mean().item()), encode(self, x))[1])
    go = lambda **more: synth.synthesize(clean, sd.null_prompt(4), sd, strength=0.5, steps=2, brightness=torch.tensor([0.6]),
                                         generator=torch.Generator().manual_seed(0), **more)
    veiled, own = go(veil=True), clean.mean().item()
    assert seen == pytest.approx([own, 0.6], abs=1e-3) and veiled.shape == clean.shape
    seen.clear()
    go()
    assert seen == pytest.approx([own])                    # rain and snow leave the light as it is


def test_a_task_has_its_own_defaults():
    of = lambda *flags: (lambda args: (args.veil, args.guidance))(d4ir.parse(["--task", *flags]))
    assert of("dehaze") == (True, 8.0) and of("desnow") == of("all") == (False, synth.SynthConfig.guidance)
    assert of("dehaze", "--no-veil", "--guidance", "2") == (False, 2.0)


def test_a_cpu_without_bf16_works_in_fp32(monkeypatch):
    for able, given, precision in ((True, [], "bf16"), (False, [], "fp32"), (False, ["--precision", "bf16"], "bf16")):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": able}, raising=False)
        run = d4ir.Run(d4ir.parse(["--task", "desnow", "--device", "cpu", *given]))
        assert run.args.precision == precision == run.settings()["adapter"]["precision"]


def test_synthesize_folder_goes_on_where_it_was(sd, tmp_path):
    photos = [(photo(i, 70, 90) * 255).to(torch.uint8) for i in range(3)]
    adapter = prompt_adapter.PromptAdapter(sd.width, 4).eval()
    config = synth.SynthConfig(images=5, batch=2, steps=2)
    synth.synthesize_folder(photos, photos, adapter, sd, config, tmp_path)
    files = sorted(tmp_path.iterdir())
    before = [f.read_bytes() for f in files]
    assert [f.name for f in files] == [f"00000{i}.png" for i in range(5)]
    files[3].unlink()
    files[0].write_bytes(before[1])                        # finished work is not done again
    synth.synthesize_folder(photos, photos, adapter, sd, config, tmp_path)
    assert [f.read_bytes() for f in files] == [before[1], *before[1:]]


def test_the_prompts_work_in_stock_diffusers():
    from diffusers import StableDiffusionImg2ImgPipeline
    pipe = StableDiffusionImg2ImgPipeline.from_pretrained(MINI, safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    sd = models.load_stable_diffusion(MINI)
    adapter = prompt_adapter.PromptAdapter(sd.width, 8, base=sd.text_prompt("a photo in heavy snow", 8)).eval()
    x = photo(1, 96, 96)[None]
    with torch.no_grad():
        prompts = adapter(x)
    out = pipe(prompt_embeds=prompts, image=x, strength=0.6, guidance_scale=2.0, num_inference_steps=5, output_type="pt",
               generator=torch.Generator().manual_seed(0)).images
    assert out.shape == x.shape and torch.isfinite(out).all() and out.std() > 0.01
    # the same null prompt as the pipeline's own
    null = pipe.encode_prompt(None, "cpu", 1, True, prompt_embeds=prompts)[1]
    assert torch.allclose(null.float(), sd.null_prompt(prompts.shape[1]), atol=2e-3)


# ---------------------------------------------------------------- PKD

def test_distillation_learns_the_teacher_and_resumes(tmp_path):
    class Darker(nn.Module):
        def forward(self, x):
            return x * 0.7
    images = [(photo(i, 40, 48) * 255).to(torch.uint8) for i in range(4)]
    config = distill.DistillConfig(steps=40, batch=4, save_every=10)

    def train(checkpoint=None, steps=40, keep=True):
        torch.manual_seed(0)
        student = models.Restorer(8, (1, 1), 1, (1, 1))
        targets = distill.teacher_outputs(Darker(), images, "cpu") if keep else None
        loader = distill.Crops(images, 24, 4, targets)
        config.steps = steps
        loss = distill.distill(Darker(), student, loader, config, checkpoint=checkpoint)
        return student, loss

    student, loss = train()
    x = photo(9, 32, 32)[None]
    assert (student(x) - 0.7 * x).abs().mean() < 0.5 * (0.3 * x).abs().mean() and loss < 0.1
    online, _ = train(keep=False)
    assert torch.allclose(student(x), online(x), atol=2e-2)
    # killed after 20 of 40: the checkpoint of an interrupted run
    class Mortal(distill.Crops):
        def __iter__(self):
            for i, batch in enumerate(super().__iter__()):
                if i == 25:
                    raise KeyboardInterrupt
                yield batch
    torch.manual_seed(0)
    with pytest.raises(KeyboardInterrupt):
        distill.distill(None, models.Restorer(8, (1, 1), 1, (1, 1)), Mortal(images, 24, 4, distill.teacher_outputs(Darker(), images, "cpu")),
                        config, checkpoint=tmp_path / "s.pt")
    resumed, _ = train(tmp_path / "s.pt")
    assert torch.allclose(student(x), resumed(x), atol=1e-5)
    if os.name != "nt":                                    # a file that finds no room
        import resource
        checkpoint, limits = (tmp_path / "s.pt").read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(checkpoint) // 2, limits[1]))
        try:
            with pytest.raises(OSError):
                train(tmp_path / "s.pt", steps=60)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert (tmp_path / "s.pt").read_bytes() == checkpoint
    with pytest.raises(ValueError, match="empty"):
        distill.distill(Darker(), student, [], config)


# ---------------------------------------------------------------- models

def test_restorer_takes_any_size_and_starts_as_the_identity(tmp_path):
    torch.manual_seed(0)
    model = models.Restorer(8)
    for height, width in ((64, 64), (37, 51), (5, 9), (1, 1)):
        x = torch.rand(2, 3, height, width)
        assert torch.equal(model(x), x)
    nn.init.normal_(model.ending.weight, std=0.1)
    models.save_restorer(model, tmp_path / "m.safetensors")
    again = models.load_restorer(tmp_path / "m.safetensors")
    assert torch.allclose(model.half().float()(x), again(x), atol=1e-4) and again.config == model.config
    assert not any(p.requires_grad for p in again.parameters()) and not list(tmp_path.glob("*.tmp"))
    with pytest.raises(ValueError, match="levels"):
        models.Restorer(8, (1, 1), 1, (1,))


def test_channel_attention_of_a_trained_network_is_local():
    x, window = noise(0, 1, 2, 9, 12), 5
    plain = torch.empty_like(x)
    for i in range(9):
        for j in range(12):
            plain[..., i, j] = x[..., max(0, i - 2):i + 3, max(0, j - 2):j + 3].mean((-1, -2))
    assert torch.allclose(models.local_mean(x, window), plain, atol=1e-6)
    torch.manual_seed(0)
    model = models.Restorer(4, window=16).eval()
    nn.init.normal_(model.ending.weight, std=0.1)
    a = noise(1, 1, 3, 256, 32)
    b = a.clone()
    b[..., 224:, :] += 1                                   # what is far away changes nothing
    assert torch.allclose(model(a)[..., :32, :], model(b)[..., :32, :], atol=1e-6)
    assert not torch.allclose(model.train()(a)[..., :32, :], model(b)[..., :32, :], atol=1e-6)


NETWORK = """
import sys
import torch
from torch import nn
sys.path.insert(0, "/nowhere")
class Net(nn.Module):
    def __init__(self, width=4, outputs=1):
        super().__init__()
        self.body = nn.Conv2d(3, width, 3, padding=1)
        self.tail = nn.Conv2d(width, 3, 3, padding=1)
        self.outputs = outputs
    def forward(self, x):
        y = x + self.tail(self.body(x))
        return [y, None] if self.outputs == 2 else y
class Halving(Net):
    def forward(self, x):
        y = nn.functional.avg_pool2d(x, 4)
        return nn.functional.interpolate(y, scale_factor=4)
class Smaller(Net):
    def forward(self, x):
        return x[..., 1:]
class Fourier(Net):
    def forward(self, x):                                  # what knows no bf16, as cuFFT
        if self.body(x).dtype is not torch.float32:
            raise RuntimeError("Unsupported dtype")
        return x
def make(width):
    return Net(width)
def number():
    return 3
"""


@pytest.fixture
def network(tmp_path):
    (tmp_path / "net.py").write_text(NETWORK)
    scope = {}
    exec(NETWORK, scope)
    torch.manual_seed(0)
    return scope["Net"](4), tmp_path


@pytest.mark.parametrize("wrap", [lambda s: s, lambda s: {"params": s}, lambda s: {"state_dict": s, "epoch": 3}, lambda s: {"model": s},
                                  lambda s: {"params_ema": s, "params": {}}, lambda s: {f"module.{k}": v for k, v in s.items()},
                                  lambda s: {"state_dict": {f"net.{k}": v for k, v in s.items()} | {"loss.weight": torch.ones(1)}}])
@pytest.mark.parametrize("ending", ["pth", "ckpt", "safetensors"])
def test_teachers_of_others(network, wrap, ending):
    model, folder = network
    path, state = folder / f"w.{ending}", wrap(model.state_dict())
    if ending == "safetensors":
        from safetensors.torch import save_file
        if not all(isinstance(v, torch.Tensor) for v in state.values()):
            pytest.skip("safetensors holds tensors alone")
        save_file(state, path)
    else:
        torch.save(state, path)
    x = photo(1, 21, 34)[None]
    where, mine = list(sys.path), dict(sys.modules)
    (folder / "demo.py").write_text("theirs = 1")
    (folder / "net.py").write_text("import demo\nassert demo.theirs\n" + NETWORK)
    for spec in ("Net", "Net(width=4, outputs=2)", "make(width=4)"):
        assert torch.allclose(models.load_restorer(f"{folder}/net.py:{spec}@{path}")(x), model(x), atol=1e-6)
    assert sys.path == where and all(sys.modules[name] is mine[name] for name in ("demo", "models", "evaluate"))


def test_teachers_that_cannot_be_used(network):
    model, folder = network
    weights, spec = folder / "w.pth", lambda name, file="w.pth": f"{folder}/net.py:{name}@{folder}/{file}"
    torch.save(model.state_dict(), weights)
    torch.save({"state_dict": model.state_dict(), "args": argparse.Namespace(lr=1)}, folder / "code.pth")
    torch.save({"a": 1}, folder / "none.pth")
    (folder / "rubbish.pth").write_bytes(b"rubbish")
    (folder / "rubbish.safetensors").write_bytes(b"rubbish")
    (folder / "broken.py").write_text("import nothing_of_this_name")
    for bad, message in ((spec("Net", "code.pth"), "refused"), (spec("Net", "none.pth"), "no state_dict"), (spec("Net", "no.pth"), "no such file"),
                         (spec("Net", "rubbish.pth"), "not a readable"), (spec("Net", "rubbish.safetensors"), "not a readable"),
                         (spec("Absent"), "Absent"), (spec("Net(4)"), "keyword literals"), (spec("Net(width=print())"), "keyword literals"),
                         (spec("Net(width=5)"), r"shapes differ, such as body.weight is \(4, 3, 3, 3\)"), (spec("number"), "not an nn.Module"),
                         (f"{folder}/broken.py:Net@{weights}", "nothing_of_this_name"), (f"{folder}/no.py:Net@{weights}", "no such file"),
                         (f"{folder}/rubbish.safetensors", "not a readable"), (f"{folder}/absent.safetensors", "no such file")):
        with pytest.raises(ValueError, match=message):
            models.load_restorer(bad)
    torch.save({"body.weight": model.body.weight, "extra": torch.ones(1)}, weights)
    with pytest.raises(ValueError, match="3 keys are missing, such as body.bias.*1 keys are unexpected, such as extra"):
        models.load_restorer(spec("Net"))
    from safetensors.torch import save_file
    save_file(dict(model.state_dict()), folder / "foreign.safetensors")
    with pytest.raises(ValueError, match="FILE.py:NAME@WEIGHTS"):
        models.load_restorer(folder / "foreign.safetensors")


def test_teacher_multiple_and_shape(network):
    model, folder = network
    torch.save(model.state_dict(), folder / "w.pth")
    x = photo(1, 22, 35)[None]
    with pytest.raises(ValueError, match="teacher-multiple"):
        models.load_restorer(f"{folder}/net.py:Halving@{folder}/w.pth")(x)
    assert models.load_restorer(f"{folder}/net.py:Halving@{folder}/w.pth", multiple=4)(x).shape == x.shape
    with pytest.raises(ValueError, match=r"turns \(1, 3, 22, 35\) into \(1, 3, 22, 34\)"):
        models.load_restorer(f"{folder}/net.py:Smaller@{folder}/w.pth")(x)


def test_stable_diffusion_has_its_own_scale_and_prompts(sd):
    assert (sd.factor, sd.size, sd.width) == (8, 64, 128)
    x = photo(1, 64, 72)[None]
    z = sd.encode(x)
    assert z.shape == (1, 4, 8, 9)
    assert torch.allclose(z, sd.vae.encode(x * 2 - 1).latent_dist.mean * 0.18215, atol=1e-5)
    assert torch.allclose(sd.decode(z), (sd.vae.decode(z / 0.18215).sample / 2 + 0.5).clamp(0, 1), atol=1e-5)
    assert torch.allclose(sd.null_prompt(5), sd.null_prompt()[:, :5], atol=1e-5)       # CLIP is causal
    with pytest.raises(ValueError, match="2 to 32 tokens, not 33"):
        sd.null_prompt(33)
    with pytest.raises(ValueError, match="multiples of 8"):
        sd.encode(x[..., :63])


def test_what_is_no_stable_diffusion_is_refused(tmp_path):
    for folder, message in ((tmp_path, "unet can't be loaded"), (make_sd(tmp_path / "inpaint", in_channels=9), "inpainting"),
                            (make_sd(tmp_path / "wide", cross_attention_dim=64), "text encoder"), (make_sd(tmp_path / "x0", "sample"), "'sample'"),
                            (make_sd(tmp_path / "xl", addition_embed_type="text_time", addition_time_embed_dim=8,
                                     projection_class_embeddings_input_dim=64), "SDXL")):
        with pytest.raises(ValueError, match=message):
            models.load_stable_diffusion(folder)


# ---------------------------------------------------------------- evaluation

def test_psnr():
    a = torch.full((3, 16, 16), 100 / 255)
    assert evaluate.psnr(a, a + 10 / 255) == pytest.approx(10 * math.log10(255 ** 2 / 100), abs=1e-6)
    assert evaluate.psnr(a, a + 0.4 / 255) == math.inf                      # rounded, as a saved PNG would be
    assert evaluate.psnr(a + 1, a * 0 + 1) == math.inf                      # clamped
    two = torch.stack([a + 10 / 255, a + 1 / 255])
    assert evaluate.psnr(two, torch.stack([a, a])) == pytest.approx((28.1308 + 48.1308) / 2, abs=1e-3)
    with pytest.raises(ValueError, match=r"\(3, 16, 16\) and \(3, 16, 8\)"):
        evaluate.psnr(a, a[..., :8])


def test_rgb_to_y_is_matlabs():
    colours = torch.tensor([[0., 0, 0], [1, 1, 1], [1, 0, 0], [0, 1, 0], [0, 0, 1]]).T.reshape(3, 1, 5)
    assert torch.allclose(evaluate.rgb_to_y(colours).flatten() * 255, torch.tensor([16, 235, 81.481, 144.553, 40.966]), atol=1e-3)


def test_ssim_is_a_plain_sliding_window():
    a, b = (evaluate.levels(photo(i, 17, 14)).numpy().astype(float) for i in (1, 2))
    ramp = np.arange(-5, 6)
    window = np.exp(-(ramp[:, None] ** 2 + ramp[None] ** 2) / (2 * 1.5 ** 2))
    window /= window.sum()
    values = []
    for c in range(3):
        for y in range(7):
            for x in range(4):
                p, q = a[c, y:y + 11, x:x + 11], b[c, y:y + 11, x:x + 11]
                mp, mq = (window * p).sum(), (window * q).sum()
                vp, vq, vpq = (window * (p - mp) ** 2).sum(), (window * (q - mq) ** 2).sum(), (window * (p - mp) * (q - mq)).sum()
                values.append((2 * mp * mq + 6.5025) * (2 * vpq + 58.5225) / ((mp ** 2 + mq ** 2 + 6.5025) * (vp + vq + 58.5225)))
    assert evaluate.ssim(*(torch.tensor(x / 255) for x in (a, b))) == pytest.approx(np.mean(values), abs=1e-7)
    with pytest.raises(ValueError, match="11x11"):
        evaluate.ssim(torch.rand(3, 10, 20), torch.rand(3, 10, 20))


def golden_pair(height, width):
    """Two pictures that any language can make: waves, and the same with a grid of dots."""
    y, x = np.mgrid[:height, :width]
    a = np.stack([127 + 90 * np.sin(x / 7 + c) * np.cos(y / 11 - c) for c in range(3)], -1).round()
    b = np.clip(a + 40 * ((x * 7 + y * 13) % 17 == 0)[..., None] + 5, 0, 255)
    return a.astype(np.uint8), b.astype(np.uint8)


# Computed once with scikit-image 0.26.0 on a, b = golden_pair(height, width):
#   peak_signal_noise_ratio(a, b, data_range=255)
#   structural_similarity(a, b, channel_axis=-1, data_range=255, gaussian_weights=True, sigma=1.5, use_sample_covariance=False)
# and on Y = a.astype(float) @ (65.481, 128.553, 24.966) / 255 + 16 in the same way, without channel_axis.
GOLDEN = {(64, 96): [26.59646, 0.74930, 27.91990, 0.70724], (37, 53): [26.58406, 0.74918, 27.90947, 0.70144]}


@pytest.mark.parametrize("size", GOLDEN)
def test_golden_values_of_scikit_image(size):
    a, b = (torch.from_numpy(image).movedim(-1, 0) / 255 for image in golden_pair(*size))
    found = evaluate.measure(b, a)
    assert [found[k] for k in evaluate.METRICS] == pytest.approx(GOLDEN[size], abs=2e-5)


LAYOUTS = {
    "Rain100L": (["input/1.png", "input/2.png", "input/10.png"], ["target/1.png", "target/2.png", "target/10.png"]),
    "PReNet": (["rainy/rain-001.png", "rainy/rain-002.png"], ["norain-001.png", "norain-002.png"]),
    "RCDNet": (["rain/rain-001.png", "rain/rain-002.png"], ["norain/norain-001.png", "norain/norain-002.png"]),
    "RCDNet, same names": (["rain/1.png"], ["norain/1.png"]),
    "rainy and gt": (["rainy/rain-100.png"], ["gt/norain-100.png"]),
    "SOTS": (["input/0001_0.8_0.2.jpg", "input/0001_1_0.1.jpg", "input/0002_0.8_0.08.jpg"], ["target/0001.png", "target/0001.png", "target/0002.png"]),
    "SOTS archive": (["outdoor/hazy/0001_0.8_0.2.JPG"], ["outdoor/clear/0001.png"]),
    "SOTS gt": (["hazy/1400_1.png", "hazy/1400_2.png"], ["gt/1400.png", "gt/1400.png"]),
    "GT and IN": (["IN/a.png"], ["GT/a.png"]),
    "GT and hazy": (["hazy/a.png"], ["GT/a.png"]),
    "Snow100K": (["Snow100K-S/synthetic/x_1.jpg", "Snow100K-S/synthetic/x_2.jpg"], ["Snow100K-S/gt/x_1.jpg", "Snow100K-S/gt/x_2.jpg"]),
    "Snow100K, other endings": (["Snow/a_1.tif", "Snow/b_1.TIF"], ["Gt/a_1.bmp", "Gt/b_1.webp"]),
    "generic": (["LQ/a.jpeg"], ["GT/a.PNG"]),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_are_found_from_the_root_and_from_inside(layout, tmp_path):
    root, (inputs, truths) = tmp_path / "set", LAYOUTS[layout]
    image = photo(0, 12, 12)
    for name in inputs + truths:
        save(image, root / name)
    (root / inputs[0]).with_name("._junk.png").write_text("x")
    if layout == "Snow100K":
        save(image, root / "Snow100K-S/mask/x_1.jpg")
    expected = [(root / a, root / b) for a, b in zip(inputs, truths)]
    for start in (root, (root / inputs[0]).parent, (root / truths[0]).parent):
        assert [(p.degraded, p.truth) for p in evaluate.find_pairs(start)] == expected


def test_ambiguous_and_unmatched_sets_are_refused(tmp_path, monkeypatch):
    image = photo(0, 12, 12)
    def make(name, *files):
        for file in files:
            save(image, tmp_path / name / file)
        return tmp_path / name
    empty = tmp_path / "e"
    empty.mkdir()
    for folder, message in ((make("a", "input/1.png", "input/2.png", "target/1.png"), r"without truth: 2.png \(1\)"),
                            (make("b", "input/1.png", "target/1.png", "target/2.png"), r"without degraded photo: 2.png \(1\)"),
                            (make("c", "input/1.png", "rain/1.png", "gt/1.png"), "which belong together.*input, rain"),
                            (make("d", "input/1.png", "gt/1.png", "gt/1.jpg"), "1.jpg and 1.png could each"),
                            (empty, "no image file"), (tmp_path / "absent", "no such folder")):
        with pytest.raises(ValueError, match=message):
            evaluate.find_pairs(folder)
    assert evaluate.find_pairs(make("f", "1.png")) == []                    # photos without ground truth
    web = make("web", "snow/1.png", "rain/1.png", "haze/1.png", "clean/1.png")
    assert evaluate.find_pairs(web / "snow") == []
    monkeypatch.chdir(make("h", "input/1.png", "gt/1.png"))
    assert [p.set for p in evaluate.find_pairs(".")] == ["h"]
    both = make("g", "S/input/1.png", "S/target/1.png", "L/input/1.png", "L/target/1.png")
    assert sorted(p.set for p in evaluate.find_pairs(both)) == ["L", "S"]


def test_a_larger_truth_is_centre_cropped_and_another_size_refused(tmp_path):
    truth = photo(0, 24, 30)
    save(truth, tmp_path / "gt/1.png")
    save(truth[:, 2:22, 5:25], tmp_path / "hazy/1_1.png")
    (pair,) = evaluate.find_pairs(tmp_path)
    result = evaluate.evaluate(None, [pair])
    assert result["psnr_rgb"] == math.inf and result["cropped"] == 1
    save(truth[:, :, :20], tmp_path / "gt/1.png")
    save(truth, tmp_path / "hazy/1_1.png")
    with pytest.raises(ValueError, match=r"\(24, 30\) px and its truth .* \(24, 20\)"):
        evaluate.evaluate(None, evaluate.find_pairs(tmp_path))
    with pytest.raises(ValueError, match="no pairs"):
        evaluate.evaluate(None, [])


def test_photos_of_every_kind_are_read(tmp_path):
    rgb = demo.picture(photo(0, 20, 30).permute(1, 2, 0).numpy())
    expected = torch.from_numpy(np.array(rgb)).movedim(-1, 0)
    for mode, name in (("RGB", "a.png"), ("RGBA", "b.png"), ("P", "c.png"), ("L", "d.png"), ("CMYK", "e.tif"), ("1", "f.png"), ("LA", "g.png")):
        read = evaluate.read_image(save(rgb.convert(mode), tmp_path / name))
        assert read.dtype == torch.uint8 and read.shape == (3, 20, 30)
        if mode in ("RGB", "RGBA", "CMYK"):
            assert torch.equal(read, expected)
    deep = np.asarray(rgb.convert("L")).astype(np.uint16) * 257
    assert (evaluate.read_image(save(Image.fromarray(deep), tmp_path / "h.png"))[0].numpy() == deep // 257).all()
    exif = Image.Exif()
    exif[0x0112] = 6                                       # to be turned by 90 degrees
    assert evaluate.read_image(save(rgb, tmp_path / "i.jpg", exif=exif)).shape == (3, 30, 20)
    exif[0x011a] = 72.0                                    # its resolution, then called a text: Pillow raises TypeError
    broken = exif.tobytes().replace(b"\x01\x1a\x00\x05", b"\x01\x1a\x00\x02").replace(b"\x1a\x01\x05\x00", b"\x1a\x01\x02\x00")
    broken = save(rgb, tmp_path / "m.jpg", exif=broken).read_bytes()
    for name, data in (("j.png", b""), ("k.jpg", b"rubbish"), ("l.png", (tmp_path / "a.png").read_bytes()[:60]), ("m.jpg", broken)):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(ValueError, match=f"{name}: not a readable image"):
            evaluate.read_image(tmp_path / name)
    save(rgb, tmp_path / "inside/.thumbnails/a.png")
    save(rgb, tmp_path / "inside/b/10.png")
    save(rgb, tmp_path / "inside/b/2.png")
    assert [p.name for p in evaluate.list_images(tmp_path / "inside", recursive=True)] == ["2.png", "10.png"]


def test_tiles_cover_a_photo_with_weights_that_fade():
    for length, tile, overlap in ((100, 30, 8), (1000, 512, 64), (513, 512, 64), (30, 30, 8), (7, 30, 8)):
        total = torch.zeros(length)
        for start, end, fade in evaluate.spans(length, tile, overlap):
            assert end <= length and fade.min() > 0
            total[start:end] += fade
        assert total.min() > 0.5
    x = photo(1, 90, 130)
    assert torch.allclose(evaluate.restore(models.Restorer(4), x, tile=48, overlap=16), x, atol=1e-5)      # the identity


@pytest.mark.parametrize("kind", demo.KINDS)
def test_tiled_and_whole_agree_on_a_large_photo(kind):
    teacher = models.load_restorer(HERE / "weights" / "teacher.safetensors")
    rng = np.random.default_rng(5)
    image, depth = demo.scene(rng, 1024, 1024)
    degraded, _ = demo.add_weather(image, depth, kind, demo.ORIGINAL, rng)
    x, truth = (torch.from_numpy(a).permute(2, 0, 1) for a in (degraded, image))
    whole, tiled = (evaluate.restore(teacher, x, tile) for tile in (0, 512))
    assert abs(evaluate.psnr(whole, truth) - evaluate.psnr(tiled, truth)) < 0.05


def test_cost():
    net = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 3, 1)).requires_grad_(False)
    found = evaluate.cost(net, 64)
    assert found["params"] == 3 * 16 * 9 + 16 + 16 * 3 + 3
    assert found["gmacs"] == pytest.approx(64 * 64 * (3 * 16 * 9 + 16 * 3) / 1e9)
    assert found["peak_mb"] == pytest.approx((64 * 64 * (3 + 16 + 3) + found["params"]) * 4 / 2 ** 20, rel=0.01)
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.p = nn.Parameter(torch.ones(1))
        def forward(self, x):
            q = x.flatten(2).mT[:, None]
            return nn.functional.scaled_dot_product_attention(q, q, q)
    assert evaluate.cost(Attention(), 16)["gmacs"] == pytest.approx(2 * 256 * 256 * 3 / 1e9)


# ---------------------------------------------------------------- the demo

def test_scenes_and_weather():
    one, two = (demo.scene(np.random.default_rng(3), 64, 80) for _ in range(2))
    assert all(np.array_equal(a, b) for a, b in zip(one, two))
    image, depth = one
    assert image.shape == (64, 80, 3) and depth.shape == (64, 80) and 0 <= image.min() and image.max() <= 1 and depth.min() > 0
    clean = demo.Weather(beta=(0.01, 0.01), airlight=(0.9, 0.9), tint=0)
    hazy, words = demo.add_weather(image, depth, "haze", clean, np.random.default_rng(0))
    t = np.exp(-0.01 * depth)[..., None]
    assert np.allclose(hazy, image * t + 0.9 * (1 - t), atol=1e-5)         # Koschmieder
    for kind in ("rain", "snow"):
        for weather in demo.DOMAINS.values():
            made, words = demo.add_weather(image, depth, kind, weather, np.random.default_rng(1))
            assert made.shape == image.shape and kind in words[0] and made.dtype == np.float32
    brighter, _ = demo.add_weather(image * 0.3, depth, "snow", demo.ORIGINAL, np.random.default_rng(1))
    assert (brighter >= image * 0.3 - 1e-5).all() and brighter.mean() > image.mean() * 0.3
    with pytest.raises(ValueError, match="hail"):
        demo.add_weather(image, depth, "hail", demo.ORIGINAL, np.random.default_rng(0))


def test_a_place_out_of_focus_keeps_its_colours_and_its_weather_stays_sharp():
    image, depth = demo.scene(np.random.default_rng(3), 96, 96)
    rough = lambda x: np.abs(np.diff(x, axis=1)).mean()
    soft = dataclasses.replace(demo.ORIGINAL, soft=1.0)
    blurred, _ = demo.add_weather(image, depth, "clear", soft, np.random.default_rng(1))
    assert rough(blurred) < 0.3 * rough(image) and np.allclose(blurred.mean((0, 1)), image.mean((0, 1)), atol=0.03)
    rain, _ = demo.add_weather(image, depth, "rain", soft, np.random.default_rng(1))
    assert rough(rain) > 2 * rough(blurred)
    assert demo.ORIGINAL.soft == demo.WEB.soft == 0        # a means of the pretraining alone


def test_a_mirrored_picture_has_a_mirrored_caption():
    left = "a photo in heavy rain, long streaks, blown to the left"
    assert demo.turned(left) == left.replace("left", "right") and demo.turned(demo.turned(left)) == left
    assert demo.turned(demo.CLEAR) == demo.CLEAR and demo.turned("") == ""


def test_streaks_have_the_angle_that_was_asked_for():
    for angle in (-0.5, 0.0, 0.4):
        a = demo.particles(np.random.default_rng(0), 128, 128, 0.05, 30, 2.0, angle, 2)
        gy, gx = np.gradient(a)
        lines = 0.5 * math.atan2(2 * (gx * gy).mean(), (gx ** 2 - gy ** 2).mean())     # of the gradient: across the streaks
        assert -lines == pytest.approx(angle, abs=0.06) and 0.02 < a.mean() < 0.1


# ---------------------------------------------------------------- the command line

@pytest.fixture(scope="session")
def demo_run(tmp_path_factory):
    """The embedded default on a tiny budget, and what it printed."""
    out = tmp_path_factory.mktemp("runs") / "desnow"
    done = run("--task", "desnow", "--out", out, *TINY)
    assert done.returncode == 0, done.stderr
    return out, done


def test_the_embedded_default_leaves_every_file(demo_run):
    out, done = demo_run
    for name in ("config.json", "adapter.safetensors", "synth/000000.png", "synth/000005.png", "synth.png", "student.safetensors",
                 "metrics.json", "metrics.md", "metrics.csv", "figure.png"):
        assert (out / name).is_file(), name
    assert not list(out.rglob("*.tmp")) and not list(out.glob("*.pt"))
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["task"] == "desnow" and metrics["n_images"] == demo.TEST
    for who in ("input", "teacher", "student"):
        assert set(evaluate.METRICS) <= metrics[who].keys()
    assert {"params", "gmacs", "ms", "peak_mb"} <= metrics["teacher"].keys() & metrics["student"].keys()
    assert len((out / "metrics.csv").read_text().splitlines()) == 1 + demo.TEST
    config = json.loads((out / "config.json").read_text())
    assert config["adapter"]["steps"] == 4 and "torch" in config["versions"] and config["evaluate"]["tile"] == 1024
    assert "from the embedded demo: --degraded, --clean, --test, --sd, --teacher" in done.stdout
    assert "Traceback" not in done.stderr


def test_the_same_command_does_nothing_again_and_others_are_refused(demo_run):
    out, _ = demo_run
    before = {f: f.stat().st_mtime_ns for f in out.rglob("*") if f.is_file() and f.name != "config.json"}
    again = run("--task", "desnow", "--out", out, *TINY)
    assert again.returncode == 0 and again.stdout.count("done already") == 4, again.stderr
    assert before == {f: f.stat().st_mtime_ns for f in before}
    other = run("--task", "desnow", "--out", out, *TINY, "--strength", "0.4")
    assert other.returncode == 2 and other.stdout == "" and len(other.stderr.splitlines()) == 1
    assert f"strength of synth was {synth.SynthConfig.strength}, now 0.4" in other.stderr and "--restart" in other.stderr


def test_restore_and_export(demo_run, tmp_path):
    out, _ = demo_run
    image = photo(3, 45, 61)
    save(image, tmp_path / "in/a b.jpg")
    save(image, tmp_path / "in/c.png")
    (tmp_path / "in/d.png").write_bytes(b"rubbish")
    done = run("--task", "desnow", "--stage", "restore", "--input", tmp_path / "in", "--model", out / "student.safetensors", "--output", tmp_path / "out")
    assert done.returncode == 0 and "d.png: not a readable image" in done.stdout, done.stderr
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["a b.png", "c.png"]
    student = models.load_restorer(out / "student.safetensors")
    expected = evaluate.levels(student(evaluate.read_image(tmp_path / "in/c.png")[None] / 255)[0])
    assert (evaluate.read_image(tmp_path / "out/c.png") - expected).abs().max() <= 1
    done = run("--task", "desnow", "--stage", "export", "--out", out)
    assert done.returncode == 0, done.stderr
    program = torch.export.load(out / "student.pt2").module()
    for height, width in ((64, 64), (48, 96), (128, 32)):
        x = photo(4, height, width)[None]
        assert torch.allclose(program(x), student(x), atol=1e-4)
    if (out / "student.onnx").exists():
        ort = pytest.importorskip("onnxruntime")
        found = ort.InferenceSession(str(out / "student.onnx")).run(None, {"image": x.numpy()})[0]
        assert np.allclose(found, student(x).numpy(), atol=1e-3)


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """Folders as users have them: odd modes, small photos, rubbish among them."""
    root = tmp_path_factory.mktemp("photos")
    for i in range(4):
        save(photo(i, 110 + i, 130), root / f"bad/{i}.jpg")
        save(photo(10 + i, 120, 100 + i), root / f"good/sub/{i}.PNG")
        save(photo(20 + i, 40, 56), root / f"test/input/{i}.png")
        save(photo(30 + i, 40, 56), root / f"test/target/{i}.png")
    save(demo.picture(photo(5, 50, 60).permute(1, 2, 0).numpy()).convert("CMYK"), root / "bad/small.jpg")
    save(demo.picture(photo(6, 120, 120).permute(1, 2, 0).numpy()).convert("P"), root / "good/palette.png")
    (root / "bad/broken.png").write_bytes(b"rubbish")
    (root / "empty").mkdir()
    (root / "rubbish").mkdir()
    (root / "rubbish/a.png").write_bytes(b"rubbish")
    return root


def test_photos_of_ones_own(folders, tmp_path):
    done = run("--task", "all", "--degraded", folders / "bad", "--clean", folders / "good", "--test", folders / "test",
               "--student-width", "4", "--out", tmp_path / "run", "--no-distill-keep-teacher", *TINY)
    assert done.returncode == 0, done.stderr
    assert "from the embedded demo: --sd, --teacher" in done.stdout
    assert "broken.png: not a readable image" in done.stdout and "1 of 5 photos are smaller" in done.stdout
    assert json.loads((tmp_path / "run/metrics.json").read_text())["n_images"] == 4


@pytest.mark.parametrize("prediction_type", ["epsilon", pytest.param("v_prediction", marks=pytest.mark.slow)])
def test_a_stable_diffusion_and_a_teacher_of_ones_own(folders, network, tmp_path, prediction_type):
    model, folder = network
    torch.save({"state_dict": {f"net.{k}": v for k, v in model.state_dict().items()}}, folder / "w.ckpt")
    done = run("--task", "derain", "--sd", make_sd(tmp_path / "sd", prediction_type), "--degraded", folders / "bad", "--clean", folders / "good",
               "--teacher", f"{folder}/net.py:Net(width=4)@{folder}/w.ckpt", "--test", folders / "test/input", "--student-width", "4",
               "--out", tmp_path / "run", "--precision", "fp32", *TINY)
    assert done.returncode == 0, done.stderr
    assert "from the embedded demo" not in done.stdout
    assert evaluate.read_image(tmp_path / "run/synth/000000.png").shape == (3, 64, 64)
    without = run("--task", "derain", "--stage", "evaluate", "--sd", tmp_path / "sd", "--degraded", folders / "bad", "--clean", folders / "good",
                  "--teacher", f"{folder}/net.py:Net(width=4)@{folder}/w.ckpt", "--test", folders / "bad", "--student-width", "4",
                  "--out", tmp_path / "run", "--precision", "fp32", *TINY)
    assert without.returncode == 0, without.stderr         # photos without ground truth
    assert not (tmp_path / "run/metrics.json").exists() and len(list((tmp_path / "run/restored").glob("*.png"))) == 5


def test_bad_input_is_one_line_and_exit_code_2(folders, network, tmp_path, capsys):
    """By subprocess for one of them; the others raise the ValueError that is printed so."""
    net = network[1] / "net.py"
    torch.save(network[0].state_dict(), net.parent / "w.pth")
    done = run("--task", "desnow", "--degraded", tmp_path / "absent", "--out", tmp_path / "r")
    assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (2, "", 1) and "no such folder" in done.stderr
    good = ["--degraded", folders / "bad", "--clean", folders / "good", "--test", folders / "test"]
    for arguments, message in ((["--degraded", folders / "empty"], "no image file"), (["--degraded", folders / "rubbish"], "none of its 1 image files"),
                               (["--test", folders / "empty"], "no image file"), (["--teacher", folders / "bad/broken.png"], "not a readable"),
                               (["--sd", folders / "bad"], "no Stable Diffusion"), (["--strength", "0"], "strength"), (["--tokens", "99"], "tokens"),
                               (["--steps", "999"], "steps must lie"), (["--size", "60"], "multiple of 16"), (["--device", "tpu"], "--device tpu"),
                               (["--stage", "distill"], "run --stage synth first"), (["--distill-crop", "999"], "larger than the images, 96 px"),
                               (["--teacher", f"{net}:Halving@{net.parent}/w.pth"], "teacher-multiple"),
                               (["--teacher", f"{net}:Fourier@{net.parent}/w.pth", "--precision", "bf16"], "give --precision fp32")):
        with pytest.raises(ValueError, match=message):
            d4ir.main(list(map(str, ["--task", "desnow", *good, *arguments, "--out", tmp_path / str(hash(message)), *TINY[:6]]
                                 + ([] if "--steps" in arguments else ["--steps", "2"]))))
    for arguments, message in ((["--task", "desmog"], "invalid choice"), ([], "--task"), (["--task", "desnow", "--distill-steps", "0"], "at least 1"),
                               (["--task", "desnow", "--scheduler", "euler"], "ddim"), (["--task", "desnow", "--stage", "restore"], "--input")):
        capsys.readouterr()                                # what was said before
        with pytest.raises(SystemExit) as stopped:
            d4ir.parse(arguments)
        said = capsys.readouterr().err
        assert stopped.value.code == 2 and message in said and len(said.splitlines()) == 1
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("x")
    (tmp_path / "mine/config.json").write_text("{}")
    with pytest.raises(ValueError, match="give another --out"):
        d4ir.main(["--task", "desnow", "--out", str(tmp_path / "mine"), "--restart"])
    assert (tmp_path / "mine/thesis.txt").exists()


def test_a_corrected_command_and_a_restart(folders, tmp_path):
    """After a mistake the corrected command is not refused; --restart does the named stage anew, and later ones."""
    def go(*more):
        d4ir.main(list(map(str, ["--task", "desnow", "--degraded", folders / "bad", "--clean", folders / "good", "--test", folders / "test",
                                 "--student-width", "4", "--out", tmp_path / "run", *TINY, *more])))
    with pytest.raises(ValueError, match="no Stable Diffusion"):
        go("--sd", folders / "bad")
    go("--stage", "adapter")
    with pytest.raises(ValueError, match="lr of adapter was"):
        go("--adapter-lr", "0.5")
    go()
    times = {f.name: f.stat().st_mtime_ns for f in (tmp_path / "run").iterdir()}
    with pytest.raises(ValueError, match="lr of distill was 0.002, now 0.01"):
        go("--distill-lr", "0.01")
    go("--distill-lr", "0.01", "--restart", "--stage", "distill", "evaluate")
    after = {f.name: f.stat().st_mtime_ns for f in (tmp_path / "run").iterdir()}
    assert {name for name in after if after[name] != times[name]} >= {"student.safetensors", "metrics.json"}
    assert after["adapter.safetensors"] == times["adapter.safetensors"] and after["synth.png"] == times["synth.png"]
    with pytest.raises(ValueError, match="run --stage distill first"):     # a stage in between, which --restart would delete
        go("--restart", "--stage", "synth", "evaluate")
    assert (tmp_path / "run/student.safetensors").exists()
    metrics = (tmp_path / "run/metrics.json").read_bytes()
    (tmp_path / "odd").mkdir()
    for name, side in (("input", 40), ("target", 90)):
        save(photo(1, side, side), tmp_path / "odd" / name / "1.png")
    with pytest.raises(ValueError, match="40, 40"):        # a bad test set costs nothing that was there
        go("--distill-lr", "0.01", "--stage", "evaluate", "--test", tmp_path / "odd")
    assert (tmp_path / "run/previous/metrics.json").read_bytes() == metrics
    restoring = ["--task", "desnow", "--out", str(tmp_path / "run"), "--stage", "restore", "--input", str(tmp_path / "odd")]
    for _ in range(2):                                     # what was restored is not restored again
        d4ir.main([*restoring, "--output", str(tmp_path / "odd/out")])
    assert len(evaluate.list_images(tmp_path / "odd/out", recursive=True)) == 2
    with pytest.raises(ValueError, match="is one of the photos"):
        d4ir.main(["--task", "desnow", "--out", str(tmp_path / "run"), "--stage", "restore", "--input", str(folders / "test/input"),
                   "--output", str(folders / "test/input")])


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
def test_a_killed_run_goes_on(folders, tmp_path):
    """Killed in the middle of the distillation, by SIGTERM and by SIGKILL: the end is the same as undisturbed."""
    command = ["--task", "desnow", "--degraded", folders / "bad", "--clean", folders / "good", "--test", folders / "test", "--student-width", "4",
               *TINY[:8], "--distill-steps", "60", "--distill-batch", "4", "--distill-save-every", "5", "--precision", "fp32"]
    whole = run(*command, "--out", tmp_path / "whole")
    assert whole.returncode == 0, whole.stderr
    for number in (signal.SIGTERM, signal.SIGKILL):
        process = subprocess.Popen([sys.executable, str(HERE / "d4ir.py"), *map(str, command), "--out", str(tmp_path / "killed")],
                                   stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        checkpoint, until = tmp_path / "killed/student.pt", time.time() + 120
        while not checkpoint.exists() and process.poll() is None and time.time() < until:
            time.sleep(0.01)
        process.send_signal(number)
        _, said = process.communicate()
        assert "Traceback" not in said
    done = run(*command, "--out", tmp_path / "killed")
    assert done.returncode == 0 and "adapter: done already" in done.stdout, done.stderr
    a, b = (models.load_restorer(tmp_path / name / "student.safetensors").state_dict() for name in ("whole", "killed"))
    assert all(torch.allclose(a[k], b[k], atol=2e-3) for k in a)


@pytest.mark.slow
def test_several_processes(folders, tmp_path):
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", str(HERE / "d4ir.py"), "--task", "derain",
                           "--degraded", str(folders / "bad"), "--clean", str(folders / "good"), "--test", str(folders / "test"), "--device", "cpu",
                           "--student-width", "4", "--out", str(tmp_path / "run"), *TINY, "--batch", "2"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "run/synth").glob("*.png"))) == 6 and (tmp_path / "run/metrics.json").exists()


@cuda
def test_on_a_gpu(folders, tmp_path):
    for precision in ("bf16", "fp16"):
        done = run("--task", "desnow", "--degraded", folders / "bad", "--clean", folders / "good", "--test", folders / "test", "--device", "cuda",
                   "--precision", precision, "--out", tmp_path / precision, *TINY)
        assert done.returncode == 0, done.stderr


# ---------------------------------------------------------------- experiments

def test_the_adversary_widens_the_gap_with_varied_images(monkeypatch):
    torch.manual_seed(0)
    teacher, student = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 3, padding=1)
    monkeypatch.setattr(compare.Adversary, "prior", 0.0)
    loader = iter(compare.Adversary(teacher.requires_grad_(False), student, 16, 8, torch.device("cpu"), torch.float32, 0))
    gap = lambda x: (teacher(x).clamp(0, 1) - student(x)).abs().mean().item()
    first, taught = next(loader)
    torch.testing.assert_close(taught, teacher(first).clamp(0, 1))
    for _ in range(60):
        last, taught = next(loader)
    assert gap(last) > 1.1 * gap(first) and not taught.requires_grad
    assert all(weight.grad is None for weight in student.parameters())
    assert first.shape == (8, 3, 16, 16) and first.min() >= 0 and first.max() <= 1 and not last.requires_grad

    def trained(what, weight):
        with monkeypatch.context() as patch:
            patch.setattr(compare.Adversary, what, weight)
            loader = iter(compare.Adversary(teacher, student, 16, 8, torch.device("cpu"), torch.float32, 0))
            return [next(loader)[0] for _ in range(60)][-1]
    assert trained("variety", 30.0).std(0).mean() > 1.1 * trained("variety", 0.0).std(0).mean()
    kept = lambda x: (teacher(x).clamp(0, 1) - x).abs().mean()
    assert kept(trained("prior", 30.0)) < 0.95 * kept(trained("prior", 0.0))


def test_comparison_shares_resumes_and_refuses(folders, tmp_path, monkeypatch):
    def go(*more):
        compare.main(list(map(str, ["--task", "desnow", "--degraded", folders / "bad", "--clean", folders / "good", "--test", folders / "test",
                                    "--original", folders / "bad", "--student-width", "4", "--out", tmp_path / "run", "--seeds", "2",
                                    "--results", tmp_path / "results", *TINY, *more])))
        return json.loads((tmp_path / "results/compare-desnow.json").read_text())
    first = go("--rows", "original", "gan", "d4ir", "d4ir+web")
    rows = {row["source"]: row for row in first["rows"]}
    assert list(rows) == ["input", "teacher", "original", "gan", "d4ir", "d4ir+web"] and first["seeds"] == 2
    level = {name: row["psnr_rgb"]["mean"] for name, row in rows.items()}
    if level["original"] > level["input"]:
        assert rows["d4ir"]["share"] == pytest.approx((level["d4ir"] - level["input"]) / (level["original"] - level["input"]))
    assert set(rows["d4ir"]["psnr_rgb"]) == {"mean", "std"} and rows["d4ir"]["images_per_s"] > 0
    assert not (tmp_path / "run/d4ir+web/synth").exists()                  # D4IR's images, not made twice
    assert (tmp_path / "results/compare-desnow.png").exists() and "| D4IR |" in (tmp_path / "results/compare-desnow.md").read_text()
    assert str(tmp_path) not in json.dumps({k: v for k, v in first.items() if k != "command"})
    with monkeypatch.context() as patch:                                   # nothing is trained again, and rows that are done are kept
        patch.setattr(compare, "distill", None)
        assert go("--rows", "d4ir")["rows"] == first["rows"]
    (tmp_path / "run/d4ir/student-1.json").unlink()                        # what is lost is made again, and alike
    (tmp_path / "run/d4ir/synth/000005.png").unlink()
    again = {row["source"]: row for row in go()["rows"]}
    assert again["d4ir"]["psnr_rgb"]["mean"] == pytest.approx(level["d4ir"], abs=1e-3) and set(again) == {"input", "teacher", *compare.ROWS}
    with pytest.raises(ValueError, match="lr was 0.002, now 0.01"):
        go("--distill-lr", "0.01")
    with pytest.raises(ValueError, match="none: no such folder"):
        go("--original", tmp_path / "none")


@pytest.mark.slow
def test_every_sweep_of_the_comparison(tmp_path, monkeypatch):
    command = ["--task", "all", "--student-width", "4", "--out", tmp_path / "run", "--seeds", "1", "--results", tmp_path, *TINY]
    for what, values in {"strength": (0.3, 0.95), "guidance": (1.0, 2.0), "photos": (3, 6), "images": (2, 6)}.items():
        monkeypatch.setitem(compare.SWEEPS, what, values)
        compare.main([*map(str, command), "--sweep", what])
        assert [row[what] for row in json.loads((tmp_path / f"{what}-all.json").read_text())["values"]] == list(values)


def test_the_mini_sd_hears_its_prompt():
    """On places that nobody was trained on, each weather is denoised best with a caption that names it."""
    sd, count, t = models.load_stable_diffusion(MINI), 16, 400
    captions = ["a photo in clear weather"] + [f"a photo in heavy {kind}" for kind in demo.KINDS]
    prompts = sd.text_prompt(captions)
    for k, kind in enumerate(demo.KINDS, 1):
        weather_of = dataclasses.replace(demo.ORIGINAL, beta=(0.02, 0.03), flakes=(0.18, 0.24), streaks=(0.16, 0.2))
        rng, places = np.random.default_rng(k), []
        for _ in range(count):
            places.append(demo.add_weather(*demo.scene(rng, 64, 64), kind, weather_of, rng)[0])
        z = sd.encode(torch.from_numpy(np.stack(places)).permute(0, 3, 1, 2))
        eps = torch.randn(z.shape, generator=torch.Generator().manual_seed(k))
        with torch.no_grad():
            errors = [prompt_adapter.diffusion_loss(sd, z, prompt.expand(count, -1, -1), torch.full((count,), t), eps).item()
                      for prompt in prompts]
        assert min(range(4), key=errors.__getitem__) == k, (kind, errors)


@pytest.mark.slow
@pytest.mark.xfail(reason="rain and snow hold, haze does not (results/weather-check.json)")
def test_captions_make_their_weather():
    """The mini-SD's img2img, judged by a classifier that knows the renderer's weather."""
    found, _ = weather.check(str(MINI), photos=1600, steps=400, test=100, clear=12, strengths=(0.6,))
    assert all(found["places"][kind][kind] > 0.7 for kind in weather.CLASSES), found
    assert all(found["strength 0.6"][kind][kind] > 0.7 for kind in demo.KINDS), found


# ---------------------------------------------------------------- the house

def test_every_setting_is_read():
    """An option that nothing reads is a defect."""
    for config, files in ((prompt_adapter.AdapterConfig, ("prompt_adapter.py", "d4ir.py")), (synth.SynthConfig, ("synth.py", "d4ir.py")),
                          (distill.DistillConfig, ("distill.py", "d4ir.py"))):
        text = "".join((HERE / file).read_text() for file in files)
        for _, field, comment in d4ir.flags_of(config):
            assert comment and any(f"{name}.{field.name}" in text for name in ("config", "run.adapter", "run.synth", "run.distill")), field.name
