"""The networks: `Restorer` (teacher and student), and a frozen Stable Diffusion as plain functions.

symbol      in code            shape, range
x           image              (B,3,H,W) in [0,1]
z = E(x)    sd.encode          (B,C,H/f,W/f), scaled to about unit variance by the VAE's own factor
D(z)        sd.decode          (B,3,H,W) in [0,1]
eps_theta   sd.predict_noise   (z_t, t, prompts) -> (B,C,H/f,W/f): eps, or v, as the U-Net has it
P           prompts            (B,N,d), d = the U-Net's cross-attention width
"""
import ast
import importlib.util
import json
import os
import pickle
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn


# ---------------------------------------------------------------- the restorer

class LayerNorm2d(nn.LayerNorm):
    """Layer norm over the channels of (B,C,H,W)."""

    def forward(self, x):
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Block(nn.Module):
    """NAFNet's block (Chen et al. 2022): two residual parts, nonlinear by the simple gate a * b.

    window: features that channel attention averages over, once trained; 0: all of them.
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
        self.beta = nn.Parameter(torch.ones(1, c, 1, 1))   # NAFNet's 0 starts too slowly for
        self.gamma = nn.Parameter(torch.ones(1, c, 1, 1))  # trainings of a few thousand steps

    def forward(self, x):
        a, b = self.depthwise(self.expand(self.norm1(x))).chunk(2, dim=1)
        y = a * b                                                           # (B,c,H,W)
        local = self.window and not self.training
        context = local_mean(y, self.window) if local else y.mean((2, 3), keepdim=True)
        y = y * self.attention(context)                                     # (B,c,1,1) if not local
        x = x + self.beta * self.project(y)
        a, b = self.widen(self.norm2(x)).chunk(2, dim=1)
        return x + self.gamma * self.narrow(a * b)


def local_mean(x, window):
    """The mean over window x window neighbours (odd), cut off at the borders: (B,C,H,W) to the
    same."""
    pad = window // 2
    x = F.avg_pool2d(x, (window, 1), 1, (pad, 0), count_include_pad=False)
    return F.avg_pool2d(x, (1, window), 1, (0, pad), count_include_pad=False)


class Restorer(nn.Module):
    """A NAFNet-style U-Net with a global residual (Chen et al. 2022): a degraded photo to a clean
    one. It works on the 2x2 px of the photo as channels, which makes it four times as fast. Our
    choice: the paper's networks are not known to us.

    width: channels at the first level, doubled at each. encoder, decoder: blocks a level. middle:
    blocks at the bottom. window: px, the side of the crops that it is trained on: a trained network
    averages its channel attention over as much, not over whole photos, which it has never seen
    (test-time local conversion, Chu et al. 2022), so tiles and whole photos agree; 0: over whole
    photos. Raises ValueError where encoder and decoder differ in levels.
    """

    def __init__(self, width=32, encoder=(1, 1, 2), middle=2, decoder=(1, 1, 1), window=0):
        super().__init__()
        if len(encoder) != len(decoder):
            raise ValueError(f"encoder and decoder need as many levels: {encoder}, {decoder}")
        self.config = dict(width=width, encoder=list(encoder), middle=middle, decoder=list(decoder),
                           window=window)
        self.multiple = 2 ** (len(encoder) + 1)
        local = lambda c: window * width // (2 * c) | 1 if window else 0   # c doubles as sides halve
        blocks = lambda c, n: nn.Sequential(*[Block(c, local(c)) for _ in range(n)])
        widths = [width * 2 ** i for i in range(len(encoder) + 1)]
        self.intro = nn.Conv2d(12, width, 3, padding=1)
        self.encoders = nn.ModuleList(blocks(c, n) for c, n in zip(widths, encoder))
        self.downs = nn.ModuleList(nn.Conv2d(c, 2 * c, 2, stride=2) for c in widths[:-1])
        self.middle = blocks(widths[-1], middle)
        widths = widths[-2::-1]
        self.ups = nn.ModuleList(nn.Sequential(nn.Conv2d(2 * c, 4 * c, 1, bias=False),
                                               nn.PixelShuffle(2)) for c in widths)
        self.decoders = nn.ModuleList(blocks(c, n) for c, n in zip(widths, decoder))
        self.ending = nn.Conv2d(width, 12, 3, padding=1)
        nn.init.zeros_(self.ending.weight)
        nn.init.zeros_(self.ending.bias)                   # starts as the identity

    def forward(self, image):
        """image: (B,3,H,W) in [0,1], any H and W. Returns the restored (B,3,H,W), in about [0,1]:
        clamp it to save it."""
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


def pad_to_multiple(image, multiple):
    """Pads (B,C,H,W) right and below to a multiple, by reflection where the photo is large."""
    height, width = image.shape[-2:]
    bottom, right = -height % multiple, -width % multiple
    mode = "reflect" if bottom < height and right < width else "replicate"
    return F.pad(image, (0, right, 0, bottom), mode=mode)


# ---------------------------------------------------------------- saving and loading restorers

def first_line(error):
    """What an exception says, in one line."""
    return str(error).strip().split("\n")[0] or type(error).__name__


def save_restorer(model, path):
    """Writes a Restorer as safetensors in fp16, its architecture in the metadata."""
    state = {k: v.detach().cpu().half().contiguous() for k, v in model.state_dict().items()}
    save_file(state, f"{path}.tmp", metadata={"restorer": json.dumps(model.config)})
    os.replace(f"{path}.tmp", path)


def load_restorer(spec, device="cpu", multiple=1):
    """A frozen restoration network, in eval mode: an nn.Module, (B,3,H,W) in [0,1] to the same.

    spec: a `.safetensors` written by `save_restorer`, or `FILE.py:NAME@WEIGHTS`. NAME is a class or
      function in FILE.py that returns an nn.Module, with keyword literals if it needs arguments,
      `NAME(width=48, blocks=[4, 6])`; WEIGHTS is a state_dict in any of the usual wrappings.
    multiple: foreign networks get their input padded by reflection to a multiple of this.
    Raises ValueError for what can't be found, read or matched.
    """
    foreign = re.fullmatch(r"(.+\.py):([A-Za-z_]\w*)(\(.*\))?@(.+)", str(spec))
    if foreign:
        file, name, arguments, weights = foreign.groups()
        model = Foreign(build(Path(file), name, arguments or "()"), multiple)
        load_matching(model.network, read_weights(Path(weights)), weights)
        return model.requires_grad_(False).eval().to(device)
    if not Path(spec).is_file():
        raise ValueError(f"{spec}: no such file (a network is a .safetensors of this project or "
                         "FILE.py:NAME@WEIGHTS)")
    try:
        with safe_open(spec, "pt") as file:
            config = (file.metadata() or {}).get("restorer")
            state = {k: file.get_tensor(k) for k in file.keys()}
    except Exception as error:                             # safetensors raises private kinds
        raise ValueError(f"{spec}: not a readable .safetensors ({first_line(error)})") from None
    if config is None:
        raise ValueError(f"{spec}: its metadata names no Restorer; give a network of your own as "
                         "FILE.py:NAME@WEIGHTS")
    model = Restorer(**json.loads(config))
    load_matching(model, state, spec)
    return model.requires_grad_(False).eval().to(device, memory_format=torch.channels_last)


class Foreign(nn.Module):
    """Somebody else's network: padded to the multiple it needs; of several outputs, the first."""

    def __init__(self, network, multiple):
        super().__init__()
        self.network, self.multiple = network, multiple

    def forward(self, image):
        padded = pad_to_multiple(image, self.multiple).contiguous()
        try:
            output = self.network(padded)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:                         # it is anyone's code
            raise ValueError(f"the teacher can't take {tuple(padded.shape)}: {first_line(error)} "
                             "(does it need a larger --teacher-multiple?)") from error
        output = output[0] if isinstance(output, (tuple, list)) else output
        shape = tuple(getattr(output, "shape", ()))
        if shape != tuple(padded.shape):
            raise ValueError(f"the teacher turns {tuple(padded.shape)} into {shape}: it must keep "
                             "the shape (does it need another --teacher-multiple?)")
        return output[..., :image.shape[-2], :image.shape[-1]]


def build(file, name, arguments):
    """FILE.py's NAME, called with keyword literals: '(a=1, b=[2, 3])'."""
    if not file.is_file():
        raise ValueError(f"{file}: no such file")
    try:
        call = ast.parse(f"f{arguments}", mode="eval").body
        if not isinstance(call, ast.Call) or call.args or any(k.arg is None for k in call.keywords):
            raise ValueError("name every argument")
        keywords = {k.arg: ast.literal_eval(k.value) for k in call.keywords}
    except (SyntaxError, ValueError) as error:
        raise ValueError(f"{name}{arguments}: arguments must be keyword literals, as in "
                         f"{name}(width=48) ({first_line(error)})") from None
    spec = importlib.util.spec_from_file_location(f"_teacher_{file.stem}", file)
    module = importlib.util.module_from_spec(spec)
    names, path = {p.stem for p in Path(__file__).parent.glob("*.py")}, list(sys.path)
    ours = {name: sys.modules.pop(name) for name in names & sys.modules.keys()}
    sys.modules[spec.name] = module                        # dataclasses look there
    sys.path.insert(0, str(file.resolve().parent))         # for files that it imports beside it,
    try:                                                   # `models` or `demo` among them
        spec.loader.exec_module(module)
        network = getattr(module, name)(**keywords)
    except Exception as error:                             # it is anyone's code: say whose
        raise ValueError(f"{file}: {name}{arguments} failed: {type(error).__name__}: "
                         f"{first_line(error)}") from error
    finally:
        sys.path[:] = path
        for name in names:
            sys.modules.pop(name, None)
        sys.modules.update(ours)
    if not isinstance(network, nn.Module):
        raise ValueError(f"{file}: {name} gives a {type(network).__name__}, not an nn.Module")
    return network


def read_weights(path):
    """The state_dict in a .safetensors or torch file: plain, or under one of the usual keys."""
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    try:
        plain = path.suffix == ".safetensors"
        state = load_file(path) if plain else torch.load(path, "cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(f"{path}: it holds more than tensors and plain values, and code in a "
                         "checkpoint is refused; save its state_dict alone "
                         f"({first_line(error)})") from None
    except Exception as error:                             # zip, pickle, safetensors: each its own
        raise ValueError(f"{path}: not a readable checkpoint ({first_line(error)})") from None
    for key in ("params_ema", "params", "state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    tensors = isinstance(state, dict) and {k: v for k, v in state.items() if torch.is_tensor(v)}
    if not tensors:
        raise ValueError(f"{path}: no state_dict in it")
    return tensors


def load_matching(model, state, source):
    """Loads a state_dict whose keys may all carry a prefix ('module.', 'net.', ...).

    Raises ValueError, with names, where keys are missing or left over, or shapes differ.
    """
    expected = model.state_dict()
    first = next(iter(expected), "")
    prefixes = {""} | {key[:-len(first)] for key in state if key.endswith("." + first)}
    prefix = max(sorted(prefixes), key=lambda p: sum(p + key in state for key in expected))
    state = {k[len(prefix):]: v for k, v in state.items() if k.startswith(prefix)}
    shapes = [f"{k} is {tuple(state[k].shape)}, not {tuple(v.shape)}"
              for k, v in expected.items() if k in state and state[k].shape != v.shape]
    found = (("keys are missing", sorted(expected.keys() - state.keys())),
             ("keys are unexpected", sorted(state.keys() - expected.keys())),
             ("shapes differ", shapes))
    problems = [f"{len(names)} {what}, such as {', '.join(names[:3])}"
                for what, names in found if names]
    if problems:
        raise ValueError(f"{source}: its weights don't fit the network: {'; '.join(problems)}")
    model.load_state_dict(state)


# ---------------------------------------------------------------- a frozen Stable Diffusion

@dataclass
class StableDiffusion:
    """A frozen Stable Diffusion 1.x or 2.x. Images are in [0,1] outside and in [-1,1] inside:
    converted here and nowhere else."""
    vae: nn.Module
    unet: nn.Module
    text_encoder: nn.Module
    tokenizer: object
    prediction_type: str                # what eps_theta predicts: 'epsilon' or 'v_prediction'
    alphas_cumprod: torch.Tensor        # (T,) float32 on the CPU: abar_t, the model's own
    device: torch.device
    dtype: torch.dtype

    @property
    def width(self):
        """d, the U-Net's cross-attention width: channels of a prompt token."""
        return self.unet.config.cross_attention_dim

    @property
    def factor(self):
        """f: px of the image to one latent."""
        return 2 ** (len(self.vae.config.block_out_channels) - 1)

    @property
    def size(self):
        """px: the side of the square images that the model was trained on."""
        return self.unet.config.sample_size * self.factor

    @torch.no_grad()
    def encode(self, image):
        """image (B,3,H,W) in [0,1] to latents (B,C,H/f,W/f) float32: the posterior's mean, scaled
        by the VAE's own config. Raises ValueError where H or W is no multiple of f."""
        if image.shape[-1] % self.factor or image.shape[-2] % self.factor:
            raise ValueError(f"height and width must be multiples of {self.factor}, "
                             f"not {tuple(image.shape[-2:])}")
        image = image.to(self.device, self.dtype, memory_format=torch.channels_last) * 2 - 1
        z = self.vae.encode(image).latent_dist.mode().float()
        return (z - (self.vae.config.shift_factor or 0)) * self.vae.config.scaling_factor

    @torch.no_grad()
    def decode(self, latents):
        """latents (B,C,h,w) to image (B,3,f h,f w) float32, clamped to [0,1]."""
        z = latents / self.vae.config.scaling_factor + (self.vae.config.shift_factor or 0)
        z = z.to(self.device, self.dtype, memory_format=torch.channels_last)
        return ((self.vae.decode(z).sample.float() + 1) / 2).clamp(0, 1)

    def predict_noise(self, z_t, t, prompts):
        """eps_theta: z_t (B,C,h,w), t int or (B,), prompts (B,N,d) to (B,C,h,w) float32.
        Differentiable in the prompts."""
        z_t = z_t.to(self.device, self.dtype, memory_format=torch.channels_last)
        return self.unet(z_t, t, prompts.to(self.device, self.dtype)).sample.float()

    @torch.no_grad()
    def text_prompt(self, text, tokens=None):
        """A text, or a list of B, to prompts (B,tokens,d) float32; all tokens by default."""
        limit = self.text_encoder.config.max_position_embeddings
        if not 2 <= (tokens or limit) <= limit:
            raise ValueError(f"this Stable Diffusion takes 2 to {limit} tokens, not {tokens}")
        ids = self.tokenizer([text] if isinstance(text, str) else list(text), truncation=True,
                             padding="max_length", max_length=tokens or limit, return_tensors="pt")
        return self.text_encoder(ids.input_ids.to(self.device)).last_hidden_state.float()

    def null_prompt(self, tokens=None):
        """The empty text's prompt (1,tokens,d), as diffusers' pipelines make it for guidance."""
        return self.text_prompt("", tokens)


def load_stable_diffusion(path_or_id, device="cpu", dtype=torch.float32):
    """Loads SD 1.x or 2.x from a folder in diffusers' layout or from a hub id, and freezes it.

    Raises ValueError for what is no such model: parts missing, SDXL, an inpainting U-Net.
    """
    from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTokenizer
    where, parts, options = str(path_or_id), {}, dict(torch_dtype=dtype, low_cpu_mem_usage=False)
    kinds = {"unet": UNet2DConditionModel, "vae": AutoencoderKL, "text_encoder": CLIPTextModel}
    for name, kind in kinds.items():
        reason = None                                      # the first one, without a variant
        for variant in (None, "fp16"):                     # some hold half-precision files alone
            try:
                part = kind.from_pretrained(where, subfolder=name, variant=variant, **options)
                parts[name] = part.requires_grad_(False).eval().to(device)
                break
            except Exception as error:                     # missing, broken, of another kind
                reason = reason or first_line(error)
        else:
            raise ValueError(f"{where}: no Stable Diffusion 1.x or 2.x in diffusers' layout; its "
                             f"{name} can't be loaded: {reason}")
    try:
        parts["tokenizer"] = CLIPTokenizer.from_pretrained(where, subfolder="tokenizer")
        scheduler = DDIMScheduler.from_pretrained(where, subfolder="scheduler")
    except Exception as error:
        raise ValueError(f"{where}: its tokenizer or scheduler can't be loaded: "
                         f"{first_line(error)}") from None
    unet, vae, text = (parts[name].config for name in kinds)
    if unet.in_channels != vae.latent_channels:
        raise ValueError(f"{where}: its U-Net takes {unet.in_channels} channels and its VAE makes "
                         f"{vae.latent_channels} (inpainting?); plain SD 1.x or 2.x is needed")
    own = unet.addition_embed_type in (None, "text")       # "text": it reads its prompt twice
    if not own or unet.cross_attention_dim != text.hidden_size:
        raise ValueError(f"{where}: its U-Net reads other tokens than its text encoder makes "
                         "(SDXL?); SD 1.x or 2.x is needed")
    if scheduler.config.prediction_type not in ("epsilon", "v_prediction"):
        raise ValueError(f"{where}: its U-Net predicts {scheduler.config.prediction_type!r}, which "
                         "is not supported")
    for name in ("unet", "vae"):
        parts[name].to(memory_format=torch.channels_last)
    return StableDiffusion(**parts, prediction_type=scheduler.config.prediction_type,
                           alphas_cumprod=scheduler.alphas_cumprod.clamp(min=2 ** -24),
                           device=torch.device(device), dtype=dtype)
