"""The exported student under onnxruntime, in float32 and with int8 weights and activations.

    pip install onnx onnxscript onnxruntime
    python -m experiments.export --task desnow          # results/export-desnow.json

Takes the flags of d4ir.py and uses the student of its run folder (--out), which the same command
makes first if it is missing. int8 is static quantization, calibrated on 64 synthesized images.
PSNR RGB is that of the test photos; ms is the median time of one image, in turns.
"""
import json
import statistics
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import onnxruntime
import torch
from onnxruntime.quantization import CalibrationDataReader, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process
from torch import nn

import d4ir
from evaluate import evaluate, list_images, read_image
from experiments.common import machine_name, make_parser, provenance
from models import export_restorer, load_restorer, pad_to_multiple

SIZES = (256, 512)


class OnnxRestorer(nn.Module):
    """An ONNX program as a network: (B,3,H,W) in [0,1] to the same, on the CPU."""

    def __init__(self, file, multiple):
        super().__init__()
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        self.session = onnxruntime.InferenceSession(str(file), options, ["CPUExecutionProvider"])
        self.multiple = multiple
        self.placeholder = nn.Parameter(torch.zeros(()))    # shows `evaluate` the device

    def forward(self, image):
        padded = pad_to_multiple(image, self.multiple).contiguous()
        rows = [torch.from_numpy(self.session.run(None, {"image": x[None].numpy()})[0])
                for x in padded]
        return torch.cat(rows)[..., :image.shape[-2], :image.shape[-1]]


class Images(CalibrationDataReader):
    """Images (3,H,W) uint8 for the calibration, one by one."""

    def __init__(self, images):
        self.images = iter(images)

    def get_next(self):
        image = next(self.images, None)
        return None if image is None else {"image": (image[None] / 255).numpy()}


def programs(run, student, folder):
    """{name: network} of the student's exported programs."""
    _, exported = export_restorer(student, folder)
    images = [read_image(file) for file in list_images(run.out / "synth")[:64]]
    images = [image[:, :image.shape[1] // student.multiple * student.multiple,
                    :image.shape[2] // student.multiple * student.multiple] for image in images]
    quant_pre_process(str(exported), str(folder / "prepared.onnx"), skip_symbolic_shape=True)
    quantize_static(str(folder / "prepared.onnx"), str(folder / "int8.onnx"), Images(images),
                    per_channel=True)
    return {"onnxruntime": OnnxRestorer(exported, student.multiple),
            "onnxruntime, int8": OnnxRestorer(folder / "int8.onnx", student.multiple)}


@torch.no_grad()
def milliseconds(networks, size, repeats=15):
    """{name: median time of one image of size x size px}."""
    x = torch.rand(1, 3, size, size).contiguous(memory_format=torch.channels_last)
    times = {name: [] for name in networks}
    for _ in range(repeats):
        for name, network in networks.items():
            start = time.perf_counter()
            network(x)
            times[name].append(1000 * (time.perf_counter() - start))
    return {name: statistics.median(values[1:]) for name, values in times.items()}


def main(argv=None):
    own, rest = make_parser("export", __doc__).parse_known_args(argv)
    run = d4ir.main([*rest, "--device", "cpu"])
    student = load_restorer(run.out / "student.safetensors")
    with TemporaryDirectory() as folder:
        networks = {"teacher": run.teacher, "student": student}
        networks |= programs(run, student, Path(folder))
        rows = {name: {"psnr_rgb": evaluate(network, run.pairs, label=name)["psnr_rgb"]}
                for name, network in networks.items()}
        for size in SIZES:
            for name, value in milliseconds(networks, size).items():
                rows[name][f"ms at {size}x{size}"] = value
    result = {"task": run.args.task, "rows": rows, "threads": torch.get_num_threads(),
              "machine": machine_name(run.device)} | provenance("export", argv)
    own.results.mkdir(parents=True, exist_ok=True)
    d4ir.write_text(own.results / f"export-{run.args.task}.json", json.dumps(result, indent=1))
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    d4ir.run_command(main)
