"""Tests: the mathematics against an independent form, the real command line on a tiny budget, and
every documented error.

    pytest                             # a few minutes on two cores, no GPU, no download
    pytest -m "slow or not slow"       # the slow ones too
"""
import argparse
import ast
import copy
import dataclasses
import hashlib
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import diffusers
import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

import d4ir
import demo.photos
import demo.pretrain
import demo.scenes
import demo.weather
import distill
import evaluate
import models
import prompt_adapter
import synth
from experiments import (bench, compare, features, few_steps, following, gan, low_rank,
                         two_weathers, weather)

HERE = Path(__file__).resolve().parent
MINI = demo.WEIGHTS / "mini-sd"
TINY = ["--adapter-steps", "4", "--adapter-batch", "4", "--images", "6", "--steps", "2",
        "--distill-steps", "6", "--distill-batch", "4"]
cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", os.cpu_count())))


def run(*arguments, **options):
    """The real command line, in its own process."""
    command = [sys.executable, str(HERE / "d4ir.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, **options)


FEW_PHOTOS = (("degraded", "clean", "test"), 16, 8, demo.photos.TEST, 0)


def run_demo(*arguments):
    """The same with fewer demo photos."""
    code = ("import d4ir, demo.photos\n"
            f"demo.photos.write_photos.__defaults__ = {FEW_PHOTOS}\n"
            "d4ir.run_command(d4ir.main)")
    return subprocess.run([sys.executable, "-c", code, *map(str, arguments)], cwd=HERE,
                          capture_output=True, text=True)


def noise(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def photo(seed, height, width):
    """A smooth random photo (3,H,W) in [0,1]."""
    coarse = noise(seed, 1, 3, 9, 9).mul(0.3).add(0.5)
    return nn.functional.interpolate(coarse, (height, width), mode="bicubic")[0].clamp(0, 1)


def to_pil(image):
    """(3,H,W) in [0,1] to an 8-bit PIL image."""
    return demo.weather.to_pil(image.permute(1, 2, 0).numpy())


def save(image, path, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = to_pil(image) if isinstance(image, torch.Tensor) else image
    image.save(path, **options)
    return path


SCHEDULE = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")


def make_sd(folder, prediction_type="epsilon", **unet):
    """A pipeline with the structure of Stable Diffusion 1.5 and tiny random weights."""
    from diffusers import (AutoencoderKL, PNDMScheduler, StableDiffusionPipeline,
                           UNet2DConditionModel)
    torch.manual_seed(0)
    tokenizer, text = demo.pretrain.new_text(folder / "text")
    vae = AutoencoderKL(down_block_types=("DownEncoderBlock2D",) * 4,
                        up_block_types=("UpDecoderBlock2D",) * 4,
                        block_out_channels=(8, 8, 8, 8), layers_per_block=1, latent_channels=4,
                        norm_num_groups=2, scaling_factor=0.18215)
    settings = dict(sample_size=8, in_channels=4, out_channels=4, layers_per_block=1,
                    block_out_channels=(8, 16, 16, 16),
                    down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
                    up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
                    cross_attention_dim=128, attention_head_dim=2, norm_num_groups=2)
    scheduler = PNDMScheduler(**SCHEDULE, skip_prk_steps=True, set_alpha_to_one=False,
                              steps_offset=1, prediction_type=prediction_type)
    pipe = StableDiffusionPipeline(
        vae=vae, text_encoder=text, unet=UNet2DConditionModel(**settings | unet),
        tokenizer=tokenizer, scheduler=scheduler, safety_checker=None, feature_extractor=None,
        requires_safety_checker=False)
    pipe.save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def few_demo_photos(monkeypatch):
    """Runs in this process render fewer demo photos."""
    monkeypatch.setattr(demo.photos.write_photos, "__defaults__", FEW_PHOTOS)


@pytest.fixture(scope="session", params=["epsilon", "v_prediction"])
def sd(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sd") / request.param
    return models.load_stable_diffusion(make_sd(folder, request.param))


class Oracle:
    """A model that knows z_0 and predicts the exact eps or v at any (z_t, t)."""

    def __init__(self, z0, prediction_type):
        from diffusers import DDIMScheduler
        self.alphas_cumprod = DDIMScheduler(**SCHEDULE).alphas_cumprod
        self.prediction_type, self.z0, self.calls = prediction_type, z0, 0

    def null_prompt(self, tokens):
        return torch.zeros(1, tokens, 4)

    def predict_noise(self, z_t, t, prompts):
        self.calls += 1
        z0 = self.z0.repeat(len(z_t) // len(self.z0), 1, 1, 1)
        abar = self.alphas_cumprod[t]
        eps = (z_t - abar.sqrt() * z0) / (1 - abar).sqrt()
        if self.prediction_type == "epsilon":
            return eps
        return abar.sqrt() * eps - (1 - abar).sqrt() * z0


# ---------------------------------------------------------------- DPA

def test_info_nce_equals_a_double_loop():
    normalize = nn.functional.normalize
    q, k, queue = (normalize(noise(i, n, 8), dim=1) for i, n in ((1, 5), (2, 5), (3, 11)))
    ignore = noise(4, 5, 11) > 1
    total = 0.0
    for i in range(5):
        positive = math.exp(float(q[i] @ k[i]) / 0.2)
        negatives = sum(math.exp(float(q[i] @ queue[j]) / 0.2)
                        for j in range(11) if not ignore[i, j])
        total -= math.log(positive / (positive + negatives)) / 5
    loss = prompt_adapter.info_nce(q, k, queue, 0.2, ignore)
    assert loss.item() == pytest.approx(total, abs=1e-5)
    with pytest.raises(ValueError, match=r"\(5, 8\)"):
        prompt_adapter.info_nce(q, k[:3], queue, 0.2)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_diffusion_loss_of_an_exact_model_is_zero(prediction_type):
    z0, eps, prompts = noise(1, 3, 4, 8, 8), noise(2, 3, 4, 8, 8), noise(3, 3, 2, 4)
    oracle, t = Oracle(z0, prediction_type), torch.tensor([10, 500, 990])
    loss = lambda: prompt_adapter.diffusion_loss(oracle, z0, prompts, t, eps).item()
    exact = lambda z, t, p: Oracle.predict_noise(oracle, z, t.view(-1, 1, 1, 1), p)
    oracle.predict_noise = exact
    assert loss() < 1e-6
    oracle.predict_noise = lambda z, t, p: exact(z, t, p) + 0.5
    assert loss() == pytest.approx(0.25, abs=1e-5)
    oracle.predict_noise = lambda z, t, p: torch.zeros_like(z)     # the target's mean square
    abar = oracle.alphas_cumprod[t].view(-1, 1, 1, 1)
    v = abar.sqrt() * eps - (1 - abar).sqrt() * z0
    target = eps if prediction_type == "epsilon" else v
    assert loss() == pytest.approx(target.square().mean().item(), rel=1e-5)


@pytest.mark.parametrize("centered", [False, True])
def test_only_the_adapter_receives_gradients(sd, centered):
    base = sd.text_prompt("a photo in heavy snow", 4)
    adapter = prompt_adapter.PromptAdapter(sd.width, 4, base=base, centered=centered)
    nn.init.normal_(adapter.to_prompts[-1].weight, std=0.01)
    latents, degraded = noise(1, 4, 4, 8, 8), torch.stack([photo(i, 64, 64) for i in range(4)])
    prompts, embedding = adapter(degraded, with_embedding=True)
    t = torch.tensor([100, 300, 500, 700])
    diffusion = prompt_adapter.diffusion_loss(sd, latents, prompts, t, noise(3, 4, 4, 8, 8))
    contrast = prompt_adapter.info_nce(embedding, embedding.detach(), noise(4, 6, 128), 0.2)
    (diffusion + contrast).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in adapter.parameters())
    for frozen in (sd.unet, sd.vae, sd.text_encoder):
        assert all(p.grad is None and not p.requires_grad for p in frozen.parameters())


class Interrupted:
    """A loader that raises KeyboardInterrupt instead of yielding batch number `stop`."""

    def __init__(self, loader, stop):
        self.loader, self.stop = loader, stop

    def __len__(self):
        return len(self.loader)

    def __iter__(self):
        for i, batch in enumerate(self.loader):
            if i == self.stop:
                raise KeyboardInterrupt
            yield batch


ADDITIONS_ON = dict(residual=True, weather_weight=3.0, caption_base=True, penalty=0.1)


@pytest.mark.parametrize("additions", [{}, ADDITIONS_ON])
def test_adapter_training_learns_resumes_and_leaves_the_unet_unchanged(sd, tmp_path, additions):
    photos = [(photo(i, 80, 96) * 255).to(torch.uint8) for i in range(5)]
    before = [p.clone() for p in sd.unet.parameters()]
    config = prompt_adapter.AdapterConfig(steps=6, batch=2, save_every=2, **additions)
    inputs = prompt_adapter.residuals(photos, lambda x: x * 0.8) if config.residual else None

    def train(checkpoint, stop=None):
        torch.manual_seed(0)
        adapter = prompt_adapter.PromptAdapter(sd.width, 4, base=sd.null_prompt(4),
                                               centered=config.caption_base,
                                               residual=config.residual)
        loader = prompt_adapter.CropPairs(photos, sd, 64, 2, inputs=inputs)
        reports = []
        if stop:
            with pytest.raises(KeyboardInterrupt):
                prompt_adapter.train_adapter(adapter, sd, Interrupted(loader, stop), config,
                                             checkpoint=checkpoint)
        else:
            prompt_adapter.train_adapter(adapter, sd, loader, config, checkpoint=checkpoint,
                                         log=reports.append)
        return adapter.state_dict(), reports

    whole, reports = train(None)
    assert [report["step"] for report in reports] == [2, 4, 6]
    assert set(reports[0]) == {"stage", "step", "diffusion", "contrastive", "steps_per_s"}
    train(tmp_path / "a.pt", stop=5)
    resumed, reports = train(tmp_path / "a.pt")
    assert [report["step"] for report in reports] == [6]
    assert all(torch.allclose(whole[k], resumed[k], atol=1e-6) for k in whole)
    assert torch.equal(whole["base"], sd.null_prompt(4))
    assert whole["to_prompts.3.weight"].abs().sum() > 0
    assert all(torch.equal(a, b) for a, b in zip(before, sd.unet.parameters()))


def test_trained_prompts_keep_the_base_as_their_mean(sd):
    """In eval mode, with statistics that differ much between batches."""
    photos = [(128 + 120 * noise(i, 3, 80, 96) / 4 ** (i % 4)).clamp(0, 255).to(torch.uint8)
              for i in range(16)]
    config = prompt_adapter.AdapterConfig(steps=12, batch=4, lr=5e-3, **ADDITIONS_ON)
    adapter = prompt_adapter.PromptAdapter(sd.width, 4, base=sd.null_prompt(4), centered=True,
                                           residual=True)
    loader = prompt_adapter.CropPairs(photos, sd, 64, 4)
    prompt_adapter.train_adapter(adapter, sd, loader, config, log=lambda report: None)
    prompt_adapter.update_norms(adapter, loader, config.steps)
    assert not any(module.training for module in adapter.modules())
    crops = torch.cat([loader.batch_at(step)[1] for step in range(100, 132)]) / 255
    with torch.no_grad():
        change = adapter(crops) - adapter.base                     # (128,4,d)
    spread = (change - change.mean(0)).square().sum((1, 2)).mean().sqrt()
    assert spread > 0 and change.mean(0).norm() < 0.2 * spread


def test_adapter_settings_are_checked(sd):
    adapter = prompt_adapter.PromptAdapter(sd.width, 4)
    with pytest.raises(ValueError, match="empty"):
        prompt_adapter.train_adapter(adapter, sd, [], prompt_adapter.AdapterConfig())
    with pytest.raises(ValueError, match="in the config but"):
        prompt_adapter.train_adapter(prompt_adapter.PromptAdapter(sd.width, 4, residual=True), sd,
                                     [0], prompt_adapter.AdapterConfig())
    with pytest.raises(ValueError, match="base that is not zero"):
        prompt_adapter.train_adapter(adapter, sd, [0], prompt_adapter.AdapterConfig(penalty=1.0))
    for settings, message in (({"batch": 1}, "batch"),
                              ({"temperature": 0.0}, "temperature"),
                              ({"weather_weight": 1.0}, "needs residual")):
        with pytest.raises(ValueError, match=message):
            prompt_adapter.AdapterConfig(**settings)


def test_a_loss_that_is_not_finite_stops_adapter_training_and_distillation(sd, tmp_path):
    a = photo(1, 64, 64).expand(2, 3, 64, 64)
    batch = (torch.full((2, 4, 8, 8), math.nan), a, a, torch.tensor([0, 1]))
    config = prompt_adapter.AdapterConfig(steps=2, batch=2, save_every=1)
    with pytest.raises(ValueError, match="not finite at step 1"):
        prompt_adapter.train_adapter(prompt_adapter.PromptAdapter(sd.width, 4), sd, [batch],
                                     config, checkpoint=tmp_path / "a.pt")
    config = distill.DistillConfig(steps=2, save_every=1)
    infinite = lambda x: x / 0                             # infinity is not clamped to white
    for teacher, batch in ((None, (a, a * math.nan)), (infinite, a)):
        with pytest.raises(ValueError, match="not finite at step 1"):
            distill.distill(teacher and Lambda(teacher), models.Restorer(4), [batch], config,
                            checkpoint=tmp_path / "s.pt")
    assert not list(tmp_path.iterdir())                    # no checkpoint of a broken network


def test_crop_a_is_denoised_with_its_own_prompt(sd, monkeypatch):
    made, used = [], []
    loss = prompt_adapter.diffusion_loss
    monkeypatch.setattr(prompt_adapter, "diffusion_loss", lambda sd, z, prompts, *rest: (
        used.append(prompts), loss(sd, z, prompts, *rest))[1])

    class Spy(prompt_adapter.PromptAdapter):
        def forward(self, x, with_embedding=False):
            assert torch.equal(x, torch.cat([a, b])) and with_embedding
            made.append(super().forward(x, with_embedding))
            return made[-1]

    a, b = (photo(i, 64, 64).expand(2, 3, 64, 64) for i in (1, 2))
    batch = (noise(0, 2, 4, 8, 8), a, b, torch.tensor([0, 1]))
    adapter = Spy(sd.width, 4)
    nn.init.normal_(adapter.to_prompts[-1].weight)
    prompt_adapter.train_adapter(adapter, sd, [batch],
                                 prompt_adapter.AdapterConfig(steps=1, batch=2))
    of_a, of_b = made.pop()[0].chunk(2)
    assert not torch.equal(of_a, of_b)
    assert torch.equal(used.pop(), of_a)


def test_residuals_show_what_the_teacher_removes():
    photos = [(photo(i, 32 + i, 40) * 200).to(torch.uint8) for i in range(3)]
    removed = prompt_adapter.residuals(photos, lambda x: x - 0.2)
    for x, r in zip(photos, removed):
        assert r.shape == x.shape and r.dtype == torch.uint8
        expected = 128 + 127 * torch.minimum(x / 255, torch.tensor(0.2))        # T is clamped at 0
        assert (r - expected).abs().max() <= 0.51
    assert torch.equal(prompt_adapter.residuals(photos, lambda x: x)[0],
                       torch.full_like(photos[0], 128))
    with pytest.raises(ValueError, match="photo 0 is not finite"):
        prompt_adapter.residuals(photos, lambda x: x / 0)


def test_the_weather_weight_is_one_where_the_teacher_removes_nothing():
    residual = torch.full((2, 3, 16, 16), 0.5)
    residual[1, :, :8, :8] = 0.75                          # x_d - T(x_d) = 0.5
    weight = prompt_adapter.weather_weight(residual, torch.zeros(2, 4, 2, 2), 10.0)
    expected = torch.ones(2, 1, 2, 2)
    expected[1, 0, 0, 0] = 1 + 10 * 0.5
    torch.testing.assert_close(weight, expected)
    oracle, z0, eps = Oracle(None, "epsilon"), noise(1, 2, 4, 2, 2), noise(2, 2, 4, 2, 2)
    oracle.predict_noise = lambda z, t, prompts: eps + 1
    loss = prompt_adapter.diffusion_loss(oracle, z0, None, torch.tensor([9, 99]), eps, weight)
    assert loss.item() == pytest.approx((2 * 4 + 5) / 8, rel=1e-5)


def test_prompts_start_at_the_base_and_centered_ones_keep_it_as_their_mean():
    base, photos = noise(0, 1, 4, 32), torch.stack([photo(i, 48, 48) for i in range(8)])
    for centered in (False, True):
        adapter = prompt_adapter.PromptAdapter(32, 4, base=base, centered=centered)
        assert torch.allclose(adapter(photos), base.expand(8, -1, -1))
    nn.init.normal_(adapter.to_prompts[-1].weight, std=0.1)
    for _ in range(100):
        prompts = adapter(photos)
    assert torch.allclose(prompts.mean(0, keepdim=True), base, atol=1e-4)
    assert prompts.std(0).mean() > 0.1
    adapter.eval()                                         # running statistics have converged
    assert torch.allclose(adapter(photos).mean(0, keepdim=True), base, atol=1e-2)
    assert torch.allclose(adapter(photos)[:1], adapter(photos[:1]), atol=1e-4)
    with pytest.raises(ValueError, match=r"must be \(1, 4, 32\)"):
        prompt_adapter.PromptAdapter(32, 4, base=noise(0, 3, 4, 32))


def test_prompts_do_not_depend_on_the_size_of_the_crop():
    """With zero padding, the same grey gave different features at different crop sizes: from 64 to
    96 px, all prompts shifted by as much as captions differ from one another."""
    for residual in (False, True):
        adapter = prompt_adapter.PromptAdapter(32, 4, residual=residual).eval()
        nn.init.normal_(adapter.to_prompts[-1].weight)
        small, large = (torch.full((1, 3, size, size), 0.7) for size in (16, 48))
        for one, other in zip(adapter(small, True), adapter(large, True)):
            torch.testing.assert_close(one, other)


def test_the_penalty_keeps_prompts_near_the_base(sd):
    base = sd.null_prompt(4)
    assert prompt_adapter.prompt_penalty(base.expand(3, -1, -1), base).item() == 0
    assert prompt_adapter.prompt_penalty(-base, base).item() == pytest.approx(4)
    prompts = torch.cat([base, 3 * base])
    assert prompt_adapter.prompt_penalty(prompts, base).item() == pytest.approx(2)  # (0 + 4) / 2

    photos = [(photo(i, 64, 64) * 255).to(torch.uint8) for i in range(4)]
    penalties = []
    for weight in (0.0, 10.0):
        torch.manual_seed(0)
        adapter = prompt_adapter.PromptAdapter(sd.width, 4, base=base)
        config = prompt_adapter.AdapterConfig(steps=20, batch=4, lr=1e-2, penalty=weight)
        prompt_adapter.train_adapter(adapter, sd, prompt_adapter.CropPairs(photos, sd, 64, 4),
                                     config, log=lambda report: None)
        prompts = adapter(torch.stack(photos) / 255)
        penalties.append(prompt_adapter.prompt_penalty(prompts, base).item())
    assert penalties[1] < penalties[0] / 2


def test_a_batch_depends_only_on_seed_and_step(sd):
    photos = [(photo(i, 80, 96) * 255).to(torch.uint8) for i in range(5)]
    loaders = {"adapter": lambda seed: prompt_adapter.CropPairs(photos, sd, 64, 3, seed),
               "distill": lambda seed: distill.Crops(photos, 32, 3, photos, seed)}
    for name, make in loaders.items():
        module = prompt_adapter if name == "adapter" else distill
        first = [batch for _, batch in zip(range(5), make(0))]
        later = next(iter(module.batches_from(make(0), 3)))
        assert all(torch.equal(x, y) for x, y in zip(first[3], later)), name
        assert not torch.equal(first[3][1], next(iter(make(1)))[1])
        order = np.concatenate([module.shuffled_epochs(5, 3 * i, 3, 0) for i in range(5)])
        for epoch in order.reshape(3, 5):                  # every photo once per epoch
            assert sorted(epoch) == [0, 1, 2, 3, 4]
    plain = module.batches_from(["a", "b", "c"], 4)        # any other iterable is repeated
    assert [next(plain) for _ in range(3)] == ["b", "c", "a"]
    with pytest.raises(ValueError, match="read only once"):
        list(module.batches_from(iter("ab"), 0))
    for wrong, size in ((photos, 60), (photos, 128), ([], 64)):
        with pytest.raises(ValueError, match=f"crops of {size} px"):
            prompt_adapter.CropPairs(wrong, sd, size, 3)


def test_every_photo_is_also_used_mirrored(sd):
    image = (photo(0, 64, 72) * 255).to(torch.uint8)
    loader = prompt_adapter.CropPairs([image], sd, 64, 1, inputs=[255 - image])
    seen = []
    for _, (z, a, b, number) in zip(range(8), loader):
        assert number == 0
        mirrored = not any(torch.equal(a[0], (255 - image)[..., x:x + 64]) for x in (0, 8))
        source = image.flip(-1) if mirrored else image
        x = next(x for x in (0, 8) if torch.equal(a[0], (255 - source)[..., x:x + 64]))
        whole = sd.encode(source[None] / 255)
        torch.testing.assert_close(z.float(), whole[..., x // 8:x // 8 + 8], atol=1e-2, rtol=1e-2)
        seen.append(mirrored)
    assert set(seen) == {False, True}


@pytest.mark.parametrize("centered", [False, True])
def test_adapter_file(tmp_path, centered):
    base = noise(0, 1, 4, 32)
    adapter = prompt_adapter.PromptAdapter(32, 4, base=base, centered=centered)
    nn.init.normal_(adapter.to_prompts[-1].weight)
    adapter(torch.stack([photo(i, 48, 48) for i in range(4)]))     # moves the running statistics
    adapter.eval()
    prompt_adapter.save_adapter(adapter, tmp_path / "a.safetensors")
    x = photo(1, 50, 70)[None]
    assert torch.equal(prompt_adapter.load_adapter(tmp_path / "a.safetensors")(x), adapter(x))
    assert adapter(x).shape == (1, 4, 32)
    (tmp_path / "b").write_bytes(b"no")
    with pytest.raises(ValueError, match="b: not an adapter"):
        prompt_adapter.load_adapter(tmp_path / "b")


# ---------------------------------------------------------------- CCD

def test_perturb_has_the_mean_and_variance_of_the_closed_form():
    oracle = Oracle(None, "epsilon")
    for t in (0, 399, 999):
        z = synth.perturb(torch.full((1, 1, 500, 500), 2.0), noise(t, 1, 1, 500, 500), oracle, t)
        abar = float(oracle.alphas_cumprod[t])
        assert z.mean().item() == pytest.approx(2 * math.sqrt(abar), abs=0.01)
        assert z.var().item() == pytest.approx(1 - abar, rel=0.02, abs=1e-5)


def test_timesteps_are_equally_spaced_and_end_at_the_clean_image():
    for strength in (0.05, 0.37, 0.6, 1.0):
        for steps in (1, 4, 7, 20):
            timesteps = synth.choose_timesteps(1000, strength, steps)
            assert len(timesteps) == steps and abs(timesteps[0] + 1 - 1000 * strength) < steps
            assert set(np.diff([*timesteps, -1])) == {-timesteps[-1] - 1}
    with pytest.raises(ValueError, match="steps must be in 1..50 at strength 0.05, not 51"):
        synth.choose_timesteps(1000, 0.05, 51)


@pytest.mark.parametrize("total", [4, 8])                   # sd-turbo, Hyper-SD
def test_few_step_models_get_the_timesteps_they_were_distilled_for(total):
    """--steps k --strength k/total: the last k of the timesteps that diffusers calls trailing."""
    from diffusers import DDIMScheduler
    reference = DDIMScheduler(timestep_spacing="trailing")
    reference.set_timesteps(total)
    trained = reference.timesteps.tolist()
    assert trained == {4: [999, 749, 499, 249],
                       8: [999, 874, 749, 624, 499, 374, 249, 124]}[total]
    for k in range(1, total + 1):
        assert synth.choose_timesteps(1000, k / total, k) == trained[total - k:]


@pytest.mark.parametrize("scheduler", list(synth.SOLVERS))
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_denoise_takes_exactly_n_steps_and_is_exact_for_an_oracle(scheduler, prediction_type):
    z0 = noise(1, 2, 4, 8, 8)
    for strength in (0.05, 0.37, 0.6, 1.0):
        for steps, guidance in ((1, 1), (4, 2.0), (7, 1), (20, 3.0)):
            oracle = Oracle(z0, prediction_type)
            timesteps = synth.choose_timesteps(1000, strength, steps)
            z = synth.perturb(z0, noise(2, 2, 4, 8, 8), oracle, timesteps[0])
            out = synth.denoise(z, noise(3, 2, 3, 4), oracle, timesteps, guidance,
                                scheduler=scheduler)
            assert oracle.calls == steps
            assert (out - z0).abs().max() < 1e-3, (strength, steps)


@pytest.mark.parametrize("scheduler", list(synth.SOLVERS))
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("strength", [0.4, 0.8, 1.0])
def test_solvers_agree_with_the_schedulers_of_diffusers(scheduler, prediction_type, strength):
    """The full schedule of diffusers, entered at t_s, for a model that is nonlinear in z and t."""
    from diffusers import DDIMScheduler, DPMSolverMultistepScheduler
    schedule = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear",
                    prediction_type=prediction_type, timestep_spacing="trailing")
    if scheduler == "ddim":
        reference = DDIMScheduler(**schedule, clip_sample=False, set_alpha_to_one=True)
    else:
        reference = DPMSolverMultistepScheduler(**schedule)        # DPM-Solver++(2M)
    oracle = Oracle(noise(1, 2, 4, 8, 8), prediction_type)
    oracle.predict_noise = lambda z, t, prompts: torch.tanh(z + t / 500) + 0.3 * z.flip(-1)
    spacing = 50
    timesteps = synth.choose_timesteps(1000, strength, round(1000 * strength) // spacing)
    z = expected = noise(2, 2, 4, 8, 8)
    out = synth.denoise(z, noise(3, 2, 3, 4), oracle, timesteps, scheduler=scheduler)
    reference.set_timesteps(1000 // spacing)
    entry = reference.timesteps.tolist().index(timesteps[0])
    if scheduler == "dpm":
        reference.set_begin_index(entry)
    assert reference.timesteps[entry:].tolist() == timesteps
    for t in timesteps:
        expected = reference.step(oracle.predict_noise(expected, t, None), t, expected).prev_sample
    assert (out - expected).abs().max() < 1e-4 * expected.abs().max()


def test_guidance_extrapolates_from_the_negative_prompt():
    """If a prompt of zeros predicts 0 and one of ones predicts 1, guidance w predicts w."""
    oracle, sizes = Oracle(noise(1, 1, 4, 4, 4), "epsilon"), []

    def constant(z, t, prompts):
        sizes.append(len(z))
        return prompts.mean((1, 2)).view(-1, 1, 1, 1).expand_as(z)

    oracle.predict_noise = constant
    z, prompts = noise(2, 1, 4, 4, 4), torch.ones(1, 2, 4)
    go = lambda prompts, *more: synth.denoise(z, prompts, oracle, [599], *more, scheduler="ddim")
    assert torch.allclose(go(prompts, 3.0), go(3 * prompts), atol=1e-5)    # 0 + 3 (1 - 0)
    assert sizes == [2, 1]                                 # no second prediction without guidance
    assert torch.allclose(go(prompts, 3.0, 2 * prompts), go(-prompts), atol=1e-5)   # 2 + 3 (1 - 2)


def make_config(**settings):
    return synth.SynthConfig(**dict(strength=0.5, steps=2, guidance=2.0) | settings)


def test_synthesize_is_repeatable_and_checks_its_inputs(sd):
    clean, prompts = photo(1, 64, 72).expand(2, 3, 64, 72), noise(2, 2, 4, sd.width)
    go = lambda seed, **more: synth.synthesize(clean, prompts, sd, make_config(**more),
                                               torch.Generator().manual_seed(seed))
    one = go(1)
    assert one.shape == clean.shape and one.min() >= 0 and one.max() <= 1
    assert torch.equal(one, go(1)) and not torch.equal(one, go(2))
    assert synth.synthesize(clean, prompts, sd, make_config()).shape == clean.shape
    for wrong, message in (({"strength": 0.0}, "strength"), ({"strength": 1.1}, "1.1"),
                           ({"scheduler": "euler"}, "ddim"), ({"guidance": math.nan}, "nan"),
                           ({"strength": 0.001}, "steps must be in 1..1")):
        with pytest.raises(ValueError, match=message):
            go(1, **wrong)
    with pytest.raises(ValueError, match="use synthesize_with_additions for .'anchor'"):
        go(1, anchor=True)
    with pytest.raises(ValueError, match="2 clean photos but 1 prompts"):
        synth.synthesize(clean, prompts[:1], sd, make_config())


def test_synthesize_equals_one_step_written_out(sd):
    """One DDIM step, written out: encode, perturb, predict, decode."""
    clean, prompts = photo(1, 64, 72)[None], noise(2, 1, 4, sd.width)
    config = make_config(strength=0.5, steps=1, guidance=1.0, scheduler="ddim")
    out = synth.synthesize(clean, prompts, sd, config, torch.Generator().manual_seed(5))
    z_0, abar = sd.encode(clean), sd.alphas_cumprod[499]
    eps = torch.randn(z_0.shape, generator=torch.Generator().manual_seed(5))
    z = abar.sqrt() * z_0 + (1 - abar).sqrt() * eps
    with torch.no_grad():
        output = sd.predict_noise(z, 499, prompts)
    if sd.prediction_type == "epsilon":
        z_0 = (z - (1 - abar).sqrt() * output) / abar.sqrt()
    else:
        z_0 = abar.sqrt() * z - (1 - abar).sqrt() * output
    assert torch.allclose(out, sd.decode(z_0), atol=1e-5)


# The additions: their code must not run in the paper's method.

def forbid(monkeypatch, module, *names):
    """Makes calls of these functions fail."""
    for name in names:
        def fail(*arguments, name=name, **named):
            raise AssertionError(f"{name} was called")
        monkeypatch.setattr(module, name, fail)


def forbid_additions(monkeypatch):
    forbid(monkeypatch, synth, "synthesize_with_additions", "add_anchor", "remaining_contrast")
    forbid(monkeypatch, d4ir, "residuals", "update_norms")
    forbid(monkeypatch, prompt_adapter, "centering", "weather_weight", "prompt_penalty")


def test_no_addition_runs_with_no_additions(folders, tmp_path, monkeypatch):
    forbid_additions(monkeypatch)
    forbid(monkeypatch, d4ir, "teacher_gains", "select_best")
    command = ["--task", "desnow", "--degraded", folders / "bad", "--clean", folders / "good",
               "--test", folders / "test", "--student-width", "4", *TINY]
    d4ir.main([*map(str, command), "--no-additions", "--out", str(tmp_path / "paper")])
    config = json.loads((tmp_path / "paper/config.json").read_text())
    assert config["additions"] == []
    assert not (config["synth"]["anchor"] or config["adapter"]["caption_base"])
    with pytest.raises(AssertionError, match="centering"):         # on by default in the demo
        d4ir.main([*map(str, command), "--out", str(tmp_path / "default")])


def test_every_addition_has_a_switch_and_is_listed(monkeypatch, capsys):
    off = d4ir.additions_off()
    assert set(off) == {"negative_prompt", "anchor", "adapter_residual", "adapter_weather_weight",
                        "adapter_caption_base", "adapter_penalty", "distill_select"}
    active = lambda *flags: d4ir.Run(d4ir.parse(["--task", "desnow", *flags])).additions()
    default = active()
    assert set(default) == {"residual", "weather_weight", "caption_base", "penalty",
                            "negative_prompt", "anchor", "select"}
    assert active("--no-additions") == active("--sd", "elsewhere") == []
    for name, value in off.items():
        flag = d4ir.to_flag(name)
        switch = [flag.replace("--", "--no-")] if value is False else [flag, str(value)]
        gone = {name.removeprefix("adapter_").removeprefix("distill_")}
        if name == "adapter_residual":                     # the weight is computed from it
            with pytest.raises(ValueError, match="weather_weight needs residual"):
                active(*switch)
            switch += ["--adapter-weather-weight", "0"]
            gone.add("weather_weight")
        assert set(active(*switch)) == set(default) - gone
    with pytest.raises(SystemExit):
        d4ir.parse(["--task", "desnow", "--no-additions", "--anchor"])
    assert "--no-additions cannot be combined with --anchor" in capsys.readouterr().err


def test_the_anchor_restores_detail_and_fades_with_the_contrast(sd):
    """A prompt that equals the negative one changes nothing, so the clean photo comes back."""
    clean, text = photo(1, 64, 72)[None], "a photo in clear weather"
    go = lambda **more: synth.synthesize_with_additions(
        clean, sd.text_prompt(text, 4), sd,
        make_config(strength=0.8, guidance=3.0, negative_prompt=text, **more))
    assert torch.allclose(go(anchor=True), clean, atol=1e-4)
    assert not torch.allclose(go(), clean, atol=0.2)
    plain = noise(1, 2, 3, 40, 48).sigmoid()
    a = synth.remaining_contrast(0.4 * plain + 0.5, plain)         # haze of transmission 0.4
    assert a.shape == (2, 1, 40, 48) and torch.allclose(a, torch.tensor(0.4), atol=0.02)


def test_teacher_gains_and_selection():
    halve = lambda image: image / 255 / 2
    clean = [torch.full((3, 16, 16), value / 255) for value in (80.0, 80.0, 100.0)]
    images = [torch.full((3, 16, 16), value, dtype=torch.uint8) for value in (120, 100, 100)]
    gains = distill.teacher_gains(images, map(halve, images), clean)
    assert gains[0] == pytest.approx(20 * math.log10(40 / 20), abs=1e-4)
    assert gains[1] == pytest.approx(20 * math.log10(20 / 30), abs=1e-4)
    assert -100 < gains[2] < -70                                    # x is x_c: finite
    assert distill.select_best([1.0, -2.0, 5.0, 4.0, 0.0], 0.6) == [0, 2, 3]
    assert distill.select_best([1.0, 2.0], 0.01) == [1]
    assert distill.select_best([0.0, 0.0, 0.0], 1.0) == [0, 1, 2]
    for share in (0, 1.1):
        with pytest.raises(ValueError, match="select must be in"):
            distill.DistillConfig(select=share)


def test_the_student_is_trained_on_the_selected_images(folders, tmp_path, monkeypatch):
    used, crops = [], d4ir.Crops
    monkeypatch.setattr(d4ir, "Crops", lambda images, *rest: used.append(torch.stack(list(images)))
                        or crops(images, *rest))
    monkeypatch.setattr(d4ir, "teacher_gains", lambda images, outputs, clean: [
        float(len(list(zip(images, outputs, clean)))), 9.0, 8.0, -1.0])
    command = ["--task", "desnow", "--degraded", folders / "bad", "--clean", folders / "good",
               "--test", folders / "test", "--student-width", "4", *TINY, "--images", "4",
               "--distill-select", "0.5", "--no-adapter-residual", "--adapter-weather-weight", "0",
               "--stage", "adapter", "synth", "distill", "--out", tmp_path]
    loads, load = [], d4ir.load_stable_diffusion
    monkeypatch.setattr(d4ir, "load_stable_diffusion",
                        lambda *arguments: loads.append(arguments) or load(*arguments))
    run = d4ir.main(list(map(str, command)))
    assert len(loads) == 1 and "sd" not in vars(run)               # freed, and not loaded again
    chosen = [evaluate.read_image(tmp_path / f"synth/{i:06d}.png") for i in (1, 2)]
    assert torch.equal(used[0], torch.stack(chosen))


def test_gains_compare_each_image_with_its_own_clean_photo(folders, tmp_path):
    """A synthesized image that equals its own clean photo has a strongly negative gain."""
    run = d4ir.Run(d4ir.parse(["--task", "desnow", "--seed", "3"]))
    clean = d4ir.load_photos(folders / "good", run.size, run, "--clean")
    crops = synth.draw_crops(clean, run.size, 3, range(4), 0)
    files = [tmp_path / f"{i:06d}.png" for i in (3, 1)]
    for file in files:
        synth.write_png((crops[int(file.stem)] * 255).round().to(torch.uint8), file)
    images = [evaluate.read_image(file) for file in files]
    outputs = distill.teacher_outputs(run.teacher, images, run.device, run.dtype)
    gains = distill.teacher_gains(images, outputs, d4ir.clean_crops(run, files, clean))
    assert max(gains) < -30


def test_the_negative_prompt_matters(sd):
    clean, prompts = photo(1, 64, 72)[None], noise(2, 1, 4, sd.width)
    go = lambda text: synth.synthesize_with_additions(
        clean, prompts, sd, make_config(negative_prompt=text), torch.Generator().manual_seed(0))
    assert not torch.equal(go("a photo in clear weather"), go(""))
    plain = synth.synthesize(clean, prompts, sd, make_config(), torch.Generator().manual_seed(0))
    assert torch.equal(go(""), plain)


def test_demo_settings_apply_only_to_the_mini_sd():
    def settings(*flags):
        args = d4ir.parse(["--task", *flags])
        return args.anchor, args.guidance, args.strength

    demo_strength, guidance = demo.SETTINGS["strength"], demo.SETTINGS["guidance"]
    assert settings("dehaze") == (False, 8.0, demo_strength)
    assert settings("desnow") == settings("all") == (True, guidance, demo_strength)
    assert settings("dehaze", "--anchor", "--guidance", "2") == (True, 2.0, demo_strength)
    default = synth.SynthConfig()
    assert settings("dehaze", "--sd", "other") == (False, default.guidance, default.strength)


def test_a_cpu_without_bf16_uses_fp32(monkeypatch):
    for has_bf16, given, precision in ((True, [], "bf16"), (False, [], "fp32"),
                                       (False, ["--precision", "bf16"], "bf16")):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": has_bf16},
                            raising=False)
        run = d4ir.Run(d4ir.parse(["--task", "desnow", "--device", "cpu", *given]))
        assert run.args.precision == precision == run.settings()["adapter"]["precision"]


def test_synthesize_folder_resumes(sd, tmp_path):
    photos = [(photo(i, 70, 90) * 255).to(torch.uint8) for i in range(3)]
    adapter = prompt_adapter.PromptAdapter(sd.width, 4).eval()
    config = synth.SynthConfig(images=5, batch=2, steps=2)
    synth.synthesize_folder(photos, photos, adapter, sd, config, tmp_path)
    files = sorted(tmp_path.iterdir())
    before = [f.read_bytes() for f in files]
    assert [f.name for f in files] == [f"00000{i}.png" for i in range(5)]
    files[3].unlink()
    files[0].write_bytes(before[1])                        # finished batches are not redone
    synth.synthesize_folder(photos, photos, adapter, sd, config, tmp_path)
    assert [f.read_bytes() for f in files] == [before[1], *before[1:]]


def test_prompts_work_in_stock_diffusers():
    from diffusers import StableDiffusionImg2ImgPipeline
    pipe = StableDiffusionImg2ImgPipeline.from_pretrained(MINI, safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    sd = models.load_stable_diffusion(MINI)
    base = sd.text_prompt("a photo in heavy snow", 8)
    adapter = prompt_adapter.PromptAdapter(sd.width, 8, base=base).eval()
    x = photo(1, 96, 96)[None]
    with torch.no_grad():
        prompts = adapter(x)
    out = pipe(prompt_embeds=prompts, image=x, strength=0.6, guidance_scale=2.0,
               num_inference_steps=5, output_type="pt",
               generator=torch.Generator().manual_seed(0)).images
    assert out.shape == x.shape and torch.isfinite(out).all() and out.std() > 0.01
    null = pipe.encode_prompt(None, "cpu", 1, True, prompt_embeds=prompts)[1]      # the pipeline's
    assert torch.allclose(null.float(), sd.null_prompt(prompts.shape[1]), atol=2e-3)


# ---------------------------------------------------------------- PKD

class Darker(nn.Module):
    """A teacher that is easy to learn."""

    def forward(self, x):
        return x * 0.7


def test_images_on_disk(tmp_path):
    images = [torch.rand(3, 8, 12).half() for _ in range(3)]
    stored = distill.on_disk(iter(images), tmp_path)
    assert stored.dtype is torch.float16 and torch.equal(stored, torch.stack(images))
    mapping = f"{tmp_path}{os.sep}"                        # Linux: the file is mapped, not listed
    if Path("/proc/self/maps").exists():
        assert mapping in Path("/proc/self/maps").read_text()
    assert not list(tmp_path.iterdir())
    pixels = [torch.randint(256, (3, 20, 20), dtype=torch.uint8) for _ in range(3)]
    mapped = distill.Crops(distill.on_disk(pixels, tmp_path), 16, 2)
    assert torch.equal(mapped.batch_at(5), distill.Crops(pixels, 16, 2).batch_at(5))
    with pytest.raises(ValueError, match=r"one size, not \[\(3, 8, 12\), \(3, 20, 20\)\]"):
        distill.on_disk([images[0], pixels[0]], tmp_path)
    with pytest.raises(ValueError, match=r"one size, not \[\]"):
        distill.on_disk([], tmp_path)


def test_distillation_learns_the_teacher_and_resumes(tmp_path):
    images = [(photo(i, 40, 48) * 255).to(torch.uint8) for i in range(4)]
    targets = list(distill.teacher_outputs(Darker(), images, "cpu"))
    checkpoint = tmp_path / "s.pt"

    def train(checkpoint=None, steps=40, keep=True, stop=None):
        torch.manual_seed(0)
        student = models.Restorer(8, (1, 1), 1, (1, 1))
        loader = distill.Crops(images, 24, 4, targets if keep else None)
        config = distill.DistillConfig(steps=steps, batch=4, save_every=10)
        if stop:
            with pytest.raises(KeyboardInterrupt):
                distill.distill(None, student, Interrupted(loader, stop), config,
                                checkpoint=checkpoint)
            return None
        reports = []
        l1 = distill.distill(Darker(), student, loader, config, checkpoint=checkpoint,
                             log=reports.append)
        assert reports[-1]["step"] == steps and reports[-1]["l1"] == l1
        return student, l1

    student, l1 = train()
    x = photo(9, 32, 32)[None]
    assert (student(x) - 0.7 * x).abs().mean() < 0.5 * (0.3 * x).abs().mean() and l1 < 0.1
    online, _ = train(keep=False)
    assert torch.allclose(student(x), online(x), atol=2e-2)
    train(checkpoint, stop=25)                             # the last checkpoint is that of step 20
    resumed, _ = train(checkpoint)
    assert torch.allclose(student(x), resumed(x), atol=1e-5)
    if os.name != "nt":                                    # a file that does not fit on the disk
        import resource
        before, limits = checkpoint.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, limits[1]))
        try:
            with pytest.raises(OSError):
                train(checkpoint, steps=60)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert checkpoint.read_bytes() == before
    with pytest.raises(ValueError, match="empty"):
        distill.distill(Darker(), student, [], distill.DistillConfig())


# ---------------------------------------------------------------- models

@pytest.mark.parametrize("block", ["nafnet", "residual"])
def test_restorer_takes_any_size_and_starts_as_the_identity(tmp_path, block):
    torch.manual_seed(0)
    model = models.Restorer(8, block=block)
    for height, width in ((64, 64), (37, 51), (5, 9), (1, 1)):
        x = torch.rand(2, 3, height, width)
        assert torch.equal(model(x), x)
    nn.init.normal_(model.ending.weight, std=0.1)
    models.save_restorer(model, tmp_path / "m.safetensors")
    loaded = models.load_restorer(tmp_path / "m.safetensors")
    assert torch.allclose(model.half().float()(x), loaded(x), atol=1e-4)
    assert loaded.config == model.config and not any(p.requires_grad for p in loaded.parameters())
    assert not list(tmp_path.glob("*.tmp"))
    with pytest.raises(ValueError, match="same number of levels"):
        models.Restorer(8, (1, 1), 1, (1,), block=block)
    with pytest.raises(ValueError, match="block must be 'nafnet' or 'residual', not 'naf'"):
        models.Restorer(8, block="naf")


def test_residual_block_is_the_sum_of_its_input_and_two_convolutions():
    block, x = models.ResidualBlock(4, norm=False), noise(0, 2, 4, 9, 12)
    assert torch.equal(block(x), x + block.conv2(block.conv1(x).relu()))


def test_folding_the_batch_norms_keeps_the_outputs(tmp_path):
    torch.manual_seed(0)
    model = models.Restorer(4, (1, 1), 1, (1, 1), block="residual", norm=True)
    nn.init.normal_(model.ending.weight, std=0.1)
    for i in range(3):
        model(noise(i, 4, 3, 32, 32))                      # running statistics
    x = noise(3, 2, 3, 40, 24)
    with_batch_statistics, folded = model(x), model.fold()
    assert model.training and model.config["norm"] and not folded.config["norm"]
    assert not any(isinstance(module, nn.BatchNorm2d) for module in folded.modules())
    assert not torch.allclose(with_batch_statistics, folded(x), atol=1e-3)
    assert torch.allclose(model.eval()(x), folded(x), atol=1e-5)
    models.save_restorer(model, tmp_path / "student.safetensors")
    loaded = models.load_restorer(tmp_path / "student.safetensors")
    assert loaded.config == folded.config
    assert torch.allclose(loaded(x), folded(x), atol=2e-3)             # fp16
    plain = models.Restorer(4)
    assert torch.equal(plain.eval()(x), plain.fold()(x))


def test_weights_without_a_block_entry_load_as_nafnet(tmp_path):
    model = models.Restorer(4)
    del model.config["block"]
    models.save_restorer(model, tmp_path / "old.safetensors")
    assert models.load_restorer(tmp_path / "old.safetensors").config["block"] == "nafnet"


def test_channel_attention_is_local_in_eval_mode():
    x, window = noise(0, 1, 2, 9, 12), 5
    expected = torch.empty_like(x)
    for i in range(9):
        for j in range(12):
            neighbours = x[..., max(0, i - 2):i + 3, max(0, j - 2):j + 3]
            expected[..., i, j] = neighbours.mean((-1, -2))
    assert torch.allclose(models.local_mean(x, window), expected, atol=1e-6)
    torch.manual_seed(0)
    model = models.Restorer(4, window=16).eval()
    nn.init.normal_(model.ending.weight, std=0.1)
    a = noise(1, 1, 3, 256, 32)
    b = a.clone()
    b[..., 224:, :] += 1                                   # too far from the first rows to matter
    assert torch.allclose(model(a)[..., :32, :], model(b)[..., :32, :], atol=1e-6)
    model.train()                                          # global attention: everything matters
    assert not torch.allclose(model(a)[..., :32, :], model(b)[..., :32, :], atol=1e-6)


@pytest.mark.parametrize("block", ["nafnet", "residual"])
def test_export_restorer(tmp_path, block):
    torch.manual_seed(0)
    model = models.Restorer(4, (1, 1), 1, (1, 1), window=16, block=block)
    model.eval().requires_grad_(False)
    nn.init.normal_(model.ending.weight, std=0.1)
    paths = models.export_restorer(model, tmp_path)
    assert paths == [path for path in (tmp_path / "student.pt2", tmp_path / "student.onnx")
                     if path.exists()]
    assert sorted(paths) == sorted(tmp_path.iterdir()) and tmp_path / "student.pt2" in paths
    program = torch.export.load(tmp_path / "student.pt2").module()
    for height, width in ((16, 16), (48, 96), (128, 32)):
        x = photo(4, height, width)[None]
        assert torch.allclose(program(x), model(x), atol=1e-5)


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
class Infinite(Net):
    def forward(self, x):
        return x / 0
class Fourier(Net):
    def forward(self, x):                                  # no bf16 support, like cuFFT
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
    """A network of another project: the module, and the folder with its net.py."""
    (tmp_path / "net.py").write_text(NETWORK)
    scope = {}
    exec(NETWORK, scope)
    torch.manual_seed(0)
    return scope["Net"](4), tmp_path


WRAPPINGS = {                                              # how checkpoints wrap a state_dict
    "plain": lambda state: state,
    "params": lambda state: {"params": state},
    "state_dict": lambda state: {"state_dict": state, "epoch": 3},
    "model": lambda state: {"model": state},
    "params_ema": lambda state: {"params_ema": state, "params": {}},
    "module.": lambda state: {f"module.{key}": value for key, value in state.items()},
    "net. and a loss": lambda state: {"state_dict": {f"net.{key}": value
                                                     for key, value in state.items()}
                                      | {"loss.weight": torch.ones(1)}},
}


@pytest.mark.parametrize("wrapping", WRAPPINGS)
@pytest.mark.parametrize("extension", ["pth", "ckpt", "safetensors"])
def test_third_party_teachers_load_from_common_checkpoints(network, wrapping, extension):
    model, folder = network
    path, state = folder / f"w.{extension}", WRAPPINGS[wrapping](model.state_dict())
    if extension == "safetensors":
        if not all(isinstance(value, torch.Tensor) for value in state.values()):
            pytest.skip("safetensors holds tensors only")
        save_file(state, path)
    else:
        torch.save(state, path)
    x = photo(1, 21, 34)[None]
    for spec in ("Net", "Net(width=4, outputs=2)", "make(width=4)"):
        teacher = models.load_restorer(f"{folder}/net.py:{spec}@{path}")
        assert torch.allclose(teacher(x), model(x), atol=1e-6)


def test_a_teacher_with_its_own_load_state_dict(network):
    """As in EDSR: without `assign`, and without a result."""
    model, folder = network
    torch.save(model.state_dict(), folder / "w.pth")
    (folder / "net.py").write_text(
        NETWORK + "\nNet.load_state_dict = lambda self, state, strict=True: None\n")
    x = photo(1, 21, 34)[None]
    teacher = models.load_restorer(f"{folder}/net.py:Net@{folder}/w.pth")
    assert torch.allclose(teacher(x), model(x), atol=1e-6)


def test_third_party_teachers_import_their_own_modules(network):
    """A teacher's `demo` and `evaluate` take precedence while it loads; ours are restored."""
    model, folder = network
    torch.save(model.state_dict(), folder / "w.pth")
    (folder / "demo").mkdir()
    (folder / "demo/__init__.py").write_text("")
    (folder / "demo/weather.py").write_text("theirs = 1")
    (folder / "evaluate.py").write_text("theirs = 2")
    (folder / "net.py").write_text("import evaluate\nfrom demo import weather\n"
                                   "assert (weather.theirs, evaluate.theirs) == (1, 2)\n" + NETWORK)
    path, modules = list(sys.path), dict(sys.modules)
    x = photo(1, 21, 34)[None]
    teacher = models.load_restorer(f"{folder}/net.py:Net@{folder}/w.pth")
    assert torch.allclose(teacher(x), model(x), atol=1e-6) and sys.path == path
    for name in ("demo", "demo.weather", "models", "evaluate"):
        assert sys.modules[name] is modules[name]
    (folder / "net.py").write_text("import evaluate\nraise RuntimeError('broken')\n")
    with pytest.raises(ValueError, match="broken"):
        models.load_restorer(f"{folder}/net.py:Net@{folder}/w.pth")
    assert sys.path == path and sys.modules["evaluate"] is evaluate


def test_unusable_teachers_are_rejected(network):
    model, folder = network
    weights = folder / "w.pth"

    def spec(name, file="w.pth"):
        return f"{folder}/net.py:{name}@{folder}/{file}"
    torch.save(model.state_dict(), weights)
    torch.save({"state_dict": model.state_dict(), "args": argparse.Namespace(lr=1)},
               folder / "code.pth")
    torch.save({"a": 1}, folder / "none.pth")
    (folder / "rubbish.pth").write_bytes(b"rubbish")
    (folder / "page.pth").write_bytes(b"<!DOCTYPE html>")           # a failed download
    (folder / "rubbish.safetensors").write_bytes(b"rubbish")
    (folder / "broken.py").write_text("import nothing_of_this_name")
    for bad, message in (
            (spec("Net", "code.pth"), "refused: it contains argparse.Namespace"),
            (spec("Net", "none.pth"), "no state_dict"),
            (spec("Net", "no.pth"), "no such file"),
            (spec("Net", "rubbish.pth"), "not a readable"),
            (spec("Net", "page.pth"), "not a readable"),
            (spec("Net", "rubbish.safetensors"), "not a readable"),
            (spec("Absent"), "Absent"),
            (spec("Net(4)"), "keyword literals"),
            (spec("Net(**{})"), "keyword literals"),
            (spec("Net(width=print())"), "keyword literals"),
            (spec("Net(width=5)"),
             r"size mismatch for body.weight: .*\[4, 3, 3, 3\].*\[5, 3, 3, 3\]"),
            (spec("number"), "not an nn.Module"),
            (f"{folder}/broken.py:Net@{weights}", "nothing_of_this_name.: install it, or remove"),
            (f"{folder}/no.py:Net@{weights}", "no such file"),
            (f"{folder}/rubbish.safetensors", "not a readable"),
            (f"{folder}/rubbish.pth", "FILE.py:NAME@WEIGHTS"),
            (f"{folder}/absent.safetensors", "no such file")):
        with pytest.raises(ValueError, match=message):
            models.load_restorer(bad)
    torch.save({"body.weight": model.body.weight, "extra": torch.ones(1)}, weights)
    with pytest.raises(ValueError, match=r"3 missing keys \['body.bias', .*"
                                         r"1 unexpected keys \['extra'\]"):
        models.load_restorer(spec("Net"))
    save_file(dict(model.state_dict()), folder / "foreign.safetensors")
    with pytest.raises(ValueError, match="FILE.py:NAME@WEIGHTS"):
        models.load_restorer(folder / "foreign.safetensors")


def test_third_party_teachers_keep_the_shape_with_the_right_multiple(network):
    model, folder = network
    torch.save(model.state_dict(), folder / "w.pth")
    halving, smaller = (f"{folder}/net.py:{name}@{folder}/w.pth" for name in ("Halving", "Smaller"))
    x = photo(1, 22, 35)[None]
    with pytest.raises(ValueError, match="teacher-multiple"):
        models.load_restorer(halving)(x)
    assert models.load_restorer(halving, multiple=4)(x).shape == x.shape
    with pytest.raises(ValueError, match=r"maps \(1, 3, 22, 35\) to \(1, 3, 22, 34\)"):
        models.load_restorer(smaller)(x)


def test_stable_diffusion_scales_latents_and_makes_prompts(sd):
    assert (sd.factor, sd.size, sd.width) == (8, 64, 128)
    x = photo(1, 64, 72)[None]
    z = sd.encode(x)
    assert z.shape == (1, 4, 8, 9)
    assert torch.allclose(z, sd.vae.encode(x * 2 - 1).latent_dist.mean * 0.18215, atol=1e-5)
    decoded = (sd.vae.decode(z / 0.18215).sample / 2 + 0.5).clamp(0, 1)
    assert torch.allclose(sd.decode(z), decoded, atol=1e-5)
    assert torch.allclose(sd.null_prompt(5), sd.null_prompt()[:, :5], atol=1e-5)    # CLIP is causal
    with pytest.raises(ValueError, match="2 to 32 tokens, not 33"):
        sd.null_prompt(33)
    with pytest.raises(ValueError, match="multiples of 8"):
        sd.encode(x[..., :63])


def test_trailing_timesteps_print_a_warning_unless_the_settings_suit_them(tmp_path, capsys):
    folder = make_sd(tmp_path / "turbo")
    file = folder / "scheduler/scheduler_config.json"
    trailing = json.loads(file.read_text()) | {"timestep_spacing": "trailing"}
    settings = "--scheduler ddim --guidance 1 --steps {0} --strength {1}"

    def warning(flags):
        run = d4ir.Run(d4ir.parse(["--task", "desnow", "--sd", str(folder), *flags.split()]))
        d4ir.check_diffusion(run)
        return capsys.readouterr().out

    assert warning("") == ""                               # an ordinary model
    file.write_text(json.dumps(trailing))
    for flags in ("", settings.format(4, 0.5), settings.format(2, 0.5) + " --guidance 3"):
        assert settings.format("K", "K/4") in warning(flags)
    for k in (1, 2, 3, 4):
        assert warning(settings.format(k, k / 4)) == ""


def test_models_other_than_stable_diffusion_are_rejected(tmp_path):
    xl = dict(addition_embed_type="text_time", addition_time_embed_dim=8,
              projection_class_embeddings_input_dim=64)
    without_tokenizer, incomplete = (make_sd(tmp_path / name) for name in ("words", "part"))
    shutil.rmtree(without_tokenizer / "tokenizer")
    text = json.loads((without_tokenizer / "text_encoder/config.json").read_text())
    path = incomplete / "unet/diffusion_pytorch_model.safetensors"
    state = load_file(path)
    del state["conv_out.bias"]
    save_file(state, path, metadata={"format": "pt"})
    for folder, message in (
            (tmp_path, "unet cannot be loaded"),
            (make_sd(tmp_path / "inpaint", in_channels=9), "inpainting"),
            (make_sd(tmp_path / "wide", cross_attention_dim=64), "text encoder"),
            (make_sd(tmp_path / "x0", "sample"), "'sample'"),
            (make_sd(tmp_path / "xl", **xl), "SDXL"),
            (make_sd(tmp_path / "lcm", time_cond_proj_dim=8), "LCM"),
            (without_tokenizer, f"2 tokens, but the text encoder expects {text['vocab_size']};"),
            (incomplete, "unet: 1 weights are missing from the file: conv_out.bias")):
        with pytest.raises(ValueError, match=message):
            models.load_stable_diffusion(folder)


# ---------------------------------------------------------------- evaluation

def test_psnr():
    a = torch.full((3, 16, 16), 100 / 255)
    expected = 10 * math.log10(255 ** 2 / 100)
    assert evaluate.psnr(a, a + 10 / 255) == pytest.approx(expected, abs=1e-6)
    assert evaluate.psnr(a, a + 0.4 / 255) == math.inf     # rounded, as in a saved PNG
    assert evaluate.psnr(a + 1, a * 0 + 1) == math.inf     # clamped
    two = torch.stack([a + 10 / 255, a + 1 / 255])
    mean = (28.1308 + 48.1308) / 2                         # of the photos' PSNR, not of their MSE
    assert evaluate.psnr(two, torch.stack([a, a])) == pytest.approx(mean, abs=1e-3)
    with pytest.raises(ValueError, match=r"\(3, 16, 16\) and \(3, 16, 8\)"):
        evaluate.psnr(a, a[..., :8])
    with pytest.raises(ValueError, match="floats in .* torch.uint8"):
        evaluate.psnr(a, a.byte())


def test_rgb_to_y_matches_matlab():
    colours = torch.tensor([[0., 0, 0], [1, 1, 1], [1, 0, 0], [0, 1, 0], [0, 0, 1]])
    expected = torch.tensor([16, 235, 81.481, 144.553, 40.966])
    y = evaluate.rgb_to_y(colours.T.reshape(3, 1, 5))
    assert torch.allclose(y.flatten() * 255, expected, atol=1e-3)


def test_ssim_equals_a_sliding_window_loop():
    a, b = (evaluate.to_255(photo(i, 17, 14)).numpy().astype(float) for i in (1, 2))
    ramp = np.arange(-5, 6)
    window = np.exp(-(ramp[:, None] ** 2 + ramp[None] ** 2) / (2 * 1.5 ** 2))
    window /= window.sum()
    values = []
    for c in range(3):
        for y in range(7):
            for x in range(4):
                p, q = a[c, y:y + 11, x:x + 11], b[c, y:y + 11, x:x + 11]
                mp, mq = (window * p).sum(), (window * q).sum()
                vp, vq = (window * (p - mp) ** 2).sum(), (window * (q - mq) ** 2).sum()
                cov = (window * (p - mp) * (q - mq)).sum()
                values.append((2 * mp * mq + 6.5025) * (2 * cov + 58.5225)
                              / ((mp ** 2 + mq ** 2 + 6.5025) * (vp + vq + 58.5225)))
    a, b = torch.tensor(a / 255), torch.tensor(b / 255)
    assert evaluate.ssim(a, b) == pytest.approx(np.mean(values), abs=1e-7)
    flipped = [torch.stack([x, x.flip(-1)]) for x in (a, b)]               # a batch: the mean
    assert evaluate.ssim(*flipped) == pytest.approx(np.mean(values), abs=1e-7)
    with pytest.raises(ValueError, match="11x11"):
        evaluate.ssim(torch.rand(3, 10, 20), torch.rand(3, 10, 20))


def golden_pair(height, width):
    """Two images that are easy to reproduce: waves, and the same with a grid of dots."""
    y, x = np.mgrid[:height, :width]
    channels = [127 + 90 * np.sin(x / 7 + c) * np.cos(y / 11 - c) for c in range(3)]
    a = np.stack(channels, -1).round()
    b = np.clip(a + 40 * ((x * 7 + y * 13) % 17 == 0)[..., None] + 5, 0, 255)
    return a.astype(np.uint8), b.astype(np.uint8)


# Computed once with scikit-image 0.26.0 on a, b = golden_pair(height, width):
#   peak_signal_noise_ratio(a, b, data_range=255)
#   structural_similarity(a, b, channel_axis=-1, data_range=255, gaussian_weights=True, sigma=1.5,
#                         use_sample_covariance=False)
# and in the same way, without channel_axis, on
#   Y = a.astype(float) @ (65.481, 128.553, 24.966) / 255 + 16.
GOLDEN = {(64, 96): [26.59646, 0.74930, 27.91990, 0.70724],
          (37, 53): [26.58406, 0.74918, 27.90947, 0.70144]}


@pytest.mark.parametrize("size", GOLDEN)
def test_golden_values_of_scikit_image(size):
    a, b = (torch.from_numpy(image).movedim(-1, 0) / 255 for image in golden_pair(*size))
    metrics = evaluate.measure(b, a)
    assert [metrics[key] for key in evaluate.METRICS] == pytest.approx(GOLDEN[size], abs=2e-5)


LAYOUTS = {                                                # name: degraded photos, ground truths
    "Rain100L": (["input/1.png", "input/2.png", "input/10.png"],
                 ["target/1.png", "target/2.png", "target/10.png"]),
    "PReNet": (["rainy/rain-001.png", "rainy/rain-002.png"], ["norain-001.png", "norain-002.png"]),
    "RCDNet": (["rain/rain-001.png", "rain/rain-002.png"],
               ["norain/norain-001.png", "norain/norain-002.png"]),
    "RCDNet, same names": (["rain/1.png"], ["norain/1.png"]),
    "rainy and gt": (["rainy/rain-100.png"], ["gt/norain-100.png"]),
    "SOTS": (["input/0001_0.8_0.2.jpg", "input/0001_1_0.1.jpg", "input/0002_0.8_0.08.jpg"],
             ["target/0001.png", "target/0001.png", "target/0002.png"]),
    "SOTS archive": (["outdoor/hazy/0001_0.8_0.2.JPG"], ["outdoor/clear/0001.png"]),
    "SOTS gt": (["hazy/1400_1.png", "hazy/1400_2.png"], ["gt/1400.png", "gt/1400.png"]),
    "GT and IN": (["IN/a.png"], ["GT/a.png"]),
    "GT and hazy": (["hazy/a.png"], ["GT/a.png"]),
    "Snow100K": (["Snow100K-S/synthetic/x_1.jpg", "Snow100K-S/synthetic/x_2.jpg"],
                 ["Snow100K-S/gt/x_1.jpg", "Snow100K-S/gt/x_2.jpg"]),
    "Snow100K, other extensions": (["Snow/a_1.tif", "Snow/b_1.TIF"], ["Gt/a_1.bmp", "Gt/b_1.webp"]),
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
        assert [(pair.degraded, pair.truth) for pair in evaluate.find_pairs(start)] == expected


def test_ambiguous_and_unmatched_sets_are_rejected(tmp_path, monkeypatch):
    image = photo(0, 12, 12)

    def make(name, *files):
        for file in files:
            save(image, tmp_path / name / file)
        return tmp_path / name
    empty = tmp_path / "e"
    empty.mkdir()
    for folder, message in (
            (make("a", "input/1.png", "input/2.png", "target/1.png"),
             r"without ground truth: 2.png \(1\)"),
            (make("b", "input/1.png", "target/1.png", "target/2.png"),
             r"without a degraded photo: 2.png \(1\)"),
            (make("c", "input/1.png", "rain/1.png", "gt/1.png"),
             "ambiguous layout.*input, rain"),
            (make("d", "input/1.png", "gt/1.png", "gt/1.jpg"), "1.jpg and 1.png share a name"),
            (empty, "no image file"),
            (tmp_path / "absent", "no such folder")):
        with pytest.raises(ValueError, match=message):
            evaluate.find_pairs(folder)
    assert evaluate.find_pairs(make("f", "1.png")) == []   # photos without ground truth
    web = make("web", "snow/1.png", "rain/1.png", "haze/1.png", "clean/1.png")
    assert evaluate.find_pairs(web / "snow") == []
    monkeypatch.chdir(make("h", "input/1.png", "gt/1.png"))
    assert [pair.set for pair in evaluate.find_pairs(".")] == ["h"]


def test_sets_are_found_up_to_three_levels_deep(tmp_path):
    for folder in ("L", "S/a", "x/y/z", "x/y/z/too_deep", "S/.hidden"):
        save(photo(0, 12, 12), tmp_path / folder / "input/1.png")
        save(photo(0, 12, 12), tmp_path / folder / "target/1.png")
    save(photo(0, 12, 12), tmp_path / "1/2/3/4/input/1.png")
    save(photo(0, 12, 12), tmp_path / "1/2/3/4/target/1.png")
    assert [pair.set for pair in evaluate.find_pairs(tmp_path)] == ["L", "S/a", "x/y/z"]


def test_larger_ground_truths_are_centre_cropped_and_other_sizes_rejected(tmp_path):
    truth = photo(0, 24, 30)
    save(truth, tmp_path / "gt/1.png")
    save(truth[:, 2:22, 5:25], tmp_path / "hazy/1_1.png")
    (pair,) = evaluate.find_pairs(tmp_path)
    result = evaluate.evaluate(None, [pair])
    assert result["psnr_rgb"] == math.inf and result["cropped"] == 1
    save(truth[:, :, :20], tmp_path / "gt/1.png")
    save(truth, tmp_path / "hazy/1_1.png")
    with pytest.raises(ValueError, match=r"\(24, 30\) px, but its ground truth .* is \(24, 20\)"):
        evaluate.evaluate(None, evaluate.find_pairs(tmp_path))
    with pytest.raises(ValueError, match="no pairs"):
        evaluate.evaluate(None, [])


def test_images_of_every_mode_are_read(tmp_path):
    rgb = demo.weather.to_pil(photo(0, 20, 30).permute(1, 2, 0).numpy())
    expected = torch.from_numpy(np.array(rgb)).movedim(-1, 0)
    for mode, name in (("RGB", "a.png"), ("RGBA", "b.png"), ("P", "c.png"), ("L", "d.png"),
                       ("CMYK", "e.tif"), ("1", "f.png"), ("LA", "g.png")):
        image = evaluate.read_image(save(rgb.convert(mode), tmp_path / name))
        assert image.dtype == torch.uint8 and image.shape == (3, 20, 30)
        if mode in ("RGB", "RGBA", "CMYK"):
            assert torch.equal(image, expected)
    deep = np.asarray(rgb.convert("L")).astype(np.uint16) * 257
    image = evaluate.read_image(save(Image.fromarray(deep), tmp_path / "h.png"))
    assert (image[0].numpy() == deep // 257).all()
    exif = Image.Exif()
    exif[0x0112] = 6                                       # orientation: rotated by 90 degrees
    assert evaluate.read_image(save(rgb, tmp_path / "i.jpg", exif=exif)).shape == (3, 30, 20)
    exif[0x011a] = 72.0                                    # a resolution,
    data = exif.tobytes().replace(b"\x01\x1a\x00\x05", b"\x01\x1a\x00\x02")
    data = data.replace(b"\x1a\x01\x05\x00", b"\x1a\x01\x02\x00")          # as text: TypeError
    broken = save(rgb, tmp_path / "m.jpg", exif=data).read_bytes()
    truncated = (tmp_path / "a.png").read_bytes()[:60]
    for name, data in (("j.png", b""), ("k.jpg", b"rubbish"), ("l.png", truncated),
                       ("m.jpg", broken)):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(ValueError, match=f"{name}: not a readable image"):
            evaluate.read_image(tmp_path / name)


def test_list_images_sorts_numbers_and_ignores_hidden_files(tmp_path):
    for name in (".thumbnails/a.png", "b/10.png", "b/2.png", "b/.c.png"):
        save(photo(0, 12, 12), tmp_path / name)
    (tmp_path / "b/notes.txt").write_text("x")
    images = evaluate.list_images(tmp_path, recursive=True)
    assert [path.name for path in images] == ["2.png", "10.png"]
    assert evaluate.list_images(tmp_path) == []


def test_list_images_follows_links_once(tmp_path):
    for name in ("photos/12²3.png", "elsewhere/a.png"):
        save(photo(0, 8, 8), tmp_path / name)
    (tmp_path / "photos/link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere/loop").symlink_to(tmp_path / "photos")
    names = [path.name for path in evaluate.list_images(tmp_path / "photos", recursive=True)]
    assert names == ["12²3.png", "a.png"]
    assert len(evaluate.list_images(tmp_path / "photos")) == 1


def test_an_interrupted_evaluation_resumes(demo_run, tmp_path, monkeypatch):
    """Models that were evaluated before the run was killed are not evaluated again."""
    shutil.copytree(demo_run[0], tmp_path / "run")
    (tmp_path / "run/metrics.json").unlink()
    evaluated, original = [], evaluate.evaluate

    def stop_at_student(model, pairs, *, tile, label):
        evaluated.append(label)
        if evaluated == ["input", "teacher", "student"]:
            raise KeyboardInterrupt
        return original(model, pairs, tile=tile, label=label)

    monkeypatch.setattr(d4ir, "evaluate", stop_at_student)
    command = ["--task", "desnow", "--out", str(tmp_path / "run"), *TINY]
    with pytest.raises(KeyboardInterrupt):
        d4ir.main(command)
    d4ir.main(command)
    assert evaluated == ["input", "teacher", "student", "student"]
    assert (tmp_path / "run/metrics.json").exists()
    assert not (tmp_path / "run/teacher.json").exists()


def test_tiles_cover_a_photo_and_fade():
    for length, tile, overlap in ((100, 30, 8), (1000, 512, 64), (513, 512, 64), (30, 30, 8),
                                  (7, 30, 8)):
        total = torch.zeros(length)
        for start, end, fade in evaluate.spans(length, tile, overlap):
            assert end <= length and fade.min() > 0
            total[start:end] += fade
        assert total.min() > 0.5
    x, identity = photo(1, 90, 130), models.Restorer(4)
    assert torch.allclose(evaluate.restore(identity, x, tile=48, overlap=16), x, atol=1e-5)


@pytest.mark.parametrize("kind", demo.weather.KINDS)
def test_tiled_and_whole_restoration_agree_on_a_large_photo(kind):
    teacher = models.load_restorer(demo.WEIGHTS / "teacher.safetensors")
    rng = np.random.default_rng(5)
    image, depth = demo.scenes.render_scene(rng, 1024, 1024)
    degraded, _ = demo.weather.add_weather(image, depth, kind, demo.weather.ORIGINAL, rng)
    x, truth = (torch.from_numpy(a).permute(2, 0, 1) for a in (degraded, image))
    whole, tiled = (evaluate.restore(teacher, x, tile) for tile in (0, 512))
    assert abs(evaluate.psnr(whole, truth) - evaluate.psnr(tiled, truth)) < 0.05


def test_restore_folder(tmp_path, capsys):
    identity, source = models.Restorer(4), tmp_path / "in"

    def written(folder):
        paths = evaluate.list_images(folder, recursive=True)
        return [path.relative_to(folder).as_posix() for path in paths]
    image = evaluate.read_image(save(photo(3, 45, 61), source / "sub/c.png"))
    save(photo(4, 30, 30), source / "a b.jpg")
    (source / "d.png").write_bytes(b"rubbish")
    evaluate.restore_folder(identity, source, tmp_path / "out", 32)
    assert written(tmp_path / "out") == ["a b.png", "sub/c.png"]
    output = capsys.readouterr().out
    assert "skipped:" in output and "d.png: not a readable" in output
    assert torch.equal(evaluate.read_image(tmp_path / "out/sub/c.png"), image)
    save(photo(5, 30, 30), source / "a b.png")             # two photos with the same stem
    for _ in range(2):                                     # outputs are not restored again
        evaluate.restore_folder(identity, source, source / "out")
        assert written(source / "out") == ["a b.jpg.png", "a b.png.png", "sub/c.png"]
    evaluate.restore_folder(identity, source / "sub/c.png", tmp_path / "one")
    assert written(tmp_path / "one") == ["c.png"] and not list(tmp_path.rglob("*.tmp"))
    for photos, folder, message in ((source, source, "is one of the photos"),
                                    (source / "d.png", tmp_path / "one", "can be read")):
        with pytest.raises(ValueError, match=message):
            evaluate.restore_folder(identity, photos, folder)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no image file"):
        evaluate.restore_folder(identity, tmp_path / "empty", tmp_path / "one")


def test_cost():
    net = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 3, 1)).requires_grad_(False)
    costs = evaluate.cost(net, 64)
    assert costs["params"] == 3 * 16 * 9 + 16 + 16 * 3 + 3
    assert costs["gmacs"] == pytest.approx(64 * 64 * (3 * 16 * 9 + 16 * 3) / 1e9)
    floats = 64 * 64 * (3 + 16 + 3) + costs["params"]      # input, both outputs, weights
    assert costs["peak_mb"] == pytest.approx(floats * 4 / 2 ** 20, rel=0.01)
    assert costs["ms"] > 0

    class Chain(nn.Module):                                # two activations are live at a time
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 1)

        def forward(self, x):
            for _ in range(10):
                x = self.conv(x)
            return x
    floats = 64 * 64 * 3 * 3 + 12                          # the input is live, too
    assert evaluate.cost(Chain(), 64)["peak_mb"] == pytest.approx(floats * 4 / 2 ** 20, rel=0.01)

    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.p = nn.Parameter(torch.ones(1))

        def forward(self, x):
            q = x.flatten(2).mT[:, None]                                    # (1,1,256,3)
            return nn.functional.scaled_dot_product_attention(q, q, q)
    assert evaluate.cost(Attention(), 16)["gmacs"] == pytest.approx(2 * 256 * 256 * 3 / 1e9)


def test_report_table_csv_and_figure(tmp_path):
    for name in ("A", "B"):
        for i in range(1, 5):
            save(photo(i, 20, 30), tmp_path / name / f"input/{i}.png")
            save(photo(i + 4, 20 + 2 * (name == "B"), 30), tmp_path / name / f"gt/{i}.png")
    pairs = evaluate.find_pairs(tmp_path)
    nets = {"input": None, "teacher": models.Restorer(4), "student": models.Restorer(2)}
    results = {name: evaluate.evaluate(net, pairs) for name, net in nets.items()}
    metrics = {"task": "derain"} | evaluate.report(nets, results)
    assert metrics["test_set"] == "A + B" and metrics["n_images"] == 8
    assert set(metrics["input"]) == set(evaluate.METRICS)
    for name in ("teacher", "student"):
        assert set(metrics[name]) == {*evaluate.METRICS, *evaluate.COSTS}
    assert metrics["ratio"]["params"] == metrics["teacher"]["params"] / metrics["student"]["params"]
    halves = [metrics["sets"][name]["student"]["ssim_y"] for name in ("A", "B")]
    assert metrics["sets"]["B"]["n_images"] == 4
    assert sum(halves) / 2 == pytest.approx(metrics["student"]["ssim_y"])
    assert "truths of 4 photos" in metrics["note"] and "on cpu" in metrics["cost_at"]
    assert metrics["definitions"] == evaluate.DEFINITIONS
    lines = evaluate.table(metrics).splitlines()
    assert lines[0] == "# derain: A + B (8 photos)" and "| B (4): student |" in lines[12]
    assert {line.count("|") for line in lines[2:14]} == {10} and lines[-1].endswith("cropped.")
    evaluate.write_csv(results, tmp_path / "m.csv")
    rows = [line.split(",") for line in (tmp_path / "m.csv").read_text().splitlines()]
    assert rows[0][:3] == ["set", "image", "input_psnr_rgb"] and len(rows) == 9
    assert rows[5][:2] == ["B", "1.png"] and {len(row) for row in rows} == {14}
    assert float(rows[5][-1]) == pytest.approx(results["student"]["images"][4]["ssim_y"], abs=1e-5)
    evaluate.comparison_figure(nets, pairs, tmp_path / "f.png")
    with Image.open(tmp_path / "f.png") as sheet:          # six rows of 256x171 px, four columns
        assert sheet.size == (4 * 260, 18 + 6 * (4 + 171))
    one = evaluate.report(nets, {name: evaluate.evaluate(net, pairs[:2])
                                 for name, net in nets.items()})
    assert "sets" not in one and "note" not in one and one["test_set"] == "A"


def test_plot_losses(tmp_path):
    log, picture = tmp_path / "log.jsonl", tmp_path / "losses.png"

    def plot(*records, end=""):
        log.write_text("".join(json.dumps(record) + "\n" for record in records) + end)
        picture.unlink(missing_ok=True)
        evaluate.plot_losses(log, picture)
        return picture.read_bytes() if picture.exists() else None
    falling = [{"stage": "adapter", "step": 50 * i, "diffusion": 1 / i, "contrastive": 5.0,
                "steps_per_s": 3.1} for i in (1, 2, 3)]
    distilled = {"stage": "distill", "step": 100, "l1": 0.03, "steps_per_s": 10.2}
    whole = plot(*falling, distilled)
    with Image.open(picture) as image:
        assert image.size == (3 * 300, 200)                # one panel per stage and loss
        blue = [(x, y) for x in range(300) for y in range(200)
                if image.getpixel((x, y)) == (0, 0, 255)]
        assert min(blue)[1] < 30 and max(blue)[1] > 170    # from the top left to the bottom right
    repeated = dict(falling[1], diffusion=9.0)             # its step occurs again, after a resume
    assert plot(falling[0], repeated, *falling[1:], distilled) == whole
    assert plot(*falling, distilled, end='{"stage": "dist') == whole       # killed while writing
    assert plot(*falling, dict(distilled, step=200, l1=math.nan), distilled) == whole
    assert plot() is None and plot(distilled) is not None


# ---------------------------------------------------------------- the demo

ORIGINAL = demo.weather.ORIGINAL


def test_scenes_and_weather():
    image, depth = demo.scenes.render_scene(np.random.default_rng(3), 64, 80)
    again = demo.scenes.render_scene(np.random.default_rng(3), 64, 80)
    assert np.array_equal(image, again[0]) and np.array_equal(depth, again[1])
    assert image.shape == (64, 80, 3) and 0 <= image.min() and image.max() <= 1
    assert depth.shape == (64, 80) and depth.min() > 0
    add_weather = demo.weather.add_weather
    uniform_haze = demo.weather.Weather(beta=(0.01, 0.01), airlight=(0.9, 0.9), tint=0)
    hazy, _ = add_weather(image, depth, "haze", uniform_haze, np.random.default_rng(0))
    t = np.exp(-0.01 * depth)[..., None]
    assert np.allclose(hazy, image * t + 0.9 * (1 - t), atol=1e-5)         # Koschmieder
    for kind in ("rain", "snow"):
        for domain in demo.weather.DOMAINS.values():
            made, phrases = add_weather(image, depth, kind, domain, np.random.default_rng(1))
            assert made.shape == image.shape and made.dtype == np.float32 and kind in phrases[0]
    dark = image * 0.3
    snowy, _ = add_weather(dark, depth, "snow", ORIGINAL, np.random.default_rng(1))
    assert (snowy >= dark - 1e-5).all() and snowy.mean() > dark.mean()
    with pytest.raises(ValueError, match="hail"):
        add_weather(image, depth, "hail", ORIGINAL, np.random.default_rng(0))


def test_defocus_keeps_the_colours_of_the_scene_and_leaves_rain_sharp():
    image, depth = demo.scenes.render_scene(np.random.default_rng(3), 96, 96)
    sharpness = lambda x: np.abs(np.diff(x, axis=1)).mean()
    add_weather = demo.weather.add_weather
    always = dataclasses.replace(ORIGINAL, defocus=1.0)
    blurred, _ = add_weather(image, depth, "clear", always, np.random.default_rng(1))
    assert sharpness(blurred) < 0.3 * sharpness(image)
    assert np.allclose(blurred.mean((0, 1)), image.mean((0, 1)), atol=0.03)
    rain, _ = add_weather(image, depth, "rain", always, np.random.default_rng(1))
    assert sharpness(rain) > 2 * sharpness(blurred)
    assert ORIGINAL.defocus == demo.weather.WEB.defocus == 0       # only used in pretraining


def test_captions_of_mirrored_photos():
    mirrored = demo.pretrain.mirrored_caption
    left = "a photo in heavy rain, long streaks, blown to the left"
    assert mirrored(left) == left.replace("left", "right") and mirrored(mirrored(left)) == left
    assert mirrored(demo.weather.CLEAR) == demo.weather.CLEAR and mirrored("") == ""


def test_streaks_have_the_requested_angle():
    for angle in (-0.5, 0.0, 0.4):
        rng = np.random.default_rng(0)
        opacity = demo.weather.particles(rng, 128, 128, 0.05, 30, 2.0, angle, 2)
        gy, gx = np.gradient(opacity)
        # Direction of the mean structure tensor's main axis: across the streaks.
        across = 0.5 * math.atan2(2 * (gx * gy).mean(), (gx ** 2 - gy ** 2).mean())
        assert -across == pytest.approx(angle, abs=0.06) and 0.02 < opacity.mean() < 0.1


def test_demo_photos_are_reproducible_and_existing_files_are_kept(tmp_path):
    write = lambda folder, weather: demo.photos.write_photos(
        folder, weather, ("degraded", "clean", "test", "original"), degraded=2, clean=1, test=1,
        original=1)
    write(tmp_path / "a", ("snow",))
    write(tmp_path / "b", ("snow",))
    files = sorted(f.relative_to(tmp_path / "a") for f in (tmp_path / "a").rglob("*.png"))
    assert [str(f) for f in files] == [
        "clean/0000.png", "degraded/0000.png", "degraded/0001.png", "original/0000.png",
        "test/input/0000.png", "test/target/0000.png"]
    contents = {f: (tmp_path / "a" / f).read_bytes() for f in files}
    assert len(set(contents.values())) == len(files)
    assert all((tmp_path / "b" / f).read_bytes() == data for f, data in contents.items())
    (tmp_path / "a/degraded/0000.png").write_bytes(b"kept")
    (tmp_path / "a/degraded/0001.png").unlink()
    write(tmp_path / "a", ("snow",))
    assert (tmp_path / "a/degraded/0000.png").read_bytes() == b"kept"
    assert (tmp_path / "a/degraded/0001.png").read_bytes() == contents[files[2]]
    for kinds in (("hail",), ()):
        with pytest.raises(ValueError, match="weather must be some of"):
            write(tmp_path / "c", kinds)


def test_demo_settings_are_options_and_importing_the_demo_is_cheap():
    destinations = {action.dest for action in d4ir.make_parser()._actions}
    assert set(demo.SETTINGS) <= destinations
    check = "import demo, sys; sys.exit('numpy' in sys.modules or 'torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check], cwd=HERE).returncode == 0


@pytest.mark.slow
def test_pretraining_writes_weights_and_a_log_and_resumes(tmp_path):
    sizes = ["--photos", "8", "--teacher-photos", "8", "--vae-batch", "2", "--unet-batch", "2",
             "--teacher-batch", "2", "--vae-steps", "2", "--unet-steps", "2"]
    folders = ["--work", tmp_path / "work", "--weights", tmp_path / "weights"]
    for steps in ("1", "2"):
        command = [sys.executable, "-m", "demo.pretrain", *sizes, *map(str, folders)]
        command += ["--teacher-steps", steps]
        done = subprocess.run(command, cwd=HERE, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    models.load_stable_diffusion(tmp_path / "weights/mini-sd")
    models.load_restorer(tmp_path / "weights/teacher.safetensors")
    lines = [json.loads(line) for line in (tmp_path / "work/log.jsonl").read_text().splitlines()]
    assert [(line["stage"], line["step"]) for line in lines] == [
        ("vae", 2), ("teacher", 1), ("unet", 2), ("teacher", 2)]
    assert all(math.isfinite(line["loss"]) and line["steps_per_s"] > 0 for line in lines)


# ---------------------------------------------------------------- the command line

@pytest.fixture(scope="session")
def demo_run(tmp_path_factory):
    """The bundled demo on a tiny budget, and its output."""
    out = tmp_path_factory.mktemp("runs") / "desnow"
    done = run_demo("--task", "desnow", "--out", out, *TINY)
    assert done.returncode == 0, done.stderr
    return out, done


@pytest.mark.slow
def test_the_first_command_renders_the_photos(tmp_path):
    done = run("--task", "desnow", "--out", tmp_path / "run", *TINY, "--stage", "adapter")
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "run/demo/desnow"
    assert len(list((folder / "degraded").iterdir())) == demo.photos.WEB_DEGRADED
    assert len(list((folder / "clean").iterdir())) == demo.photos.WEB_CLEAN


def test_the_bundled_demo_writes_every_file(demo_run):
    out, done = demo_run
    for name in ("config.json", "adapter.safetensors", "adapter.png", "log.jsonl", "losses.png",
                 "synth/000000.png", "synth/000005.png", "synth.png", "student.safetensors",
                 "metrics.json", "metrics.md", "metrics.csv", "figure.png"):
        assert (out / name).is_file(), name
    assert not list(out.rglob("*.tmp")) and not list(out.glob("*.pt"))
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["task"] == "desnow" and metrics["n_images"] == demo.photos.TEST
    for name in ("input", "teacher", "student"):
        assert set(evaluate.METRICS) <= metrics[name].keys()
    costs = {"params", "gmacs", "ms", "peak_mb"}
    assert costs <= metrics["teacher"].keys() & metrics["student"].keys()
    assert len((out / "metrics.csv").read_text().splitlines()) == 1 + demo.photos.TEST
    config = json.loads((out / "config.json").read_text())
    assert config["adapter"]["steps"] == 4 and config["evaluate"]["tile"] == 1024
    assert "torch" in config["versions"] and "anchor" in config["additions"]
    assert "using the bundled demo for: --degraded, --clean, --test, --sd, --teacher" in done.stdout
    additions = ("residual, weather_weight, caption_base, penalty, negative_prompt, "
                 "anchor, select")
    assert f"additions: {additions}\n" in done.stdout
    assert "Traceback" not in done.stderr
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [(line["stage"], line["step"]) for line in log] == [("adapter", 4), ("distill", 6)]


def test_a_rerun_does_nothing_and_other_settings_are_rejected(demo_run):
    out, _ = demo_run
    times = lambda: {f: f.stat().st_mtime_ns for f in out.rglob("*")
                     if f.is_file() and f.name not in ("config.json", "lock")}
    before = times()
    again = run_demo("--task", "desnow", "--out", out, *TINY)
    assert again.returncode == 0 and again.stdout.count("already finished") == 4, again.stderr
    assert before == times()
    other = run_demo("--task", "desnow", "--out", out, *TINY, "--strength", "0.4",
                     "--photo-size", "99")
    assert other.returncode == 2 and other.stdout == "" and len(other.stderr.splitlines()) == 1
    strength = demo.SETTINGS["strength"]
    assert f"strength of synth was {strength}, now 0.4" in other.stderr
    assert "photo_size of adapter was 1024, now 99" in other.stderr
    assert "--restart --stage adapter" in other.stderr


def test_restore_and_export(demo_run, tmp_path):
    out, _ = demo_run
    image = photo(3, 45, 61)
    save(image, tmp_path / "in/a b.jpg")
    save(image, tmp_path / "in/c.png")
    (tmp_path / "in/d.png").write_bytes(b"rubbish")
    done = run("--task", "desnow", "--stage", "restore", "--input", tmp_path / "in",
               "--model", out / "student.safetensors", "--output", tmp_path / "out")
    assert done.returncode == 0 and "d.png: not a readable image" in done.stdout, done.stderr
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["a b.png", "c.png"]
    student = models.load_restorer(out / "student.safetensors")
    degraded = evaluate.read_image(tmp_path / "in/c.png")[None] / 255
    expected = evaluate.to_255(student(degraded)[0])
    assert (evaluate.read_image(tmp_path / "out/c.png") - expected).abs().max() <= 1
    done = run("--task", "desnow", "--stage", "export", "--out", out)
    assert done.returncode == 0, done.stderr
    program = torch.export.load(out / "student.pt2").module()
    for height, width in ((64, 64), (48, 96), (128, 32)):
        x = photo(4, height, width)[None]
        assert torch.allclose(program(x), student(x), atol=1e-4)
    if (out / "student.onnx").exists():
        ort = pytest.importorskip("onnxruntime")
        session = ort.InferenceSession(str(out / "student.onnx"))
        restored = session.run(None, {"image": x.numpy()})[0]
        assert np.allclose(restored, student(x).numpy(), atol=1e-3)


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """Folders like those of users: unusual modes, small photos, unreadable files."""
    root = tmp_path_factory.mktemp("photos")
    for i in range(4):
        save(photo(i, 110 + i, 130), root / f"bad/{i}.jpg")
        save(photo(10 + i, 120, 100 + i), root / f"good/sub/{i}.PNG")
        save(photo(20 + i, 40, 56), root / f"test/input/{i}.png")
        save(photo(30 + i, 40, 56), root / f"test/target/{i}.png")
    save(to_pil(photo(5, 50, 60)).convert("CMYK"), root / "bad/small.jpg")
    save(to_pil(photo(6, 120, 120)).convert("P"), root / "good/palette.png")
    (root / "bad/broken.png").write_bytes(b"rubbish")
    (root / "empty").mkdir()
    (root / "rubbish").mkdir()
    (root / "rubbish/a.png").write_bytes(b"rubbish")
    return root


@pytest.fixture
def own_photos(folders):
    """The flags of a small run with a user's own photos."""
    return ["--degraded", folders / "bad", "--clean", folders / "good", "--test",
            folders / "test", "--student-width", "4", *TINY]


def test_own_photos(own_photos, tmp_path):
    done = run("--task", "all", *own_photos, "--out", tmp_path / "run",
               "--no-distill-keep-teacher")
    assert done.returncode == 0, done.stderr
    assert "using the bundled demo for: --sd, --teacher" in done.stdout
    assert "broken.png: not a readable image" in done.stdout
    assert "1 of 5 photos are smaller" in done.stdout
    assert json.loads((tmp_path / "run/metrics.json").read_text())["n_images"] == 4


def test_photos_are_resized_by_their_longer_side(tmp_path):
    """The shorter side is at least the crop; smaller photos are enlarged, strips are cropped."""
    picture = lambda height, width: torch.zeros(3, height, width, dtype=torch.uint8)
    for size, fitted in (((3000, 2000), (300, 200)), ((2000, 4000), (150, 300)),
                         ((4000, 1000), (300, 100)), ((200, 300), (200, 300)),
                         ((50, 70), (100, 140)), ((100, 900), (100, 300)),
                         ((2, 9000), (100, 300))):
        assert d4ir.fit_photo(picture(*size), 300, 100).shape == (3, *fitted), size
        turned = d4ir.fit_photo(picture(*size[::-1]), 300, 100)
        assert turned.shape == (3, *fitted[::-1])
    save(photo(0, 150, 200), tmp_path / "photos/a.png")
    run = d4ir.Run(d4ir.parse(["--task", "desnow", "--photo-size", "120"]))
    (small,) = d4ir.load_photos(tmp_path / "photos", 64, run, "--clean")
    assert small.shape == (3, 90, 120)


def test_an_adapter_of_another_run(demo_run, own_photos, tmp_path):
    """It is copied, recorded by its sha256, and used with another model and other photos."""
    adapter, out = demo_run[0] / "adapter.safetensors", tmp_path / "run"
    command = ["--task", "derain", *own_photos, "--sd", make_sd(tmp_path / "sd", "v_prediction"),
               "--precision", "fp32", "--out", out, "--adapter"]
    done = run(*command, adapter)
    assert done.returncode == 0, done.stderr
    assert (out / "adapter.safetensors").read_bytes() == adapter.read_bytes()
    assert (out / "adapter.png").exists() and (out / "metrics.json").exists()
    assert f"additions: those in {adapter}\n" in done.stdout
    digest = hashlib.sha256(adapter.read_bytes()).hexdigest()
    config = json.loads((out / "config.json").read_text())
    assert config["adapter"]["adapter_sha256"] == digest

    other = tmp_path / "other.safetensors"
    prompt_adapter.save_adapter(prompt_adapter.PromptAdapter(128, 8), other)
    done = run(*command, other)
    assert done.returncode == 2 and f"adapter_sha256 of adapter was '{digest}'" in done.stderr
    done = run(*command[:-1])                              # --adapter was forgotten
    assert done.returncode == 2 and f"was '{digest}', now None" in done.stderr
    done = run(*command, other, "--stage", "adapter", "--restart")
    assert done.returncode == 0, done.stderr
    assert (out / "adapter.safetensors").read_bytes() == other.read_bytes()
    assert not (out / "synth").exists()                    # made with the earlier adapter
    done = run(*command, other, "--stage", "synth")
    assert done.returncode == 0 and (out / "synth.png").exists(), done.stderr
    with pytest.raises(ValueError, match="adapter.safetensors is in the run folder"):
        d4ir.main([*map(str, command), str(out / "adapter.safetensors"), "--restart"])
    assert (out / "adapter.safetensors").exists()          # --restart would have deleted it


def test_an_adapter_must_fit_the_stable_diffusion(own_photos, tmp_path):
    command = ["--task", "derain", *own_photos, "--out", tmp_path / "run", "--adapter"]
    for tokens, width in ((4, 64), (33, 128), (1, 128)):
        file = tmp_path / f"{tokens}-{width}.safetensors"
        prompt_adapter.save_adapter(prompt_adapter.PromptAdapter(width, tokens, channels=2), file)
        message = (f"{file.name}: its prompts have {tokens} tokens of width {width}, but .*mini-sd "
                   "takes 2 to 32 of width 128")
        with pytest.raises(ValueError, match=message):
            d4ir.main([*map(str, command), str(file)])
    done = run(*command, file)
    assert done.returncode == 2 and re.search(message, done.stderr)
    assert len(done.stderr.splitlines()) == 1 and not (tmp_path / "run").exists()
    done = run(*command, file, "--stage", "synth")
    assert done.returncode == 2 and "run --stage adapter first" in done.stderr
    for addition in ("residual", "centered"):
        prompt_adapter.save_adapter(
            prompt_adapter.PromptAdapter(128, 8, channels=2, **{addition: True}), file)
        with pytest.raises(ValueError, match="trained with additions"):
            d4ir.main([*map(str, command), str(file), "--no-additions"])


def test_the_papers_method_alone_from_the_command_line(own_photos, tmp_path):
    done = run("--task", "derain", *own_photos, "--out", tmp_path / "run", "--no-additions")
    assert done.returncode == 0, done.stderr
    assert "additions: none (the paper's method)" in done.stdout
    assert json.loads((tmp_path / "run/config.json").read_text())["additions"] == []


@pytest.mark.parametrize("prediction_type",
                         ["epsilon", pytest.param("v_prediction", marks=pytest.mark.slow)])
def test_own_stable_diffusion_and_teacher(folders, network, tmp_path, prediction_type):
    model, folder = network
    torch.save({"state_dict": {f"net.{k}": v for k, v in model.state_dict().items()}},
               folder / "w.ckpt")
    sd_folder = make_sd(tmp_path / "sd", prediction_type)
    flags = ["--task", "derain", "--sd", sd_folder, "--degraded", folders / "bad", "--clean",
             folders / "good", "--teacher", f"{folder}/net.py:Net(width=4)@{folder}/w.ckpt",
             "--student-width", "4", "--out", tmp_path / "run", "--precision", "fp32", *TINY]
    done = run(*flags, "--test", folders / "test/input")
    assert done.returncode == 0, done.stderr
    assert "using the bundled demo for" not in done.stdout
    assert "additions: none" in done.stdout                # the demo's settings are not used
    assert evaluate.read_image(tmp_path / "run/synth/000000.png").shape == (3, 64, 64)
    more = ["--stage", "evaluate", "--test", folders / "bad"]      # without ground truth
    refused = run(*flags, *more)
    assert refused.returncode == 2 and "test of evaluate was" in refused.stderr
    assert "--restart --stage evaluate" in refused.stderr
    without = run(*flags, *more, "--restart")
    assert without.returncode == 0, without.stderr
    assert not (tmp_path / "run/metrics.json").exists()
    assert len(list((tmp_path / "run/restored").glob("*.png"))) == 5


def test_bad_input_gives_one_line_and_exit_code_2(folders, network, tmp_path, capsys):
    """One case runs in a subprocess; the others raise the ValueError that becomes that line."""
    net = network[1] / "net.py"
    weights = net.parent / "w.pth"
    torch.save(network[0].state_dict(), weights)
    done = run("--task", "desnow", "--degraded", tmp_path / "absent", "--out", tmp_path / "r")
    assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (2, "", 1)
    assert "no such folder" in done.stderr
    good = ["--degraded", folders / "bad", "--clean", folders / "good", "--test", folders / "test"]
    wrong = [(["--degraded", folders / "empty"], "no image file"),
             (["--degraded", folders / "rubbish"], "none of its 1 image files"),
             (["--test", folders / "empty"], "no image file"),
             (["--teacher", folders / "bad/broken.png"], "not a readable"),
             (["--sd", folders / "bad"], "no Stable Diffusion"),
             (["--strength", "0"], "strength"), (["--tokens", "99"], "tokens"),
             (["--steps", "999"], "steps must be"), (["--size", "60"], "multiple of 16"),
             (["--adapter-crop", "60"], "--adapter-crop must be a multiple of 16 px, not 60"),
             (["--adapter-crop", "112"], r"--adapter-crop 112 is larger than the images \(96 px\)"),
             (["--scheduler", "euler"], "ddim"), (["--device", "tpu"], "--device tpu"),
             (["--guidance", "1", "--no-anchor"], "negative_prompt has no effect"),
             (["--stage", "distill"], "run --stage synth first"),
             (["--distill-crop", "999"], r"larger than the images \(96 px\)"),
             (["--photo-size", "95"], r"--photo-size 95 is smaller than the images \(96 px\)"),
             (["--adapter", folders / "bad/broken.png"], "broken.png: not an adapter"),
             (["--adapter", tmp_path / "absent"], "absent: not an adapter"),
             (["--teacher", f"{net}:Halving@{weights}"], "teacher-multiple"),
             (["--teacher", f"{net}:Fourier@{weights}", "--precision", "bf16"],
              "use --precision fp32"),
             (["--teacher", f"{net}:Infinite@{weights}"], "net.py:Infinite@.* is not finite")]
    for i, (arguments, message) in enumerate(wrong):
        command = ["--task", "desnow", *good, *TINY[:6], "--steps", "2", *arguments]
        with pytest.raises(ValueError, match=message):
            d4ir.main([*map(str, command), "--out", str(tmp_path / str(i))])
    task = ["--task", "desnow"]
    for arguments, message in ((["--task", "desmog"], "invalid choice"), ([], "--task"),
                               ([*task, "--distill-steps", "0"], "at least 1"),
                               ([*task, "--distill-steps", "2.5"], "invalid int value"),
                               ([*task, "--distill-lr", "inf"], "finite"),
                               ([*task, "--guidance", "nan"], "finite"),
                               ([*task, "--seed", "-1"], "at least 0"),
                               ([*task, "--seed", str(2 ** 32)], "at most 4294967295"),
                               ([*task, "--no-additions", "--anchor"], "combined with --anchor"),
                               ([*task, "--stage", "restore"], "--input"),
                               ([*task, "--stage", "export", "synth"], "cannot be combined")):
        capsys.readouterr()                                # discards earlier output
        with pytest.raises(SystemExit) as stopped:
            d4ir.parse(arguments)
        error = capsys.readouterr().err
        assert stopped.value.code == 2 and message in error and len(error.splitlines()) == 1
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("x")
    (tmp_path / "mine/config.json").write_text("{}")
    with pytest.raises(ValueError, match="choose another --out"):
        d4ir.main([*task, "--out", str(tmp_path / "mine"), "--restart"])
    assert (tmp_path / "mine/thesis.txt").exists()
    for out in (folders / "bad", folders / "bad/run"):     # its images would be read as photos
        with pytest.raises(ValueError, match="is in --degraded"):
            d4ir.main([*task, "--degraded", str(folders / "bad"), "--out", str(out)])


def test_a_corrected_command_and_a_restart(folders, own_photos, tmp_path):
    """A corrected command is not rejected; --restart redoes the named stage and later ones."""
    def go(*more):
        d4ir.main(list(map(str, ["--task", "desnow", *own_photos, "--out", tmp_path / "run",
                                 *more])))

    def times():
        return {f.name: f.stat().st_mtime_ns for f in (tmp_path / "run").iterdir()}

    with pytest.raises(ValueError, match="no Stable Diffusion"):
        go("--sd", folders / "bad")
    go("--stage", "adapter")
    with pytest.raises(ValueError, match="lr of adapter was"):
        go("--adapter-lr", "0.5")
    go()
    before = times()
    with pytest.raises(ValueError, match="lr of distill was 0.002, now 0.01.*--stage distill"):
        go("--distill-lr", "0.01")
    go("--distill-lr", "0.01", "--restart", "--stage", "distill", "evaluate")
    after = times()
    changed = {name for name in after if after[name] != before[name]}
    assert {"student.safetensors", "metrics.json", "losses.png"} <= changed
    assert not {"adapter.safetensors", "synth.png"} & changed
    with pytest.raises(ValueError, match="run --stage distill first"):     # --restart deletes it
        go("--restart", "--stage", "synth", "evaluate")
    with pytest.raises(ValueError, match="--distill-crop 999 is larger"):
        go("--restart", "--stage", "distill", "--distill-crop", "999")
    assert (tmp_path / "run/student.safetensors").exists()
    metrics = (tmp_path / "run/metrics.json").read_bytes()
    (tmp_path / "odd").mkdir()
    for name, side in (("input", 40), ("target", 90)):
        save(photo(1, side, side), tmp_path / "odd" / name / "1.png")
    with pytest.raises(ValueError, match="test of evaluate was"):  # nothing is lost
        go("--distill-lr", "0.01", "--stage", "evaluate", "--test", tmp_path / "odd")
    assert (tmp_path / "run/metrics.json").read_bytes() == metrics
    restoring = ["--task", "desnow", "--out", str(tmp_path / "run"), "--stage", "restore"]
    odd = [*restoring, "--input", str(tmp_path / "odd"), "--output", str(tmp_path / "odd/out")]
    for _ in range(2):                                     # outputs are not restored again
        d4ir.main(odd)
    assert len(evaluate.list_images(tmp_path / "odd/out", recursive=True)) == 2
    with pytest.raises(ValueError, match="is one of the photos"):
        d4ir.main([*restoring, "--input", str(folders / "test/input"),
                   "--output", str(folders / "test/input")])


def test_a_new_task_needs_one_entry(own_photos, tmp_path, monkeypatch):
    """Captions, demo weather and demo settings of a new task, through all stages."""
    task = d4ir.Task(("a photo in light snow", "a photo in light rain"), ("rain", "snow"),
                     dict(strength=0.5, adapter_lr=2e-4))
    monkeypatch.setitem(d4ir.TASKS, "desleet", task)
    d4ir.main(["--task", "desleet", "--out", str(tmp_path / "run"), "--student-width", "4", *TINY])
    config = json.loads((tmp_path / "run/config.json").read_text())
    assert config["synth"]["strength"] == 0.5 and config["adapter"]["lr"] == 2e-4
    assert (tmp_path / "run/demo/desleet/degraded").is_dir()
    assert (tmp_path / "run/metrics.json").exists()


def test_out_of_memory_gives_one_line():
    code = "import d4ir, torch; d4ir.run_command(lambda: torch.empty(10 ** 15))"
    done = subprocess.run([sys.executable, "-c", code], cwd=HERE, capture_output=True, text=True)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert "out of memory: lower" in done.stderr


@cuda
def test_on_a_gpu(own_photos, tmp_path):
    for precision in ("bf16", "fp16"):
        done = run("--task", "desnow", *own_photos, "--device", "cuda", "--precision", precision,
                   "--out", tmp_path / precision)
        assert done.returncode == 0, done.stderr


# ---------------------------------------------------------------- robustness

class Lambda(nn.Module):
    """A function as a network."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *inputs, **options):
        return self.function(*inputs, **options)


class Root(nn.Module):
    """Adds sqrt|w| = 0 to a network's output: the loss is finite, its gradient is not."""

    def __init__(self, network):
        super().__init__()
        self.network, self.config = network, network.config
        self.w = nn.Parameter(torch.zeros(()))

    def forward(self, x, **options):
        y = self.network(x, **options)
        root = self.w.abs().sqrt()
        return (y[0] + root, y[1]) if isinstance(y, tuple) else y + root


def test_weights_that_are_not_finite_are_never_saved(sd, tmp_path):
    a = photo(1, 64, 64).expand(2, 3, 64, 64)
    batch = (noise(1, 2, 4, 8, 8), a, a, torch.tensor([0, 1]))
    config = prompt_adapter.AdapterConfig(steps=1, batch=2, save_every=1)
    with pytest.raises(ValueError, match="weights are not finite at step 1"):
        prompt_adapter.train_adapter(Root(prompt_adapter.PromptAdapter(sd.width, 4)), sd, [batch],
                                     config, checkpoint=tmp_path / "a.pt")
    config = distill.DistillConfig(steps=1, save_every=1)
    with pytest.raises(ValueError, match="weights are not finite at step 1"):
        distill.distill(None, Root(models.Restorer(4)), [(a, a * 0.5)], config,
                        checkpoint=tmp_path / "s.pt")
    model = models.Restorer(4)
    nn.init.constant_(model.ending.bias, 1e6)              # infinite in fp16
    with pytest.raises(ValueError, match="m.safetensors: not written, .* not finite in fp16"):
        models.save_restorer(model, tmp_path / "m.safetensors")
    assert not list(tmp_path.iterdir())


def test_a_non_finite_teacher_output_names_the_image(tmp_path):
    for i in range(2):
        save(photo(i, 40, 48) * (1 - i), tmp_path / f"synth/{i}.png")      # the second is black
    run = argparse.Namespace(release=lambda *names: None, out=tmp_path, rank=0, world_size=1,
                             distill=distill.DistillConfig(), device="cpu", dtype=torch.float32,
                             teacher=Lambda(lambda x: x / x.amax()))
    with pytest.raises(ValueError, match="teacher's output for image .*synth/1.png is not finite"):
        d4ir.distill_stage(run)
    bright = torch.full((3, 8, 8), 9, dtype=torch.uint8)
    with pytest.raises(ValueError, match="image 1 is not finite"):
        list(distill.teacher_outputs(run.teacher, [bright, bright * 0], "cpu"))


def test_damaged_checkpoints_are_named(sd, tmp_path):
    (tmp_path / "a.pt").write_bytes(b"rubbish")
    a = photo(1, 64, 64).expand(2, 3, 64, 64)
    with pytest.raises(ValueError, match="a.pt: not a readable checkpoint .*; delete it"):
        distill.distill(Darker(), models.Restorer(4), [a], distill.DistillConfig(),
                        checkpoint=tmp_path / "a.pt")
    with pytest.raises(ValueError, match="a.pt: not a readable checkpoint .*; delete it"):
        prompt_adapter.train_adapter(prompt_adapter.PromptAdapter(sd.width, 4), sd, [a],
                                     prompt_adapter.AdapterConfig(), checkpoint=tmp_path / "a.pt")


def test_synthesized_images_that_are_not_finite_are_rejected(sd, tmp_path):
    photos = [(photo(i, 70, 90) * 255).to(torch.uint8) for i in range(3)]
    broken = lambda x: torch.full((len(x), 4, sd.width), math.nan)
    with pytest.raises(ValueError, match="images are not finite"):
        synth.synthesize_folder(photos, photos, broken, sd, make_config(images=2), tmp_path)
    assert not list(tmp_path.iterdir())


def test_metadata_is_checked_before_allocation(tmp_path):
    """Invalid sizes, block counts, keys, types and JSON: one line, before any allocation."""
    model = models.Restorer(4, (1,), 1, (1,))
    adapter = prompt_adapter.PromptAdapter(8, 2, channels=2)
    wrong = [dict(width=200_000), dict(width=10 ** 30), dict(width="4"), dict(middle=10 ** 7),
             dict(encoder=[10 ** 7, -10 ** 7], decoder=[1, 1]), dict(encoder="1"), dict(middle=1.5),
             dict(encoder=[0] * 10 ** 5, decoder=[0] * 10 ** 5), dict(window=-1), dict(colour=1)]
    bad = [json.dumps(model.config | change) for change in wrong]
    path = tmp_path / "net.safetensors"
    for text in [*bad, "{}", "[]", "3", "not JSON", "[" * 100_000]:
        save_file(model.state_dict(), path, metadata={"restorer": text})
        with pytest.raises(ValueError, match="net.safetensors: ") as error:
            models.load_restorer(path)
        assert len(str(error.value).splitlines()) == 1
    wrong = [dict(width=200_000), dict(tokens=10 ** 12), dict(channels=10 ** 9), dict(colour=1),
             dict(embedding="x")]
    bad = [json.dumps(adapter.config | change) for change in wrong]
    for text in [*bad, "{}", "[]", "not JSON", "[" * 100_000]:
        save_file(adapter.state_dict(), path, metadata={"adapter": text})
        with pytest.raises(ValueError, match="net.safetensors: not an adapter") as error:
            prompt_adapter.load_adapter(path)
        assert len(str(error.value).splitlines()) == 1
    save_file({k: v.half() for k, v in adapter.state_dict().items()}, path,
              metadata={"adapter": json.dumps(adapter.config)})
    assert prompt_adapter.load_adapter(path)(photo(1, 40, 40)[None]).dtype is torch.float32


posix = pytest.mark.skipif(os.name == "nt", reason="POSIX locks and signals")


@posix
def test_a_run_folder_is_used_by_one_process_at_a_time(own_photos, tmp_path):
    out, (ready, send) = tmp_path / "run", os.pipe()
    out.mkdir()
    (out / "user.tmp").write_text("not ours")              # no run has used the folder yet
    child = os.fork()
    if child == 0:
        try:
            lock = d4ir.lock_folder(out)
            os.write(send, b"x")
            signal.pause()
        finally:
            os._exit(1)
    os.close(send)
    assert os.read(ready, 1) == b"x"
    try:
        assert (out / "user.tmp").exists()
        with pytest.raises(ValueError, match=f"run is in use by process {child} on"):
            d4ir.main(["--task", "desnow", *map(str, own_photos), "--out", str(out)])
        assert sorted(path.name for path in out.iterdir()) == ["lock", "user.tmp"]
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    (out / "synth").mkdir()
    (out / "synth/000000.tmp").write_text("left by the dead process")
    lock = d4ir.lock_folder(out)                           # its lock is taken over
    assert (out / "lock").read_text().startswith(f"{os.getpid()} on ")
    assert not list(out.rglob("*.tmp")) and not lock.closed


@posix
def test_signals_set_the_exit_code_and_print_one_line(capfd, tmp_path):
    class Finalizer:                                       # Python discards its exceptions
        def __del__(self):
            os.kill(os.getpid(), number)
            time.sleep(9)

    def render():                                          # worker processes end silently, too
        threading.Timer(1, os.kill, [os.getpid(), number]).start()
        demo.photos.write_photos(tmp_path / str(number), ("snow",))

    for number, code in ((signal.SIGINT, 130), (signal.SIGTERM, 143)):
        for main in (lambda: (os.kill(os.getpid(), number), time.sleep(9)), Finalizer,
                     render):
            child = os.fork()
            if child == 0:
                signal.signal(number, signal.default_int_handler)   # SIGINT may be ignored here
                try:
                    d4ir.run_command(main)
                finally:
                    os._exit(1)
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == code
            error = capfd.readouterr().err
            assert error.startswith("interrupted; rerun the same command")
            assert error.count("\n") == 1


PRODUCTS = ("adapter.safetensors", "student.safetensors", "synth/*.png")


def product_bytes(folder, patterns=PRODUCTS):
    """{name: bytes} of a run's adapter, images and student."""
    files = {path for pattern in patterns for path in folder.glob(pattern)}
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(files)}


def test_the_same_seed_gives_the_same_bytes(own_photos, tmp_path, monkeypatch):
    """With any number of loader threads; another seed changes every file."""
    made = []
    for seed, threads in ((0, 1), (0, 5), (1, 5)):
        monkeypatch.setattr(os, "cpu_count", lambda: threads)
        out = tmp_path / f"{seed}-{threads}"
        d4ir.main(["--task", "desnow", *map(str, own_photos), "--seed", str(seed), "--out",
                   str(out), "--stage", "adapter", "synth", "distill"])
        made.append(product_bytes(out))
    first, again, other = made
    assert len(first) == 2 + 6 and first == again
    assert first.keys() == other.keys() and all(first[name] != other[name] for name in first)


@pytest.mark.slow
@posix
def test_a_run_killed_in_any_stage_resumes_to_the_same_bytes(own_photos, tmp_path):
    """SIGTERM and SIGKILL at random moments of each stage."""
    rng, one_thread = np.random.default_rng(0), os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-u", HERE / "d4ir.py", "--task", "desnow", *own_photos,
               "--precision", "fp32", "--adapter-steps", "60", "--adapter-save-every", "5",
               "--images", "16", "--batch", "2", "--distill-steps", "150",
               "--distill-save-every", "5", "--out"]

    def go(out, stop_in=None, number=None, after=None):
        """Runs the command, up to a signal some seconds into a stage. Returns the exit code, what
        it wrote to stderr, and the seconds spent in each stage."""
        process = subprocess.Popen([*map(str, command), str(out)], stdout=subprocess.PIPE,
                                   stderr=subprocess.PIPE, text=True, env=one_thread)
        starts = {}
        for line in process.stdout:
            starts[line.strip().removeprefix("--- ")] = time.time()
            if line.strip() == f"--- {stop_in}":
                time.sleep(after)
                process.send_signal(number)
        _, errors = process.communicate()
        stages = [starts[stage] for stage in d4ir.STAGES if stage in starts] + [time.time()]
        return process.returncode, errors, np.diff(stages)

    code, errors, seconds = go(tmp_path / "whole")
    assert code == 0, errors
    for stage, length in zip(("adapter", "synth", "distill"), seconds):
        for number in (signal.SIGTERM, signal.SIGKILL):
            code, errors, _ = go(tmp_path / "killed", stage, number, rng.uniform(0, length / 3))
            assert code == (143 if number == signal.SIGTERM else -signal.SIGKILL), errors
            assert "Traceback" not in errors
    code, errors, _ = go(tmp_path / "killed")
    assert code == 0 and not list((tmp_path / "killed").rglob("*.tmp")), errors
    whole = product_bytes(tmp_path / "whole")
    assert len(whole) == 2 + 16 and product_bytes(tmp_path / "killed") == whole


def test_processes_divide_the_images(sd, tmp_path):
    """Each image is made by one of three processes and equals that of a single process."""
    photos = [(photo(i, 70, 90) * 255).to(torch.uint8) for i in range(3)]
    adapter = prompt_adapter.PromptAdapter(sd.width, 4).eval()
    config = synth.SynthConfig(images=7, batch=2, steps=2)
    make = lambda folder, *rank: synth.synthesize_folder(
        photos, photos, adapter, sd, config, folder, rank=rank[0], world_size=rank[1])
    make(tmp_path / "one", 0, 1)
    parts = []
    for rank in range(3):
        make(tmp_path / str(rank), rank, 3)
        parts.append(product_bytes(tmp_path / str(rank), ["*.png"]))
    assert sum(map(len, parts)) == 7
    assert parts[0] | parts[1] | parts[2] == product_bytes(tmp_path / "one", ["*.png"])


def torchrun(*arguments, **options):
    """Two processes on the CPU, one thread each."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE)}
    return subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, text=True, env=environment, **options)


def train_one_step(folder):
    """One update of an adapter and of a student, on this process's part of a batch of four.
    Writes the gradients and the adapter's checkpoint."""
    rank, ranks = (int(os.environ.get(name, n)) for name, n in (("RANK", 0), ("WORLD_SIZE", 1)))
    if ranks > 1:
        torch.distributed.init_process_group("gloo")
    own = slice(4 * rank // ranks, 4 * (rank + 1) // ranks)
    # abar = 0 and v-prediction: the target is -z_0, whatever the noise, which differs by process.
    predict = lambda z, t, prompts: prompts.mean((1, 2)).view(-1, 1, 1, 1).expand_as(z)
    fake = argparse.Namespace(unet=nn.Identity(), device=torch.device("cpu"), dtype=torch.float32,
                              prediction_type="v_prediction", alphas_cumprod=torch.zeros(10),
                              predict_noise=predict)
    torch.manual_seed(0)
    adapter, student = prompt_adapter.PromptAdapter(8, 4, channels=4), models.Restorer(4)
    nn.init.normal_(adapter.to_prompts[-1].weight, std=0.1)
    nn.init.normal_(student.ending.weight, std=0.1)
    a, b = (torch.stack([photo(first + i, 32, 32) for i in range(4)]) for first in (0, 4))
    batch = noise(1, 4, 4, 4, 4), a, b, torch.arange(4)
    name = folder / f"adapter-{ranks}.pt"
    prompt_adapter.train_adapter(
        adapter, fake, [[column[own] for column in batch]], prompt_adapter.AdapterConfig(
            steps=1, batch=2, contrast=1.0), seed=1000 * rank, checkpoint=name)
    distill.distill(Darker(), student, [a[own]], distill.DistillConfig(steps=1))
    if rank == 0:
        torch.save([p.grad for network in (adapter, student) for p in network.parameters()],
                   folder / f"gradients-{ranks}.pt")


@pytest.mark.slow
def test_two_processes_train_like_one_with_the_joined_batch(tmp_path):
    script = tmp_path / "worker.py"
    script.write_text("import sys\nfrom pathlib import Path\nfrom test_d4ir import train_one_step\n"
                      "train_one_step(Path(sys.argv[1]))\n")
    process = torchrun(script, tmp_path)
    _, errors = process.communicate()
    assert process.returncode == 0, errors
    train_one_step(tmp_path)
    two, one = (torch.load(tmp_path / f"gradients-{n}.pt") for n in (2, 1))
    assert len(two) == len(one) and sum(g.abs().sum() > 0 for g in one) > 100
    for a, b in zip(two, one):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-6)
    two, one = (torch.load(tmp_path / f"adapter-{n}.pt") for n in (2, 1))
    torch.testing.assert_close(two["adapter"], one["adapter"], rtol=1e-3, atol=1e-4)


@pytest.mark.slow
@posix
def test_two_processes_from_the_command_line(own_photos, tmp_path):
    """The images equal those of one process. If a process dies, the rerun resumes."""
    command = ["--task", "derain", *own_photos, "--device", "cpu", "--precision", "fp32",
               "--images", "7", "--batch", "2", "--adapter-steps", "100", "--adapter-save-every",
               "1"]
    one, two, out = (tmp_path / name for name in ("one", "two", "out"))
    done = run(*command, "--out", one, "--stage", "adapter", "synth",
               env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    two.mkdir()
    for name in ("adapter.safetensors", "config.json"):
        shutil.copy(one / name, two)
    process = torchrun(HERE / "d4ir.py", *command, "--out", two, "--stage", "synth")
    _, errors = process.communicate()
    assert process.returncode == 0, errors
    assert len(product_bytes(one)) == 8 and product_bytes(two) == product_bytes(one)

    process, end = torchrun(HERE / "d4ir.py", *command, "--out", out), time.time() + 120
    while not (out / "adapter.pt").exists() and process.poll() is None and time.time() < end:
        time.sleep(0.1)
    first = int((out / "lock").read_text().split()[0])
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    (second,) = set(map(int, children)) - {first}
    os.kill(second, signal.SIGKILL)
    process.communicate()
    assert process.returncode != 0 and not (out / "adapter.safetensors").exists()
    d4ir.lock_folder(out).close()                          # no process is left
    process = torchrun(HERE / "d4ir.py", *command, "--out", out)
    _, errors = process.communicate()
    assert process.returncode == 0, errors
    assert len(product_bytes(out)) == 2 + 7 and (out / "metrics.json").exists()
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    steps = [line["step"] for line in lines if line["stage"] == "adapter"]
    assert steps[-1] == 100 and len(steps) <= 101          # at most one update was repeated


def mutate(rng, data):
    """Random bytes, flipped bits, swapped blocks, a huge number near the start, or a truncation."""
    data, kind = bytearray(data), rng.integers(5)
    if kind == 0:
        for i in rng.integers(len(data), size=rng.integers(1, 9)):
            data[i] ^= 1 << rng.integers(8)
    elif kind == 1:
        data = data[:rng.integers(len(data))]
    elif kind == 2:
        a, b = (int(i) for i in rng.integers(len(data), size=2))
        data[a:a + 16], data[b:b + 16] = data[b:b + 16], data[a:a + 16]
    else:
        i, size = int(rng.integers(min(64, len(data)))), int(rng.choice([2, 4, 8]))
        data[i:i + size] = rng.bytes(size) if kind == 3 else b"\x7f" + b"\xff" * (size - 1)
    return bytes(data)


def mutate_json(rng, value):
    """A JSON value with one of its parts replaced."""
    strange = (None, True, -1, 0, 1.5, math.nan, 10 ** 6, 10 ** 40, "x", [], {}, [[1]], {"a": 1})
    if isinstance(value, (dict, list)) and value and rng.random() < 0.8:
        value = value.copy()
        keys = list(value) if isinstance(value, dict) else range(len(value))
        key = keys[rng.integers(len(keys))]
        value[key] = mutate_json(rng, value[key])
        return value
    return strange[rng.integers(len(strange))]


def test_mutated_files_raise_only_errors_that_name_them(tmp_path):
    import resource
    rng, counts = np.random.default_rng(0), {"read": 0, "refused": 0}
    peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024         # MB
    before = peak()

    def check(read, path, name=None):
        try:
            read(path)
            counts["read"] += 1
        except ValueError as error:
            assert (name or path.name) in str(error)
            counts["refused"] += 1

    picture, files = to_pil(photo(1, 20, 30)), {}
    for extension in ("png", "jpg", "bmp", "webp", "tif"):
        files[save(picture, tmp_path / f"a.{extension}")] = evaluate.read_image
    restorer = models.Restorer(2, (1,), 1, (1,))
    adapter = prompt_adapter.PromptAdapter(4, 2, channels=1, centered=True)
    models.save_restorer(restorer, tmp_path / "r.safetensors")
    prompt_adapter.save_adapter(adapter, tmp_path / "p.safetensors")
    torch.save(restorer.state_dict(), tmp_path / "w.pth")
    files |= {tmp_path / "r.safetensors": models.load_restorer, tmp_path / "w.pth":
              models.read_weights, tmp_path / "p.safetensors": prompt_adapter.load_adapter}
    for path, read in files.items():
        data = path.read_bytes()
        for i in range(50):
            mutated = path.with_name(f"mutated-{i}{path.suffix}")
            mutated.write_bytes(mutate(rng, data))
            check(read, mutated)
    for network, key, read in ((restorer, "restorer", models.load_restorer),
                               (adapter, "adapter", prompt_adapter.load_adapter)):
        for i in range(50):
            path = tmp_path / f"metadata-{i}.safetensors"
            save_file(network.state_dict(), path,
                      metadata={key: json.dumps(mutate_json(rng, network.config))})
            check(read, path)
    arguments = d4ir.parse(["--task", "desnow", "--out", str(tmp_path / "run")])
    run, config = d4ir.Run(arguments), tmp_path / "run/config.json"
    d4ir.check_run_folder(run)
    (tmp_path / "run/adapter.safetensors").write_bytes(b"")        # its settings are compared
    text = config.read_text()
    for i in range(100):
        settings = json.dumps(mutate_json(rng, json.loads(text)))
        config.write_bytes(mutate(rng, text.encode()) if i % 2 else settings.encode())
        check(lambda path: d4ir.check_run_folder(run), config, name=str(tmp_path / "run"))
    config.write_text("[" * 100_000)
    check(lambda path: d4ir.check_run_folder(run), config, name=str(tmp_path / "run"))
    assert counts["refused"] > 200 and counts["read"] > 20, counts
    assert peak() - before < 1000


# ---------------------------------------------------------------- experiments

def test_the_adversary_widens_the_gap_with_varied_images(monkeypatch):
    torch.manual_seed(0)
    teacher, student = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 3, padding=1)
    teacher.requires_grad_(False)
    make = lambda: iter(gan.Adversary(teacher, student, 16, 8, torch.device("cpu"),
                                      torch.float32, 0))
    gap = lambda x: (teacher(x).clamp(0, 1) - student(x)).abs().mean().item()
    monkeypatch.setattr(gan.Adversary, "prior", 0.0)
    loader = make()
    first, target = next(loader)
    torch.testing.assert_close(target, teacher(first).clamp(0, 1))
    for _ in range(60):
        last, target = next(loader)
    assert gap(last) > 1.1 * gap(first) and not target.requires_grad
    assert all(weight.grad is None for weight in student.parameters())
    assert first.shape == (8, 3, 16, 16) and first.min() >= 0 and first.max() <= 1
    assert not last.requires_grad

    def trained(name, weight):
        """Images after 60 updates with this weight in the generator's loss."""
        with monkeypatch.context() as patch:
            patch.setattr(gan.Adversary, name, weight)
            loader = make()
            return [next(loader)[0] for _ in range(60)][-1]

    varied, uniform = trained("variety", 30.0), trained("variety", 0.0)
    assert varied.std(0).mean() > 1.1 * uniform.std(0).mean()
    change = lambda x: (teacher(x).clamp(0, 1) - x).abs().mean()
    assert change(trained("prior", 30.0)) < 0.95 * change(trained("prior", 0.0))


@pytest.fixture
def go_compare(folders, own_photos, tmp_path):
    """Runs experiments.compare on a tiny budget; returns its rows by name, and the whole result."""
    def go(*more):
        command = ["--task", "desnow", *own_photos, "--original", folders / "bad", "--out",
                   tmp_path / "run", "--seeds", "2", "--results", tmp_path / "results", *more]
        compare.main(list(map(str, command)))
        result = json.loads((tmp_path / "results/compare-desnow.json").read_text())
        return {row["source"]: row for row in result["rows"]}, result
    return go


@pytest.mark.slow
def test_compare_reuses_resumes_and_rejects_changed_settings(go_compare, tmp_path, monkeypatch):
    rows, first = go_compare("--rows", "original", "gan", "d4ir", "d4ir+web")
    assert list(rows) == ["input", "teacher", "original", "gan", "d4ir", "d4ir+web"]
    assert first["seeds"] == 2
    psnr = {name: row["psnr_rgb"]["mean"] for name, row in rows.items()}
    if psnr["original"] > psnr["input"]:
        share = (psnr["d4ir"] - psnr["input"]) / (psnr["original"] - psnr["input"])
        assert rows["d4ir"]["share"] == pytest.approx(share)
    assert set(rows["d4ir"]["psnr_rgb"]) == {"mean", "std"} and rows["d4ir"]["images_per_s"] > 0
    assert math.isfinite(rows["d4ir"]["gain"]) and "gain" not in rows["original"]
    assert not (tmp_path / "run/d4ir+web/synth").exists()          # uses the images of d4ir
    page = (tmp_path / "results/compare-desnow.md").read_text()
    assert (tmp_path / "results/compare-desnow.png").exists() and "| D4IR |" in page
    assert str(tmp_path) not in json.dumps({k: v for k, v in first.items() if k != "command"})
    with monkeypatch.context() as patch:                           # finished rows are kept
        patch.setattr(compare, "distill", None)
        assert go_compare("--rows", "d4ir")[1]["rows"] == first["rows"]
    (tmp_path / "run/d4ir/student-1.json").unlink()                # what is missing is redone
    (tmp_path / "run/d4ir/synth/000005.png").unlink()
    rows, _ = go_compare()
    assert rows["d4ir"]["psnr_rgb"]["mean"] == pytest.approx(psnr["d4ir"], abs=1e-3)
    assert set(rows) == {"input", "teacher", *compare.ROWS}
    with pytest.raises(ValueError, match="lr was 0.002, now 0.01"):
        go_compare("--distill-lr", "0.01")
    with pytest.raises(ValueError, match="none: no such folder"):
        go_compare("--original", tmp_path / "none")


def test_original_photos_of_an_unknown_teacher(tmp_path):
    run = SimpleNamespace(args=SimpleNamespace(teacher="net.py:Net@net.pth"), out=tmp_path, size=96,
                          distill=distill.DistillConfig())
    with pytest.raises(ValueError, match="training photos of this teacher are unknown"):
        compare.Bench(run, None).photos("original", 64)


def test_compare_reports_every_test_set():
    rows = [{"set": name} | dict.fromkeys(evaluate.METRICS, value)
            for name, value in zip("aab", (20.0, 24.0, 31.0))]
    means = dict.fromkeys(evaluate.METRICS, 25.0)
    result = compare.test_metrics(means | {"images": rows})
    assert result == means | {"psnr_rgb, a": 22.0, "psnr_rgb, b": 31.0}
    assert compare.test_metrics(means | {"images": rows[:2]}) == means
    table = compare.markdown({"task": "derain", "n_images": 3, "seeds": 1, "seed": 0, "date": "",
                              "command": "", "machine": "", "rows": [
                                  {"source": "input"} | compare.summary([result])]})
    assert "| PSNR RGB, a | PSNR RGB, b |" in table and "| 22.00 | 31.00 |" in table


def test_a_new_baseline_needs_one_entry(go_compare, monkeypatch):
    black = lambda bench: [torch.zeros(3, 96, 96, dtype=torch.uint8)] * 3
    monkeypatch.setitem(compare.ROWS, "black", compare.Row("black", "black images", black))
    rows, _ = go_compare("--rows", "black", "--seeds", "1")
    assert list(rows) == ["input", "teacher", "black"] and rows["black"]["note"] == "black images"


def test_the_row_of_the_papers_method_runs_no_addition(go_compare, monkeypatch):
    forbid_additions(monkeypatch)
    forbid(monkeypatch, compare, "select_best")
    rows, _ = go_compare("--rows", "no-additions", "sd-text-no-additions", "--seeds", "1")
    assert list(rows) == ["input", "teacher", "sd-text-no-additions", "no-additions"]
    with pytest.raises(AssertionError, match="was called"):
        go_compare("--rows", "no-anchor", "--seeds", "1")


def test_properties_of_the_weather():
    """Streaks that lean the other way, finer ones and fainter ones."""
    y, x = torch.meshgrid(torch.arange(64.0), torch.arange(64.0), indexing="ij")
    streaks = lambda slope, period: torch.sin(
        (x + slope * y) * 2 * math.pi / period).expand(3, 64, 64)
    amount, lean, scale = following.weather_properties(streaks(1, 16))
    assert following.weather_properties(streaks(-1, 16))[1] == pytest.approx(-lean, abs=0.05)
    assert abs(lean) > 0.9 and scale == pytest.approx(2 ** 0.5 / 16, rel=0.1)
    assert following.weather_properties(streaks(1, 8))[2] == pytest.approx(2 * scale, rel=0.1)
    assert following.weather_properties(0.5 * streaks(1, 16))[0] == pytest.approx(amount / 2)
    a = np.random.default_rng(0).normal(size=(9, 3))
    assert following.spearman(a, np.exp(a)) == pytest.approx(dict.fromkeys(following.PROPERTIES, 1))


def test_following(demo_run, folders, tmp_path, monkeypatch):
    """For the demo's photos, whose exact captions are known, and for a user's own."""
    out, _ = demo_run
    monkeypatch.setattr(following.contrast, "__defaults__", (8, 2))    # photos, groups
    command = ["--task", "desnow", *TINY, "--results", str(tmp_path)]
    following.main([*command, "--out", str(out)])
    result = json.loads((tmp_path / "following-desnow.json").read_text())
    for name in ("d4ir", "captions", "ceiling"):
        assert set(result[name]) == {"amount", "lean", "scale"}
    assert result["n_images"] == 6 and (tmp_path / "following-desnow.png").exists()
    assert set(result["contrast"]) == {"top_1", "same_weather_first"}
    assert all(0 <= share <= 1 for share in result["contrast"].values())
    own = ["--degraded", str(folders / "bad"), "--clean", str(folders / "good")]
    following.main([*command, *own, "--out", str(tmp_path / "own")])
    result = json.loads((tmp_path / "following-desnow.json").read_text())
    assert not {"captions", "contrast"} & set(result) and "ceiling" in result


@pytest.fixture
def go_neighbour(tmp_path):
    """Runs one of the neighbouring papers' experiments on a tiny budget; returns its section."""
    def go(experiment, *more):
        command = ["--out", tmp_path / "run", "--seeds", "1", "--results", tmp_path, *more]
        experiment.main(list(map(str, command)))
        return json.loads((tmp_path / "neighbours.json").read_text())
    return go


def test_feature_distillation(go_neighbour, own_photos):
    command = ["--task", "desnow", "-a", "0.1", "-b", "1", *own_photos]
    result = go_neighbour(features, *command)["features-0.1-1, desnow"]
    assert result["d4ir"]["psnr_rgb"] != result["features-0.1-1"]["psnr_rgb"]


@torch.no_grad()
def test_levels_of_a_restorer():
    """Level by level gives the same output; mixing does not change the batch norms' statistics."""
    for net in (models.Restorer(4), models.Restorer(4, block="residual", norm=True).eval()):
        x = noise(0, 2, 3, 32, 32)
        for p in net.parameters():
            p.add_(0.1)
        restored, states = features.run_net(net, x)
        torch.testing.assert_close(restored, net(x))
        assert len(states) == 8 and not states[-1][1]
        torch.testing.assert_close(features.run_levels(net, x, states[:4], 3), restored)
    net.train()
    mean = net.encoders[0][0].norm.running_mean
    before = mean.clone()
    with features.frozen_statistics(net):
        features.run_net(net, x)
    assert mean.equal(before)
    features.run_net(net, x)
    assert not mean.equal(before)


def test_low_rank_weights_fold_into_plain_networks():
    torch.manual_seed(0)
    shared = models.Restorer(20, block="residual", norm=True)
    count = lambda net: sum(p.numel() for p in net.parameters())
    start, student = shared(photo(0, 32, 32)[None]), copy.deepcopy(shared)
    low_rank.add_tasks(student, 3, 0.03)
    assert 1.05 < count(student) / count(shared) < 1.1
    torch.testing.assert_close(student(photo(0, 32, 32)[None]), start)
    loaders = [[(photo(k, 32, 32)[None], photo(k + 3, 32, 32)[None])] * 3 for k in range(3)]
    config = distill.DistillConfig(steps=3)
    low_rank.train(student, loaders, config, torch.device("cpu"), torch.float32)
    outputs = []
    for k in range(3):
        low_rank.choose(student.eval(), k)
        plain = low_rank.for_task(student, k)
        assert type(plain) is models.Restorer and not plain.config["norm"]
        with torch.no_grad():
            outputs.append(plain(loaders[k][0][0]))
            torch.testing.assert_close(outputs[k], student(loaders[k][0][0]))
            assert evaluate.cost(plain)["gmacs"] == evaluate.cost(shared)["gmacs"]


@pytest.mark.slow
def test_low_rank_experiment(go_neighbour, folders, tmp_path):
    tiny = ["--student-width", "4", *TINY]
    result = go_neighbour(low_rank, *tiny)["low rank 0.03, original"]
    assert set(result["low rank"]) == {*evaluate.METRICS, "params"}
    with pytest.raises(ValueError, match="for the demo's photos only"):
        go_neighbour(low_rank, "--degraded", folders / "bad", "--out", tmp_path / "own", *tiny)


def test_few_steps(go_neighbour, own_photos, monkeypatch):
    for name, value in dict(TRAJECTORIES=4, UPDATES=4, BATCH=2).items():
        monkeypatch.setattr(few_steps, name, value)
    result = go_neighbour(few_steps, "--task", "desnow", *own_photos)
    row = result["few-steps-2-1, desnow"]["few-steps-2-1"]
    assert row["unet_minutes"] > 0 and row["images_per_s"] > 0


def test_trajectories_are_those_of_the_solver(sd):
    """The recorded latents are the solver's own, and the last one is its result."""
    z, prompts = noise(0, 2, 4, 8, 8), noise(1, 2, 5, sd.width)
    timesteps = synth.choose_timesteps(1000, 0.9, 4)
    recorder = few_steps.Recorder(sd, 2)
    end = synth.denoise(z, prompts, recorder, timesteps, 3.0, None, "ddim")
    assert list(recorder.latents) == timesteps and recorder.latents[timesteps[0]].equal(z)
    half = recorder.latents[timesteps[2]]
    rest = synth.denoise(half, prompts, sd, timesteps[2:], 3.0, None, "ddim")
    torch.testing.assert_close(rest, end)


@pytest.mark.slow
def test_every_sweep_of_the_comparison(tmp_path, monkeypatch):
    command = ["--task", "all", "--student-width", "4", "--out", tmp_path / "run", "--seeds", "1",
               "--results", tmp_path, *TINY]
    sweeps = {"strength": (0.3, 0.95), "guidance": (1.0, 2.0), "steps": (1, 2),
              "photos": (3, 6), "images": (2, 6)}
    for what, values in sweeps.items():
        monkeypatch.setitem(compare.SWEEPS, what, values)
        compare.main([*map(str, command), "--sweep", what])
        result = json.loads((tmp_path / f"{what}-all.json").read_text())
        assert [row[what] for row in result["values"]] == list(values)


@pytest.mark.slow
def test_two_weathers(tmp_path, monkeypatch):
    """The diagonal of the table is where prompts and test set have the same look."""
    for name, value in dict(WEB_DEGRADED=6, TEST=2).items():
        monkeypatch.setattr(two_weathers, name, value)
    command = ["--task", "derain", "--student-width", "4", "--out", tmp_path / "run", "--seeds",
               "1", "--results", tmp_path, *TINY]
    shown = []
    monkeypatch.setattr(two_weathers, "figure", lambda columns, path: shown.append(columns)
                        or evaluate.figure(columns, path))
    two_weathers.main(list(map(str, command)))
    for name in ("slanted", "vertical", "sd-plain"):        # image i in row i, selected or not
        files = [tmp_path / "run" / name / "synth" / f"{i:06d}.png" for i in range(5)]
        for image, file in zip(shown[0][f"synthesized, {name}"], files, strict=True):
            assert torch.equal(image, evaluate.read_image(file) / 255)
    result = json.loads((tmp_path / "two-weathers-derain.json").read_text())
    assert list(result["rows"]) == ["slanted", "vertical", "sd-plain"]
    table = {(row, look): result["rows"][row][f"psnr_rgb, {look}"]["mean"]
             for row in result["rows"] for look in result["looks"]}
    diagonal = table["slanted", "slanted"] + table["vertical", "vertical"]
    others = table["slanted", "vertical"] + table["vertical", "slanted"]
    assert result["margins"] == [pytest.approx((diagonal - others) / 2)]
    assert (tmp_path / "two-weathers-derain.png").exists()


BENCH = ["--size", "32", "--batch", "2", "--steps", "2", "--adapter-batch", "2", "--adapter-crop",
         "0", "--adapter-steps", "1", "--distill-batch", "2", "--distill-steps", "1"]


@pytest.mark.slow
def test_bench_table_and_compile(tmp_path, monkeypatch):
    """Each command keeps the other's section of the file."""
    monkeypatch.setitem(bench.MATMUL, "cpu", 64)
    monkeypatch.setattr(torch, "compile", lambda network: network)
    for name, size in (("256", 32), ("512", 48)):           # the real sizes take too long
        monkeypatch.setitem(bench.ROWS, f"student against teacher, {name} px",
                            lambda run, size=size: bench.latency(run, size))
    command = ["--results", str(tmp_path), "--repeats", "1", *BENCH]
    bench.main(["--compile", *command])
    bench.main(command)
    result = json.loads((tmp_path / "bench-cpu.json").read_text())
    (compiled,) = result["compile"]["compile"]
    assert compiled["ratio"] == compiled["eager_seconds"] / compiled["compiled_seconds"]
    rows = {row["row"]: row for row in result["table"]["rows"]}
    assert list(rows) == list(bench.ROWS)
    for row in rows.values():
        ours, alternative = row["ours"], row["alternative"]
        assert row["ratio"] == alternative["seconds"] / ours["seconds"]
        for side in (ours, alternative):
            assert side["tflop_per_s"] == pytest.approx(side["tflop"] / side["seconds"])
            assert side["share"] == side["tflop_per_s"] / side["peak_tflop_per_s"]
        if row["row"] != "CCD without additions, like for like":
            assert alternative["settings"]["precision"] == "float32"
    like = rows["CCD without additions, like for like"]
    assert like["ours"]["tflop"] == pytest.approx(like["alternative"]["tflop"], rel=0.02)
    student, teacher = (rows["student against teacher, 256 px"][side]
                        for side in ("ours", "alternative"))
    assert student["settings"]["gmacs"] == pytest.approx(500 * student["tflop"])
    assert student["settings"]["peak_mb"] < teacher["settings"]["peak_mb"]
    with pytest.raises(ValueError, match="--stage, --restart and torchrun are for d4ir.py only"):
        bench.main(["--stage", "synth", *command])


def test_bench_alternatives_do_what_they_say():
    """The number of U-Net evaluations, encoding in every step, and gradients of the U-Net."""
    calls = []
    hook = nn.modules.module.register_module_forward_pre_hook(
        lambda module, inputs: calls.append(type(module).__name__))
    try:
        for strength in ("0.3", "0.6", "0.95", "1"):
            run = bench.make_run([*BENCH, "--strength", strength])
            side = bench.img2img(run, diffusers.DDIMScheduler, dict(prompt="snow"), 1, 7)
            calls.clear()
            side.call()
            assert calls.count("UNet2DConditionModel") == 7, strength
        sd = bench.TrainableUNet(models.load_stable_diffusion(MINI))
        loader = bench.EncodedEveryStep(bench.random_photos(2, 64), sd, 32, 2)
        calls.clear()
        bench.adapter_training(sd, run.adapter, loader).call()
        assert calls.count("Encoder") == 1
    finally:
        hook.remove()
    assert all(weight.grad is not None for weight in sd.sd.unet.parameters())
    ours = prompt_adapter.CropPairs(bench.random_photos(2, 64), sd, 32, 2).batch_at(0)
    theirs = loader.batch_at(0)
    assert ours[0].shape == theirs[0].shape and all(map(torch.equal, ours[1:], theirs[1:]))


def test_bench_counts_attention_on_a_cpu():
    q = noise(0, 1, 2, 64, 16).requires_grad_()
    call = lambda: nn.functional.scaled_dot_product_attention(q, q, q)
    forward = 2 * 2 * (2 * 64 * 64 * 16)                    # q k^T and its product with v
    assert bench.count_flops(call) == forward
    assert bench.count_flops(lambda: call().sum().backward()) == forward + 2.5 * forward


def test_bench_growth(tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "in_fresh_process", bench.with_peak_memory)
    monkeypatch.setattr(bench, "USUAL", dict(images=2, size=32, batch=2))
    monkeypatch.setattr(bench, "GROWTH", dict(images=(2, 3), size=(32, 48), batch=(1, 2)))
    bench.main(["--growth", "--results", str(tmp_path), *BENCH])
    rows = json.loads((tmp_path / "bench-cpu.json").read_text())["growth"]["growth"]
    assert [(row["stage"], row["images"], row["size"], row["batch"]) for row in rows] == [
        (stage, *cell) for stage in ("synth", "distill")
        for cell in ((2, 32, 2), (3, 32, 2), (2, 48, 2), (2, 32, 1))]
    assert all(row["seconds"] > 0 and row["host_gib"] > 0 for row in rows)


def test_bench_in_a_fresh_process():
    """A process that is killed, for example when out of memory, gives None."""
    result = bench.in_fresh_process(dict, seconds=1)
    assert result["seconds"] == 1 and 0.01 < result["host_gib"] < 4
    assert bench.in_fresh_process(os._exit, 1) is None


def test_bench_has_the_shape_of_stable_diffusion_1_5(monkeypatch):
    with torch.device("meta"):
        networks = [diffusers.UNet2DConditionModel(**bench.UNET),
                    diffusers.AutoencoderKL(**bench.VAE),
                    transformers.CLIPTextModel(transformers.CLIPTextConfig(**bench.TEXT))]
    counts = [sum(weight.numel() for weight in network.parameters()) for network in networks]
    assert counts == [859_520_964, 83_653_863, 123_060_480]
    monkeypatch.setitem(bench.MATMUL, "cpu", 64)
    for name in ("UNET", "VAE"):
        monkeypatch.setitem(getattr(bench, name), "block_out_channels", (32, 32, 32, 32))
        monkeypatch.setitem(getattr(bench, name), "layers_per_block", 1)
    monkeypatch.setitem(bench.UNET, "cross_attention_dim", 32)
    tiny = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=9)
    monkeypatch.setattr(bench, "TEXT", bench.TEXT | tiny)
    for stage in bench.BATCHES:
        cell = bench.sd_cell(stage, 64, 2, 4, torch.device("cpu"), torch.float32)
        assert cell["seconds"] > 0 and cell["tflop"] > 0 and cell["source"] == "measured"


def test_bench_of_the_recommended_run(monkeypatch):
    """Hours and memory against values computed by hand; each series records why it ended."""
    def cell(function, stage, size, batch, *others):
        if (stage, size, batch) == ("synth", 512, 4):
            return None                                     # out of memory
        return dict(seconds=2.0, tflop=3.0, host_gib=1.0 + batch, source="measured")

    monkeypatch.setattr(bench, "in_fresh_process", cell)
    monkeypatch.setattr(os, "sysconf", lambda name: 2 ** 20)            # 1 TiB
    result = bench.sd_size(bench.make_run(BENCH), 1000)
    assert len(result["cells"]) == 2 * (5 + 5 + 5) - 3
    (stopped,) = result["stopped"]
    assert stopped == dict(stage="synth", size=512, batch=4, reason="out of memory")

    rows = {(row["stage"], row["size"], row["device"]): row for row in result["recommended_run"]}
    row = rows["adapter", 512, "H100"]
    seconds = 3 / 2 / (989 * 0.28)                          # measured with 32, wanted for 16
    assert row["seconds"] == pytest.approx(seconds) and row["source"] == "computed"
    assert row["hours"] == pytest.approx(seconds * 3000 / 3600)
    row = rows["synth", 512, "this device"]                 # seconds per image: not scaled
    assert row["hours"] == pytest.approx(2 * 4000 / 3600) and "batch 2" in row["source"]
    assert bench.computed_seconds("distill", 0.06, 989) == 0.03         # launching kernels
    assert bench.computed_seconds("distill", 0.102, 25.5) == pytest.approx(0.04)
    small = [dict(stage="adapter", size=512, batch=4, seconds=1.0, tflop=3.0, host_gib=1.0)]
    assert bench.recommended_run(small)[0]["seconds"] == 4  # scaled to 16 photos

    fits = {(row["stage"], row["size"], row["card_gib"]): row for row in result["memory"]}
    assert [fits["adapter", 512, card]["batch"] for card in (8, 12, 24)] == [4, 8, 16]
    assert fits["adapter", 512, 8]["gib"] == 5
    assert fits["synth", 512, 24]["source"] == "computed"   # batch 16 was not measured
    assert fits["synth", 512, 8]["batch"] == 4
    (row,) = [row for row in bench.memory(small) if (row["size"], row["card_gib"]) == (512, 8)]
    assert row["batch"] == 4 and row["gib"] == pytest.approx(2.6 + 4 * 0.85)


def test_bench_stops_before_time_or_memory_runs_out(monkeypatch):
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    monkeypatch.setattr(os, "sysconf", lambda name: 2 ** 17)            # 16 GiB
    assert bench.reason_to_stop(dict(host_gib=7), 10, cpu, 30) is None
    assert "more than 30 s" in bench.reason_to_stop(dict(host_gib=7), 16, cpu, 30)
    assert "more than 16 GiB" in bench.reason_to_stop(dict(host_gib=9), 10, cpu, 30)
    assert bench.reason_to_stop(dict(host_gib=9), 10, gpu, 30) is None


def test_bench_names_the_device(monkeypatch):
    names = {"NVIDIA H100 80GB HBM3": "h100", "NVIDIA A100-SXM4-80GB": "a100",
             "NVIDIA GeForce RTX 4090": "rtx-4090", "NVIDIA RTX A6000": "rtx-a6000"}
    for name, short in names.items():
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
        assert bench.device_name(torch.device("cuda")) == short
    assert bench.device_name(torch.device("cpu")) == "cpu"


def test_the_mini_sd_follows_captions():
    """On unseen scenes, the loss is lowest with the caption that names the weather."""
    sd, count = models.load_stable_diffusion(MINI), 16
    captions = ["a photo in clear weather"]
    captions += [f"a photo in heavy {kind}" for kind in demo.weather.KINDS]
    prompts = sd.text_prompt(captions)
    heavy = dataclasses.replace(ORIGINAL, beta=(0.02, 0.03), flake_cover=(0.18, 0.24),
                                streak_cover=(0.16, 0.2))
    for k, kind in enumerate(demo.weather.KINDS, 1):
        rng, photos = np.random.default_rng(k), []
        for _ in range(count):
            image, depth = demo.scenes.render_scene(rng, 64, 64)
            photos.append(demo.weather.add_weather(image, depth, kind, heavy, rng)[0])
        z_0 = sd.encode(torch.from_numpy(np.stack(photos)).permute(0, 3, 1, 2))
        eps = torch.randn(z_0.shape, generator=torch.Generator().manual_seed(k))
        t = torch.full((count,), 400)
        errors = []
        for prompt in prompts:
            with torch.no_grad():
                loss = prompt_adapter.diffusion_loss(sd, z_0, prompt.expand(count, -1, -1), t, eps)
            errors.append(loss.item())
        assert min(range(4), key=errors.__getitem__) == k, (kind, errors)


@pytest.mark.slow
@pytest.mark.xfail(reason="rain and snow hold, haze does not (results/weather-check.json)")
def test_img2img_produces_the_weather_of_the_caption():
    """Judged by a classifier that was trained on rendered photos."""
    result, _ = weather.check(str(MINI), photos=1600, steps=400, test=100, clear=12,
                              strengths=(0.6,))
    assert all(result["held out"][kind][kind] > 0.7 for kind in weather.CLASSES), result
    for kind in demo.weather.KINDS:
        assert result["strength 0.6"][kind][kind] > 0.7, result


# ---------------------------------------------------------------- repository rules

def test_every_setting_is_read():
    """An option that nothing reads is a defect."""
    objects = ("config", "run.adapter", "run.synth", "run.distill", "self")
    for config, file in ((prompt_adapter.AdapterConfig, "prompt_adapter.py"),
                         (synth.SynthConfig, "synth.py"), (distill.DistillConfig, "distill.py")):
        text = re.sub(r"def __post_init__.*?(?=\n\S)", "",
                      (HERE / file).read_text(), flags=re.S) + (HERE / "d4ir.py").read_text()
        for _, field, comment in d4ir.options(config):
            assert comment
            assert any(f"{name}.{field.name}" in text for name in objects), field.name


def test_imports_and_line_lengths():
    """Stage files do not import one another; only d4ir.py and experiments/ import the demo."""
    stages = {"prompt_adapter", "synth", "distill", "evaluate"}
    for name in stages | {"models"}:
        tree = ast.parse((HERE / f"{name}.py").read_text())
        imported = {alias.name.split(".")[0] for node in ast.walk(tree)
                    if isinstance(node, ast.Import) for alias in node.names}
        imported |= {node.module.split(".")[0] for node in ast.walk(tree)
                     if isinstance(node, ast.ImportFrom)}
        assert not imported & (stages | {"demo", "experiments", "d4ir"}), name
    for path in [*HERE.glob("*.py"), *HERE.glob("demo/*.py"), *HERE.glob("experiments/*.py")]:
        lines = path.read_text(encoding="utf-8").splitlines()
        assert all(len(line) <= 100 for line in lines), path.name


def test_the_snippet_of_the_readme(demo_run):
    out, _ = demo_run
    (snippet,) = re.findall(r"```python\n(.*?)```", (HERE / "README.md").read_text(), re.S)
    scope = {}
    exec(snippet.replace("runs/desnow", str(out)).replace("demo/weights", str(demo.WEIGHTS)), scope)
    image = scope["image"]
    assert image.shape == (1, 3, 96, 96) and image.min() >= 0 and image.max() <= 1


def test_the_method_works_without_the_demo(own_photos, tmp_path):
    """A copy of the method files alone, with a user's own photos and models."""
    for name in ("d4ir", "prompt_adapter", "synth", "distill", "models", "evaluate"):
        shutil.copy(HERE / f"{name}.py", tmp_path)
    (tmp_path / "demo").mkdir()                            # such as one that holds __pycache__
    command = [sys.executable, str(tmp_path / "d4ir.py"), "--task", "desnow", "--teacher",
               str(demo.WEIGHTS / "teacher.safetensors"), *map(str, own_photos)]
    missing = subprocess.run(command, capture_output=True, text=True)
    assert missing.returncode == 2 and "--sd" in missing.stderr
    command += ["--sd", str(MINI), "--out", str(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and "additions: none" in done.stdout, done.stderr
    made = tmp_path / "run"                                # restoring needs no Stable Diffusion
    alone = [*command[:4], "--stage", "restore", "--model", str(made / "student.safetensors"),
             "--input", str(made / "synth/000000.png"), "--output", str(tmp_path / "restored")]
    assert subprocess.run(alone).returncode == 0
