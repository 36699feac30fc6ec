"""Data-free adversarial distillation, the baseline `gan` of experiments.compare.

    loss of G = -log ||T(x) - S(x)||_1 - variety ||G(a) - G(b)||_1 / ||a - b||_1
                + prior ||T(x) - x||_1,    x = G(z)

The generator widens the gap between teacher and student (DFAD, Fang et al. 2019), keeps its images
varied (mode seeking, Mao et al. 2019; a and b are neighbours in the batch), and keeps them close to
what the teacher returns. Zhang et al. (2021) use a term similar to the last one for
super-resolution. Without it, the generator produces unnatural noise and the student fits that.
"""
import torch
from torch import nn


class Generator(nn.Module):
    """z (B,128), standard normal, to images (B,3,side,side) in [0,1]."""

    def __init__(self, side, channels=128):
        super().__init__()
        c, start = 2 * channels, -(-side // 8)
        self.side, self.shape = side, (c, start, start)
        self.start = nn.Linear(128, c * start ** 2)
        layers = [nn.BatchNorm2d(c)]
        for out in (channels, channels // 2, channels // 2):
            layers += [nn.Upsample(scale_factor=2), nn.Conv2d(c, out, 3, padding=1),
                       nn.BatchNorm2d(out), nn.LeakyReLU(0.2)]
            c = out
        self.layers = nn.Sequential(*layers, nn.Conv2d(c, 3, 3, padding=1), nn.BatchNorm2d(3),
                                    nn.Sigmoid())

    def forward(self, z):
        return self.layers(self.start(z).view(-1, *self.shape))[..., :self.side, :self.side]


class Adversary:
    """Endless batches (x, T(x)), (B,3,crop,crop) in [0,1], of a generator that is updated once for
    each of the student's updates."""
    lr, variety, prior = 5e-4, 1.0, 30.0

    def __init__(self, teacher, student, crop, batch, device, dtype, seed):
        torch.manual_seed(seed)
        self.generator = Generator(crop).to(device, memory_format=torch.channels_last)
        self.teacher, self.student, self.batch = teacher, student, batch
        self.device, self.dtype = device, dtype

    def __len__(self):
        return 1

    def __iter__(self):
        weights = list(self.generator.parameters())
        optimizer = torch.optim.Adam(weights, lr=self.lr, betas=(0.5, 0.999))
        while True:
            z = torch.randn(self.batch, 128, device=self.device)
            with torch.autocast(self.device.type, self.dtype,
                                enabled=self.dtype is not torch.float32):
                x = self.generator(z).float().contiguous(memory_format=torch.channels_last)
                target = self.teacher(x).float().clamp(0, 1)
                gap = (target - self.student(x).float()).abs().mean()
            distance_x = (x - x.roll(1, 0)).abs().mean((1, 2, 3))
            distance_z = (z - z.roll(1, 0)).abs().mean(1)
            variety = (distance_x / (distance_z + 1e-6)).mean()
            change = (target - x).abs().mean()
            loss = -(gap + 1e-6).log() - self.variety * variety + self.prior * change
            optimizer.zero_grad(set_to_none=True)
            loss.backward(inputs=weights)                  # not into the student's gradients
            optimizer.step()
            yield x.detach(), target.detach()
