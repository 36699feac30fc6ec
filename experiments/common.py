"""Shared by the experiments: a parser for their own flags, and the provenance of a result."""
import argparse
import json
import os
import shlex
import sys
import time
from pathlib import Path

import torch

import d4ir


def make_parser(name, description, seeds=None):
    """A parser with --results and, if `seeds` is given (its help text), --seeds. Parse with
    `parse_known_args`: the rest are the flags of d4ir.py."""
    parser = d4ir.Parser(prog=f"experiments.{name}", description=description, allow_abbrev=False,
                         formatter_class=argparse.RawDescriptionHelpFormatter,
                         epilog="The flags of d4ir.py are also accepted (python d4ir.py --help).")
    parser.add_argument("--results", type=Path, default=Path("results"), metavar="DIR")
    if seeds:
        parser.add_argument("--seeds", type=d4ir.number(int, 1), default=3, help=f"{seeds} (3)")
    return parser


def provenance(name, argv):
    """{"command", "date"} of an experiment. argv: the arguments of its main; None: sys.argv's."""
    command = ["python", "-m", f"experiments.{name}", *(sys.argv[1:] if argv is None else argv)]
    return {"command": shlex.join(command), "date": time.strftime("%Y-%m-%d")}


def write_section(path, section, content):
    """Adds a section to a JSON file, or replaces it; keeps the file's other sections."""
    path.parent.mkdir(parents=True, exist_ok=True)
    old = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    d4ir.write_text(path, json.dumps(old | {section: content}, indent=1))


def machine_name(device):
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{os.cpu_count()} CPU cores"
