"""Feature distillation, after MiPKD (Li et al. 2025, arXiv 2404.02573), against PKD alone.

    python -m experiments.features --task desnow        # adds to results/neighbours.json

MiPKD distils super-resolution networks. It maps the features of teacher and student to a common
space, mixes them with a random mask, reconstructs the teacher's features from the mixture, and
passes these through blocks that are drawn from teacher and student:

    z    = M E_S(f_S) + (1 - M) E_T(f_T)                    f: features after a random level
    loss = |S(x) - T(x)| + a (|D_T(z) - f_T| + |D_T(E_T(f_T)) - f_T|) / |f_T| + b |R(x) - T(x)|

R continues from the mixture with the remaining levels of the teacher, from D_T(z), or of the
student, from D_S(z). Simplified: one level per update, one network for all of the remaining levels,
1x1 convolutions as encoders E and decoders D.

Takes the flags of d4ir.py, uses the images of experiments.compare's row `d4ir`, and supports only
`Restorer` teachers.
"""
import random
from contextlib import contextmanager, nullcontext
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

import d4ir
from distill import Crops, learning_rate, to_device
from experiments.common import make_parser, provenance, write_section
from experiments.compare import make_bench, summary


def levels(net):
    """A `Restorer` as a list of functions (x, skips) -> (x, skips)."""
    def encode(encoder, down):
        def level(x, skips):
            x = encoder(x)
            return down(x), [*skips, x]
        return level

    def decode(up, decoder):
        return lambda x, skips: (decoder(up(x) + skips[-1]), skips[:-1])

    return [*map(encode, net.encoders, net.downs), lambda x, skips: (net.middle(x), skips),
            *map(decode, net.ups, net.decoders)]


def run_levels(net, image, states, first):
    """Runs the levels from `first` on, from states[-1]; appends (x, skips) after each level.
    Returns the restored image."""
    for level in levels(net)[first:]:
        states.append(level(*states[-1]))
    return image + F.pixel_shuffle(net.ending(states[-1][0]), 2)


def run_net(net, image):
    """The restored image and [(x, skips) before the first level, after it, ...]."""
    states = [(net.intro(F.pixel_unshuffle(image, 2)), [])]
    return run_levels(net, image, states, 0), states


@contextmanager
def frozen_statistics(net):
    """Keeps the batch norms' running statistics fixed inside the block."""
    norms = [module for module in net.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = 0.0
    yield
    for norm in norms:
        norm.momentum = 0.1                                 # PyTorch's default


class Mixer(nn.Module):
    """Encoders and decoders of one level: f_S (B,s,h,w) and f_T (B,t,h,w) to their mixture, as
    features of either network, and the loss of reconstructing f_T."""

    def __init__(self, s, t):
        super().__init__()
        self.encode_s, self.encode_t = nn.Conv2d(s, t, 1), nn.Conv2d(t, t, 1)
        self.decode_s, self.decode_t = nn.Conv2d(t, s, 1), nn.Conv2d(t, t, 1)

    def forward(self, f_s, f_t):
        encoded = self.encode_t(f_t)
        z = torch.where(torch.rand_like(encoded) < 0.5, self.encode_s(f_s), encoded)
        as_t = self.decode_t(z)
        error = F.l1_loss(as_t, f_t) + F.l1_loss(self.decode_t(encoded), f_t)
        return {"student": self.decode_s(z), "teacher": as_t}, error / f_t.abs().mean()


def train(teacher, student, mixers, loader, config, device, dtype, a, b):
    """`distill` with the two additional losses; trains the student in place."""
    nets = {"student": student, "teacher": teacher.requires_grad_(False).eval()}
    for net in (student, mixers, teacher):
        net.to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW([*student.parameters(), *mixers.parameters()], lr=config.lr,
                                  betas=(0.9, 0.99), weight_decay=1e-4)
    for step, (x, target) in zip(range(config.steps), loader):
        x, target = to_device(x, device), to_device(target, device).float()
        x = x.contiguous(memory_format=torch.channels_last)
        k, name = random.randrange(1, 1 + len(mixers)), random.choice(list(nets))
        with torch.autocast(device.type, dtype, enabled=dtype is not torch.float32):
            restored, states = run_net(student, x)
            with torch.no_grad():
                states_t = run_net(teacher, x)[1]
            mixtures, error = mixers[k - 1](states[k][0], states_t[k][0])
            skips = {"student": states, "teacher": states_t}[name][k][1]
            with frozen_statistics(student) if name == "student" else nullcontext():
                mixed = run_levels(nets[name], x, [(mixtures[name], skips)], k)
        loss = (F.l1_loss(restored.float(), target) + a * error
                + b * F.l1_loss(mixed.float(), target))
        for group in optimizer.param_groups:
            group["lr"] = config.lr * learning_rate(step / config.steps)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
    student.eval()


def feature_student(run, images, targets, seed, crop, a, b):
    """`Bench.train` with features: the same initial student, batches and learning rates."""
    torch.manual_seed(seed)
    random.seed(seed)
    student = run.new_student(crop)
    with torch.no_grad():
        x = torch.zeros(1, 3, crop, crop)
        channels = [[state[0].shape[1] for state in run_net(net.cpu(), x)[1][1:]]
                    for net in (student, run.teacher)]
    mixers = nn.ModuleList(map(Mixer, *channels))
    loader = Crops(images, crop, run.distill.batch, targets, seed)
    train(run.teacher, student, mixers, loader, run.distill, run.device, run.dtype, a, b)
    return student, images


def main(argv=None):
    parser = make_parser("features", __doc__, seeds="students")
    parser.add_argument("-a", type=d4ir.number(float, 0), default=0.1, help="see above (0.1)")
    parser.add_argument("-b", type=d4ir.number(float, 0), default=0.1, help="see above (0.1)")
    own, rest = parser.parse_known_args(argv)
    bench, name = make_bench(rest), f"features-{own.a:g}-{own.b:g}"
    images = lambda: bench.images("d4ir")
    train = partial(feature_student, crop=bench.crop, a=own.a, b=own.b)
    result = {"d4ir": summary(bench.students("d4ir", images, own.seeds)),
              name: summary(bench.students(name, images, own.seeds, train))}
    result |= provenance("features", argv) | {"seeds": own.seeds}
    write_section(own.results / "neighbours.json", f"{name}, {bench.run.args.task}", result)


if __name__ == "__main__":
    d4ir.run_command(main)
