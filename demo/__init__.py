"""The bundled demo: a small Stable Diffusion (mini-SD), a teacher and procedural photos.

They let `python d4ir.py --task desnow` run without a download or a GPU. Nothing here is part of
the method: without this folder, `d4ir.py` works with your own photos, teacher and Stable Diffusion.
See `demo/README.md`.
"""
from pathlib import Path

WEIGHTS = Path(__file__).resolve().parent / "weights"

# Tuned on the bundled mini-SD; overrides the dataclass defaults when it is used.
SETTINGS = dict(strength=0.95, steps=6, guidance=3.5, images=384, anchor=True,
                negative_prompt="a photo in clear weather", adapter_steps=400, adapter_batch=32,
                adapter_crop=64, adapter_lr=2e-3, adapter_residual=True,
                adapter_weather_weight=10.0, adapter_caption_base=True,
                adapter_penalty=1e-3, distill_steps=3000, distill_select=0.5)
