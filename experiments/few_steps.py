"""CCD in few steps: a U-Net distilled from guided ten-step trajectories.

    python -m experiments.few_steps --task desnow       # adds to results/neighbours.json

TAD-SR (He et al. 2024, arXiv 2408.07476) distils a diffusion model for super-resolution into one
step. Besides matching the model's output, its student matches the scores after adding slight
noise, as small timesteps favour fine detail. Here, a copy of the U-Net is trained on trajectories
(z_ts, ..., z_0') of ten steps: guided ones with the prompt P and, if the anchor is on, unguided
ones with the negative prompt:

    z_0^, eps^ = U(z_t, t, P);    z_next^ = alpha_next z_0^ + sigma_next eps^         one DDIM step
    loss = |z_next^ - z_next| + a |eps_theta(z^_t', t', P) - eps_theta(z_t', t', P)|

z^_t', z_t': z_next^ and z_next with the same noise at a small t'; only in the last step.
Simplified: no adversarial loss. As in progressive distillation (Salimans and Ho 2022), each of
two steps covers half of the trajectory. The copy needs no guidance: 2 U-Net evaluations per image,
or 4 with the anchor, instead of 20 or 30.

Takes the flags of d4ir.py; the prompts are those of experiments.compare's row `d4ir`.
"""
import copy
from dataclasses import replace

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

import d4ir
from experiments.common import make_parser, provenance, write_section
from experiments.compare import make_bench, read_gain, seconds, summary, timed
from synth import alpha_sigma, choose_timesteps, denoise, draw_crops, perturb, to_z_0_eps

TRAJECTORIES, UPDATES, BATCH, LR = 512, 500, 16, 3e-4       # our choice
NEAR = (0.02, 0.25)                                         # t' / T


class Recorder:
    """A Stable Diffusion that keeps the first `batch` latents of every evaluation, by timestep."""

    def __init__(self, sd, batch):
        self.sd, self.batch, self.latents = sd, batch, {}

    def __getattr__(self, name):
        return getattr(self.sd, name)

    def predict_noise(self, z_t, t, prompts):
        self.latents[t] = z_t[:self.batch].clone()
        return self.sd.predict_noise(z_t, t, prompts)


@torch.no_grad()
def trajectories(run, adapter, steps):
    """The timesteps and, for every step, z_t (n,C,h,w), prompts (n,N,d) and z_next (n,C,h,w)."""
    sd, config, seed = run.sd, run.synth, run.args.seed + 1
    timesteps = choose_timesteps(len(sd.alphas_cumprod), config.strength, 10)
    kept, pairs = timesteps[::10 // steps], [([], [], []) for _ in range(steps)]
    negative = sd.text_prompt(config.negative_prompt, adapter.config["tokens"])
    inputs = run.adapter_inputs(adapter)
    for first in range(0, TRAJECTORIES, BATCH):
        indices = range(first, first + BATCH)
        prompts = adapter(draw_crops(inputs, run.size, seed, indices, 1).to(sd.device))
        z_0 = sd.encode(draw_crops(run.clean, run.size, seed, indices, 0))
        z = perturb(z_0, torch.randn_like(z_0), sd, timesteps[0])
        plain = negative.expand_as(prompts)
        for own, guidance in ((prompts, config.guidance), (plain, 1.0))[:1 + config.anchor]:
            recorder = Recorder(sd, BATCH)
            end = denoise(z, own, recorder, timesteps, guidance, negative, config.scheduler)
            states = [recorder.latents[t] for t in kept] + [end]
            for pair, z_t, z_next in zip(pairs, states, states[1:]):
                for values, value in zip(pair, (z_t, own, z_next)):
                    values.append(value)
    return kept, [[torch.cat(values) for values in pair] for pair in pairs]


def distil_unet(run, adapter, steps, weight):
    """A copy of the run's U-Net that needs `steps` steps and no guidance."""
    sd, device = run.sd, run.device
    timesteps, pairs = trajectories(run, adapter, steps)
    student = replace(sd, unet=copy.deepcopy(sd.unet).float(), dtype=torch.float32)
    student.unet.requires_grad_(True)
    optimizer = torch.optim.AdamW(student.unet.parameters(), lr=LR, weight_decay=0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LR, UPDATES, pct_start=0.05)
    total, last = len(sd.alphas_cumprod), 0.0
    for update in range(UPDATES):
        k = update % steps
        chosen = torch.randint(len(pairs[k][0]), (BATCH,))
        z_t, prompts, target = (values[chosen] for values in pairs[k])
        t, t_next = timesteps[k], (*timesteps, -1)[k + 1]
        with torch.autocast(device.type, sd.dtype, enabled=sd.dtype is not torch.float32):
            output = student.predict_noise(z_t, t, prompts)
        z_0, eps = to_z_0_eps(output, z_t, *alpha_sigma(sd.alphas_cumprod, t), sd.prediction_type)
        alpha, sigma = alpha_sigma(sd.alphas_cumprod, t_next)
        z = alpha * z_0 + sigma * eps
        loss = F.l1_loss(z, target)
        if weight and t_next == -1:
            near = int(total * (NEAR[0] + (NEAR[1] - NEAR[0]) * torch.rand(())))
            noise = torch.randn_like(z)
            scores = [sd.predict_noise(perturb(x, noise, sd, near), near, prompts)
                      for x in (z, target)]
            loss = loss + weight * F.l1_loss(*scores)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.unet.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        last = 0.95 * last + 0.05 * float(loss.detach())
        if update % 50 == 49:
            run.log(f"few steps: update {update + 1}, loss {last:.4f}")
    return student.unet.to(sd.dtype)


def row(bench, name, adapter, seeds, **settings):
    """The metrics of students on images made with these settings, the speed of synthesis, and
    the U-Net's training time."""
    images = lambda: bench.synthesize(name, adapter, **settings)
    metrics = summary(bench.students(name, images, seeds))
    folder = bench.run.out / name
    durations = seconds(folder)
    return metrics | read_gain(folder) | {
        "images_per_s": bench.run.synth.images / durations["synth"],
        "unet_minutes": durations.get("unet", 0) / 60}


def main(argv=None):
    parser = make_parser("few_steps", __doc__, seeds="students")
    parser.add_argument("--evaluations", type=int, choices=(1, 2, 5), default=2,
                        help="steps per image (2)")
    parser.add_argument("--time-aware", type=d4ir.number(float, 0), default=1.0, metavar="A",
                        help="a, weight of the distance between scores (1)")
    own, rest = parser.parse_known_args(argv)
    bench = make_bench(rest)
    run, steps, adapter = bench.run, own.evaluations, bench.adapter("d4ir")
    run.clean, run.degraded = (bench.photos(name, run.size) for name in ("clean", "degraded"))
    name = f"few-steps-{steps}-{own.time_aware:g}"
    rows = {"d4ir-steps-10": row(bench, "d4ir-steps-10", adapter, own.seeds, steps=10)}
    file = bench.variant(name).out / "unet.safetensors"
    if not file.exists():
        torch.manual_seed(run.args.seed)
        with timed(file.parent, "unet"):
            weights = distil_unet(run, adapter, steps, own.time_aware).state_dict()
        save_file({key: value.contiguous() for key, value in weights.items()}, file)
    run.sd.unet.load_state_dict(load_file(file))
    rows[name] = row(bench, name, adapter, own.seeds, steps=steps, guidance=1.0, scheduler="ddim")
    rows |= provenance("few_steps", argv) | {"seeds": own.seeds}
    write_section(own.results / "neighbours.json", f"{name}, {run.args.task}", rows)


if __name__ == "__main__":
    d4ir.run_command(main)
