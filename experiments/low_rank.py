"""One student for all kinds of weather, with low-rank weights for each, against a shared one; after
Instruct-IPT (Tian et al. 2024, arXiv 2407.00676).

    python -m experiments.low_rank                      # adds to results/neighbours.json

Instruct-IPT, a transformer, is told the task. Its weights are shared; those that matter most also
have a low-rank term for each task, trained together with them:

    W_k = W + B_k A_k,    k: the task; B_k (out,r), A_k (r,in 3 3)

Simplified: all 3x3 convolutions of the residual blocks have this term; each task also has its own
norms and first and last convolutions. W_k is computed once, so that inference costs the same.

Takes the flags of d4ir.py except --task, which is `all`. Both students are trained on
the images of a row of experiments.compare, for the same number of updates and crops.
"""
import copy

import torch
import torch.nn.functional as F
from torch import nn

import d4ir
from distill import Crops, learning_rate, teacher_outputs, to_device
from evaluate import evaluate, means
from experiments.common import make_parser, provenance, write_section
from experiments.compare import make_bench, summary
from experiments.following import photo_number
from models import ResidualBlock

TASKS = len(d4ir.TASKS["all"].weather)


class LowRankConv(nn.Module):
    """A convolution with the weight W + B_k A_k of the chosen task k."""

    def __init__(self, conv, tasks, rank):
        super().__init__()
        out, inputs = len(conv.weight), conv.weight[0].numel()
        self.conv, self.task, rank = conv, 0, max(1, round(rank * out)) if rank else 0
        self.a = nn.Parameter(torch.randn(tasks, rank, inputs) / inputs ** 0.5)
        self.b = nn.Parameter(torch.zeros(tasks, out, rank))            # starts at W

    def weight(self, task):
        return self.conv.weight + (self.b[task] @ self.a[task]).view_as(self.conv.weight)

    def forward(self, x):
        return F.conv2d(x, self.weight(self.task), self.conv.bias, padding=1)

    def plain(self, task):
        conv = copy.deepcopy(self.conv)
        conv.weight.data = self.weight(task).detach()
        return conv


class PerTask(nn.ModuleList):
    """One copy of a module for each task."""
    task, plain = 0, nn.ModuleList.__getitem__

    def forward(self, x):
        return self[self.task](x)


def add_tasks(student, tasks, rank):
    """Gives a residual student low-rank weights, norms and outer convolutions for each task."""
    per_task = lambda module: PerTask(copy.deepcopy(module) for _ in range(tasks))
    for block in list(student.modules()):
        if isinstance(block, ResidualBlock):
            block.conv1 = LowRankConv(block.conv1, tasks, rank)
            block.conv2 = LowRankConv(block.conv2, tasks, rank)
            block.norm = per_task(block.norm)
    student.intro, student.ending = per_task(student.intro), per_task(student.ending)
    return student


def choose(student, task):
    """Sets the task of the next forward passes."""
    for module in student.modules():
        if isinstance(module, (LowRankConv, PerTask)):
            module.task = task


def for_task(student, task):
    """A plain `Restorer` with the weights of one task, folded."""
    student = copy.deepcopy(student)
    for parent in list(student.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, (LowRankConv, PerTask)):
                setattr(parent, name, child.plain(task))
    return student.fold()


def train(student, loaders, config, device, dtype):
    """`distill` with one batch of each task in every update; trains the student in place."""
    student.to(device, memory_format=torch.channels_last).train()
    optimizer = torch.optim.AdamW(student.parameters(), lr=config.lr, betas=(0.9, 0.99),
                                  weight_decay=1e-4)
    for step, *batches in zip(range(config.steps), *loaders):
        for group in optimizer.param_groups:
            group["lr"] = config.lr * learning_rate(step / config.steps)
        optimizer.zero_grad(set_to_none=True)
        for task, (x, target) in enumerate(batches):
            choose(student, task)
            with torch.autocast(device.type, dtype, enabled=dtype is not torch.float32):
                restored = student(to_device(x, device))
            loss = F.l1_loss(restored.float(), to_device(target, device).float())
            (loss / len(batches)).backward()
        nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()


def low_rank_student(bench, images, tasks, rank, seed):
    """Metrics and number of parameters of a student trained on images whose tasks are known."""
    run, loaders, rows = bench.run, [], []
    torch.manual_seed(seed)
    student = add_tasks(run.new_student(bench.crop), TASKS, rank)
    for task in range(TASKS):
        own = [image for image, t in zip(images, tasks) if t == task]
        outputs = list(teacher_outputs(run.teacher, own, run.device, run.dtype))
        batch = (run.distill.batch + task) // TASKS         # of 16 crops: 5, 5 and 6
        loaders.append(Crops(own, bench.crop, batch, outputs, seed))
    train(student, loaders, run.distill, run.device, run.dtype)
    for task in range(TASKS):                               # test photos alternate between tasks
        rows += evaluate(for_task(student, task), run.pairs[task::TASKS])["images"]
    return means(rows) | {"params": sum(p.numel() for p in student.parameters())}


def main(argv=None):
    parser = make_parser("low_rank", __doc__, seeds="students")
    parser.add_argument("--source", choices=("original", "d4ir"), default="original",
                        help="the row whose images to train on (original)")
    parser.add_argument("--rank", type=d4ir.number(float, 0), default=0.03, metavar="R",
                        help="r / out; 0: only norms and outer convolutions per task (0.03)")
    own, rest = parser.parse_known_args(argv)
    bench = make_bench(["--task", "all", *rest])
    run = bench.run
    if not run.args.degraded.is_relative_to(run.out):
        raise ValueError("the weather of each photo is known for the demo's photos only")
    images = bench.images(own.source)
    tasks = [(photo_number(run, i) if own.source == "d4ir" else i) % TASKS
             for i in range(len(images))]                   # photos alternate between tasks
    shared = bench.students(own.source, lambda: images, own.seeds)
    results = [low_rank_student(bench, images, tasks, own.rank, seed)
               for seed in range(run.args.seed, run.args.seed + own.seeds)]
    result = {"shared": summary(shared), "low rank": summary(results)}
    result |= provenance("low_rank", argv) | {"seeds": own.seeds}
    write_section(own.results / "neighbours.json", f"low rank {own.rank:g}, {own.source}", result)


if __name__ == "__main__":
    d4ir.run_command(main)
