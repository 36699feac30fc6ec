"""The networks: `Restorer` (teacher and student) and a frozen Stable Diffusion.

symbol      in code            shape, range
x           image              (B,3,H,W) in [0,1]
z = E(x)    sd.encode          (B,C,H/f,W/f), scaled to about unit variance
D(z)        sd.decode          (B,3,H,W) in [0,1]
eps_theta   sd.predict_noise   (z_t, t, prompts) -> (B,C,H/f,W/f): eps or v, depending on the model
P           prompts            (B,N,d), d = the U-Net's cross-attention width
"""
import ast
import copy
import importlib.util
import json
import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval


# ---------------------------------------------------------------- the restorer

class LayerNorm2d(nn.LayerNorm):
    """Layer norm over the channels of (B,C,H,W)."""

    def forward(self, x):
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class ResidualBlock(nn.Module):
    """x + conv(relu(norm(conv(x)))), the block of EDSR (Lim et al. 2017) with a batch norm added.

    The student's block. It moves far less data per multiply-add than `NAFBlock`, whose layer
    norms, depthwise convolutions and means are memory-bound. The norm helps training (results/
    README.md) and costs nothing at inference: `Restorer.fold` merges it into the first convolution.
    """

    def __init__(self, c, norm=True):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(c, c, 3, padding=1), nn.Conv2d(c, c, 3, padding=1)
        self.norm = nn.BatchNorm2d(c) if norm else nn.Identity()
        nn.init.zeros_(self.conv2.bias)
        self.conv2.weight.data /= 2                        # starts closer to the identity

    def forward(self, x):
        return x + self.conv2(F.relu(self.norm(self.conv1(x))))


class NAFBlock(nn.Module):
    """NAFNet's block (Chen et al. 2022): two residual branches with the simple gate a * b. The
    teacher's block.

    window: side of the neighbourhood, in features, that channel attention averages over in eval
    mode (odd); 0: the whole feature map.
    """

    def __init__(self, c, window=0):
        super().__init__()
        self.window = window
        self.norm1, self.norm2 = LayerNorm2d(c, eps=1e-6), LayerNorm2d(c, eps=1e-6)
        self.expand = nn.Conv2d(c, 2 * c, 1)
        self.depthwise = nn.Conv2d(2 * c, 2 * c, 3, padding=1, groups=2 * c)
        self.attention = nn.Conv2d(c, c, 1)                # simplified channel attention
        self.project = nn.Conv2d(c, c, 1)
        self.widen = nn.Conv2d(c, 2 * c, 1)
        self.narrow = nn.Conv2d(c, c, 1)
        self.beta = nn.Parameter(torch.ones(1, c, 1, 1))   # NAFNet starts at 0, which is too slow
        self.gamma = nn.Parameter(torch.ones(1, c, 1, 1))  # for a few thousand steps

    def forward(self, x):
        a, b = self.depthwise(self.expand(self.norm1(x))).chunk(2, dim=1)
        y = a * b                                                           # (B,c,H,W)
        if self.window and not self.training:
            context = local_mean(y, self.window)                            # (B,c,H,W)
        else:
            context = y.mean((2, 3), keepdim=True)                          # (B,c,1,1)
        x = x + self.beta * self.project(y * self.attention(context))
        a, b = self.widen(self.norm2(x)).chunk(2, dim=1)
        return x + self.gamma * self.narrow(a * b)


def local_mean(x, window):
    """The mean over a window x window area (odd side), clipped at the borders; keeps (B,C,H,W)."""
    pad = window // 2
    x = F.avg_pool2d(x, (window, 1), 1, (pad, 0), count_include_pad=False)
    return F.avg_pool2d(x, (1, window), 1, (0, pad), count_include_pad=False)


class Restorer(nn.Module):
    """A NAFNet-style U-Net with a global residual (Chen et al. 2022).

    It works at half resolution (pixel unshuffle), about four times as fast as at full resolution.
    The architecture is our choice: we do not know the paper's networks.

    width: channels at the first level, doubled at each further level.
    encoder, decoder: blocks per level. middle: blocks at the bottom.
    window: side of the training crops, px. In eval mode, the channel attention of "nafnet" averages
      over an area of this size instead of the whole photo (Chu et al. 2022), as in training; tiles
      and whole photos then agree. 0: over the whole photo.
    block: "nafnet" (`NAFBlock`) or "residual" (`ResidualBlock`).
    norm: batch norm in the residual blocks, for training; see `fold`.
    Raises ValueError for an unknown block, or if encoder and decoder differ in their numbers of
      levels.
    """

    def __init__(self, width=16, encoder=(2, 2, 2), middle=1, decoder=(2, 2, 2), window=0,
                 block="nafnet", norm=False):
        super().__init__()
        if block not in ("nafnet", "residual"):
            raise ValueError(f"block must be 'nafnet' or 'residual', not {block!r}")
        if len(encoder) != len(decoder):
            raise ValueError("encoder and decoder must have the same number of levels, not "
                             f"{encoder} and {decoder}")
        self.config = dict(width=width, encoder=list(encoder), middle=middle, decoder=list(decoder),
                           window=window, block=block, norm=norm)
        self.multiple = 2 ** (len(encoder) + 1)            # the padded sides are multiples of this

        def blocks(channels, count):
            if block == "residual":
                return nn.Sequential(*[ResidualBlock(channels, norm) for _ in range(count)])
            features = window * width // (2 * channels)    # the training crop's side at this level
            local = features | 1 if window else 0          # made odd
            return nn.Sequential(*[NAFBlock(channels, local) for _ in range(count)])

        widths = [width * 2 ** level for level in range(len(encoder))]
        self.intro = nn.Conv2d(12, width, 3, padding=1)
        self.encoders = nn.ModuleList(blocks(c, n) for c, n in zip(widths, encoder))
        self.downs = nn.ModuleList(nn.Conv2d(c, 2 * c, 2, stride=2) for c in widths)
        self.middle = blocks(2 * widths[-1], middle)
        self.ups = nn.ModuleList(nn.Sequential(nn.Conv2d(2 * c, 4 * c, 1, bias=False),
                                               nn.PixelShuffle(2)) for c in reversed(widths))
        self.decoders = nn.ModuleList(blocks(c, n) for c, n in zip(reversed(widths), decoder))
        self.ending = nn.Conv2d(width, 12, 3, padding=1)
        nn.init.zeros_(self.ending.weight)                 # starts as the identity
        nn.init.zeros_(self.ending.bias)

    def forward(self, image):
        """image: (B,3,H,W) in [0,1], any H and W. Returns the restored image, (B,3,H,W); values may
        lie slightly outside [0,1]."""
        height, width = image.shape[-2:]
        padded, skips = pad_to_multiple(image, self.multiple), []
        x = self.intro(F.pixel_unshuffle(padded, 2))                        # (B,c,H/2,W/2)
        for encoder, down in zip(self.encoders, self.downs):
            x = encoder(x)
            skips.append(x)
            x = down(x)                                                     # (B,2c,H/4,W/4)
        x = self.middle(x)
        for up, decoder, skip in zip(self.ups, self.decoders, reversed(skips)):
            x = decoder(up(x) + skip)                                       # (B,c,H/2,W/2)
        return (padded + F.pixel_shuffle(self.ending(x), 2))[..., :height, :width]

    def fold(self):
        """A copy in eval mode with the same outputs, without batch norms: the running statistics of
        every batch norm become part of the convolution before it."""
        folded = copy.deepcopy(self).eval()
        for block in folded.modules():
            if isinstance(block, ResidualBlock) and self.config["norm"]:
                block.conv1 = fuse_conv_bn_eval(block.conv1, block.norm)
                block.norm = nn.Identity()
        folded.config["norm"] = False
        return folded


def pad_to_multiple(image, multiple):
    """Pads (B,C,H,W) at the right and bottom to a multiple: by reflection, or by replication if
    the image is smaller than the padding."""
    height, width = image.shape[-2:]
    bottom, right = -height % multiple, -width % multiple
    mode = "reflect" if bottom < height and right < width else "replicate"
    return F.pad(image, (0, right, 0, bottom), mode=mode)


# ---------------------------------------------------------------- a frozen Stable Diffusion

@dataclass
class StableDiffusion:
    """A frozen Stable Diffusion 1.x or 2.x. Images are in [0,1] here and in [-1,1] inside the VAE;
    `encode` and `decode` convert."""
    vae: nn.Module
    unet: nn.Module
    text_encoder: nn.Module
    tokenizer: object
    prediction_type: str                # what the U-Net predicts: 'epsilon' or 'v_prediction'
    alphas_cumprod: torch.Tensor        # (T,) float32 on the CPU: abar_t of the model's schedule
    device: torch.device
    dtype: torch.dtype
    timestep_spacing: str = "leading"   # of its scheduler; 'trailing' in few-step models

    @property
    def width(self):
        """d, the U-Net's cross-attention width: channels per prompt token."""
        return self.unet.config.cross_attention_dim

    @property
    def max_tokens(self):
        """The text encoder's maximum prompt length, in tokens."""
        return self.text_encoder.config.max_position_embeddings

    @property
    def factor(self):
        """f, the VAE's downsampling factor: px per latent."""
        return 2 ** (len(self.vae.config.block_out_channels) - 1)

    @property
    def size(self):
        """Side of the square training images, px."""
        return self.unet.config.sample_size * self.factor

    @torch.no_grad()
    def encode(self, image):
        """image (B,3,H,W) in [0,1] to latents (B,C,H/f,W/f), float32: the posterior's mean, scaled
        by the VAE's config. Raises ValueError if H or W is not a multiple of f."""
        if image.shape[-1] % self.factor or image.shape[-2] % self.factor:
            raise ValueError(f"height and width must be multiples of {self.factor}, "
                             f"not {tuple(image.shape[-2:])}")
        image = (image.to(self.device) * 2 - 1).to(self.dtype, memory_format=torch.channels_last)
        z = self.vae.encode(image).latent_dist.mode().float()
        return z * self.vae.config.scaling_factor

    @torch.no_grad()
    def decode(self, latents):
        """latents (B,C,h,w) to image (B,3,f h,f w), float32, clamped to [0,1]."""
        z = latents / self.vae.config.scaling_factor
        z = z.to(self.device, self.dtype, memory_format=torch.channels_last)
        return ((self.vae.decode(z).sample.float() + 1) / 2).clamp(0, 1)

    def predict_noise(self, z_t, t, prompts):
        """eps_theta: z_t (B,C,h,w), t int or (B,), prompts (B,N,d) to (B,C,h,w), float32.
        Differentiable with respect to the prompts."""
        z_t = z_t.to(self.device, self.dtype, memory_format=torch.channels_last)
        return self.unet(z_t, t, prompts.to(self.device, self.dtype)).sample.float()

    @torch.no_grad()
    def text_prompt(self, text, tokens=None):
        """A text or a list of B texts to prompts (B,tokens,d), float32. tokens: 2 to `max_tokens`,
        which is the default; ValueError outside this range."""
        tokens = tokens or self.max_tokens
        if not 2 <= tokens <= self.max_tokens:
            raise ValueError(f"this model takes prompts of 2 to {self.max_tokens} tokens, "
                             f"not {tokens}")
        ids = self.tokenizer([text] if isinstance(text, str) else list(text), truncation=True,
                             padding="max_length", max_length=tokens, return_tensors="pt")
        return self.text_encoder(ids.input_ids.to(self.device)).last_hidden_state.float()

    def null_prompt(self, tokens=None):
        """The empty text's prompt (1,tokens,d), as in diffusers' classifier-free guidance."""
        return self.text_prompt("", tokens)


def load_stable_diffusion(path_or_id, device="cpu", dtype=torch.float32):
    """Loads and freezes SD 1.x or 2.x from a diffusers folder or a hub id.

    Raises ValueError if a part is missing or the model is of another kind (SDXL, inpainting, LCM).
    """
    from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTokenizer
    source, options = str(path_or_id), dict(torch_dtype=dtype, low_cpu_mem_usage=False)
    unet = load_network(UNet2DConditionModel, source, "unet", **options)
    vae = load_network(AutoencoderKL, source, "vae", **options)
    text_encoder = load_network(CLIPTextModel, source, "text_encoder").to(dtype)
    tokenizer = load_part(CLIPTokenizer, source, "tokenizer")
    scheduler = load_part(DDIMScheduler, source, "scheduler")
    if unet.config.in_channels != vae.config.latent_channels:
        raise ValueError(f"{source}: the U-Net takes {unet.config.in_channels} channels, but the "
                         f"VAE has {vae.config.latent_channels} (an inpainting model?); plain SD "
                         "1.x or 2.x is needed")
    # "text": the U-Net also pools the prompt tokens; this needs no further input.
    conditioned_on_text = unet.config.addition_embed_type in (None, "text")
    same_width = unet.config.cross_attention_dim == text_encoder.config.hidden_size
    if not (conditioned_on_text and same_width):
        raise ValueError(f"{source}: the U-Net needs conditioning beyond the text encoder's "
                         "tokens (SDXL?); SD 1.x or 2.x is needed")
    if unet.config.time_cond_proj_dim is not None:
        raise ValueError(f"{source}: the U-Net takes the guidance as an input (an LCM?); plain SD "
                         "1.x or 2.x is needed")
    # Without its files, transformers silently builds a tokenizer of two tokens.
    if len(tokenizer) != text_encoder.config.vocab_size:
        raise ValueError(f"{source}: the tokenizer has {len(tokenizer)} tokens, but the text "
                         f"encoder expects {text_encoder.config.vocab_size}; is it complete?")
    prediction_type = scheduler.config.prediction_type
    if prediction_type not in ("epsilon", "v_prediction"):
        raise ValueError(f"{source}: prediction type {prediction_type!r} is not supported; it must "
                         "be 'epsilon' or 'v_prediction'")
    for network in (unet, vae, text_encoder):
        network.requires_grad_(False).eval().to(device, memory_format=torch.channels_last)
    return StableDiffusion(vae, unet, text_encoder, tokenizer, prediction_type,
                           scheduler.alphas_cumprod.clamp(min=2 ** -24),   # no division by 0
                           torch.device(device), dtype, scheduler.config.timestep_spacing)


def load_network(kind, source, name, **options):
    """Like `load_part`, but also raises ValueError for missing weights, which would stay random."""
    network, info = load_part(kind, source, name, output_loading_info=True, **options)
    missing = sorted(info["missing_keys"])
    if missing:
        raise ValueError(f"{source}: {name}: {len(missing)} weights are missing from the file: "
                         f"{', '.join(missing[:3])}")
    return network


def load_part(kind, source, name, **options):
    """Loads one part of a Stable Diffusion model; ValueError if it is missing, broken or of another
    kind. Some repositories have fp16 files only."""
    failure = None
    for variant in ({}, {"variant": "fp16"}):
        try:
            return kind.from_pretrained(source, subfolder=name, **options, **variant)
        except Exception as error:                         # many exception types
            failure = failure or error
    raise ValueError(f"{source}: no Stable Diffusion 1.x or 2.x in diffusers' layout: {name} "
                     f"cannot be loaded: {first_line(failure)}")


# ---------------------------------------------------------------- loading, saving, exporting

def load_restorer(spec, device="cpu", multiple=1):
    """Loads a frozen restoration network in eval mode: (B,3,H,W) in [0,1] to the same shape.

    spec: a `.safetensors` file written by `save_restorer`, or `FILE.py:NAME@WEIGHTS`. NAME is a
      class or function in FILE.py that returns an nn.Module; keyword literals may follow, as in
      `NAME(width=48, blocks=[4, 6])`. WEIGHTS is a state_dict, plain or wrapped in the usual ways.
    multiple: the input of a FILE.py network is padded to a multiple of this, px.
    Raises ValueError if a file or name is missing, unreadable, or does not match the network.
    """
    external = re.fullmatch(r"(.+\.py):([A-Za-z_]\w*)(\(.*\))?@(.+)", str(spec))
    if external:
        file, name, arguments, weights = external.groups()
        network = build_network(Path(file), name, arguments or "()")
        load_matching(network, read_weights(Path(weights)), weights)
        return ExternalRestorer(network, multiple).requires_grad_(False).eval().to(device)
    path = Path(spec)
    if path.suffix != ".safetensors":
        raise ValueError(f"{path}: not a readable network; it must be a .safetensors file of this "
                         "project or FILE.py:NAME@WEIGHTS")
    state = read_weights(path)
    try:
        with safe_open(path, "pt") as file:
            config = json.loads((file.metadata() or {})["restorer"])
        counts = [config["middle"], len(config["encoder"]), *config["encoder"], *config["decoder"]]
        if min(*counts, config["window"]) < 0 or sum(counts) > len(state):
            raise ValueError(f"negative values, or more blocks than tensors ({len(state)})")
        with torch.device("meta"):                         # no allocation before the shapes match
            model = Restorer(**config)
        state = {key: value.float() for key, value in state.items()}
    except Exception as error:                             # the metadata can hold any JSON
        raise ValueError(f"{path}: its metadata does not describe a valid Restorer "
                         f"({type(error).__name__}: {first_line(error)}); specify other networks "
                         "as FILE.py:NAME@WEIGHTS") from None
    load_matching(model, state, path, assign=True)
    return model.requires_grad_(False).eval().to(device, memory_format=torch.channels_last)


def save_restorer(model, path):
    """Writes a Restorer, folded, as fp16 safetensors, with its architecture in the metadata. Raises
    ValueError for weights that are not finite in fp16."""
    model = model.fold()
    state = {k: v.cpu().half().contiguous() for k, v in model.state_dict().items()}
    if not all(value.isfinite().all() for value in state.values()):
        raise ValueError(f"{path}: not written, because weights are not finite in fp16")
    save_file(state, f"{path}.tmp", metadata={"restorer": json.dumps(model.config)})
    os.replace(f"{path}.tmp", path)


def export_restorer(model, folder):
    """Writes folder/student.pt2 (torch.export) and, if the packages onnx and onnxscript are
    installed, folder/student.onnx. Returns the list of written paths.

    model: a Restorer in eval mode, on the CPU.
    The exported programs take (1,3,H,W) in [0,1], H and W multiples of `model.multiple` and at
    least twice that: the caller pads, because torch.export cannot trace a padding that may be 0.
    """
    folder, m = Path(folder), model.multiple
    example = torch.rand(1, 3, 5 * m, 6 * m)
    sizes = {2: m * torch.export.Dim("rows", min=2, max=1024),
             3: m * torch.export.Dim("columns", min=2, max=1024)}
    program = torch.export.export(model, (example,), dynamic_shapes={"image": sizes})
    torch.export.save(program, folder / "student.tmp.pt2")
    os.replace(folder / "student.tmp.pt2", folder / "student.pt2")
    if not (importlib.util.find_spec("onnx") and importlib.util.find_spec("onnxscript")):
        return [folder / "student.pt2"]
    torch.onnx.export(program, (), folder / "student.tmp.onnx", dynamo=True, external_data=False,
                      input_names=["image"], output_names=["restored"], verbose=False)
    os.replace(folder / "student.tmp.onnx", folder / "student.onnx")
    return [folder / "student.pt2", folder / "student.onnx"]


# ---------------------------------------------------------------- third-party teachers

class ExternalRestorer(nn.Module):
    """Another project's network. Pads its input to a multiple; keeps the first of several outputs.

    Raises ValueError if the network fails or changes the image's shape.
    """

    def __init__(self, network, multiple):
        super().__init__()
        self.network, self.multiple = network, multiple

    def forward(self, image):
        padded = pad_to_multiple(image, self.multiple).contiguous()
        shape = tuple(padded.shape)
        try:
            output = self.network(padded)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:                         # third-party code may raise anything
            raise ValueError(f"the network fails on an input of shape {shape}: {first_line(error)} "
                             "(does it need a larger --teacher-multiple?)") from error
        if isinstance(output, (tuple, list)):
            output = output[0]
        new_shape = tuple(getattr(output, "shape", ()))
        if new_shape != shape:
            raise ValueError(f"the network maps {shape} to {new_shape}; it must keep the shape "
                             "(does it need a different --teacher-multiple?)")
        return output[..., :image.shape[-2], :image.shape[-1]]


def build_network(file, name, arguments):
    """Imports FILE.py and calls its NAME with keyword literals such as '(a=1, b=[2, 3])'.

    The file's imports are resolved in its own folder first. Other projects often have their own
    `models.py` or `demo` and would find ours in sys.modules, so ours are removed temporarily.
    """
    if not file.is_file():
        raise ValueError(f"{file}: no such file")
    keywords = parse_keywords(name, arguments)
    spec = importlib.util.spec_from_file_location(f"_teacher_{file.stem}", file)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module                        # dataclasses look their module up there
    path, ours = list(sys.path), pop_own_modules()
    sys.path.insert(0, str(file.resolve().parent))
    try:
        spec.loader.exec_module(module)
        network = getattr(module, name)(**keywords)
    except ModuleNotFoundError as error:
        raise ValueError(f"{file}: {first_line(error)}: install it, or remove the import if the "
                         "network does not use it") from error
    except (Exception, SystemExit) as error:               # third-party code may raise anything
        raise ValueError(f"{file}: {name}{arguments} failed: {type(error).__name__}: "
                         f"{first_line(error)}") from error
    finally:
        pop_own_modules()                                  # the teacher's modules of these names
        sys.modules.update(ours)
        sys.path[:] = path
    if not isinstance(network, nn.Module):
        raise ValueError(f"{file}: {name} returned a {type(network).__name__}, not an nn.Module")
    return network


def parse_keywords(name, arguments):
    """'(a=1, b=[2, 3])' to {"a": 1, "b": [2, 3]}; ValueError for anything but keyword literals."""
    try:
        call = ast.parse(f"{name}{arguments}", mode="eval").body
        if not isinstance(call, ast.Call) or call.args or not all(k.arg for k in call.keywords):
            raise ValueError("every argument needs a name")
        return {k.arg: ast.literal_eval(k.value) for k in call.keywords}
    except (SyntaxError, ValueError) as error:
        raise ValueError(f"{name}{arguments}: arguments must be keyword literals, as in "
                         f"{name}(width=48) ({first_line(error)})") from None


def pop_own_modules():
    """Removes modules with the names of this project's files from sys.modules; returns them."""
    own = {path.stem for path in Path(__file__).resolve().parent.iterdir()}
    names = [name for name in sys.modules if name.partition(".")[0] in own]
    return {name: sys.modules.pop(name) for name in names}


def read_weights(path):
    """The state_dict in a .safetensors or torch file, plain or under one of the usual keys."""
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    try:
        is_safetensors = path.suffix == ".safetensors"
        state = load_file(path) if is_safetensors else torch.load(path, "cpu", weights_only=True)
    except Exception as error:                             # zip, pickle and safetensors errors
        code = re.search(r"GLOBAL (\S+)", str(error))      # what weights_only=True refuses
        if code:
            raise ValueError(f"{path}: refused: it contains {code[1]}, and loading that could run "
                             "code; save only its state_dict") from None
        reason = str(error).rpartition("WeightsUnpickler error:")[2] or error
        raise ValueError(f"{path}: not a readable checkpoint ({first_line(reason)})") from None
    state = state if isinstance(state, dict) else {}
    for key in ("params_ema", "params", "state_dict", "model"):
        if isinstance(state.get(key), dict):
            state = state[key]
    tensors = {str(key): value for key, value in state.items() if torch.is_tensor(value)}
    if not tensors:
        raise ValueError(f"{path}: contains no state_dict ({', '.join(map(str, list(state)[:5]))})")
    return tensors


def load_matching(model, state, source, assign=False):
    """Loads a state_dict whose keys may share a prefix ('module.', 'net.', ...).

    Raises ValueError, with names, for missing keys, unexpected keys, and shapes that differ.
    """
    expected = model.state_dict()
    first = next(iter(expected), "")
    prefixes = sorted({key.removesuffix(first) for key in state if key.endswith("." + first)})
    prefix = max(["", *prefixes], key=lambda p: sum(p + key in state for key in expected))
    state = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
    try:
        # A network's own load_state_dict may differ, as EDSR's does.
        missing, unexpected = nn.Module.load_state_dict(model, state, strict=False, assign=assign)
    except RuntimeError as error:                          # its second line names the first shape
        raise ValueError(f"{source}: the weights do not match the network: "
                         f"{str(error).splitlines()[:2][-1].strip()}") from None
    if missing or unexpected:
        raise ValueError(f"{source}: the weights do not match the network: {len(missing)} missing "
                         f"keys {missing[:3]}, {len(unexpected)} unexpected keys {unexpected[:3]}")


def has_bf16(device):
    """Whether a device supports bf16 in hardware; emulated bf16 is slower than float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    cpu = torch.cpu.get_capabilities()
    return device.type != "cpu" or any(cpu.get(x) for x in ("avx512_bf16", "amx_bf16", "bf16"))


def first_line(error):
    """The first line of an exception's message, or its type if it has none."""
    return str(error).strip().split("\n")[0] or type(error).__name__
