"""What the experiments share: the parser of their own flags, and how a result was made."""
import argparse
import os
import shlex
import sys
import time
from pathlib import Path

import torch

import d4ir


def make_parser(name, description):
    """A parser with --results. Parse with `parse_known_args`: the rest are the flags of d4ir.py."""
    parser = d4ir.Parser(prog=f"experiments.{name}", description=description, allow_abbrev=False,
                         formatter_class=argparse.RawDescriptionHelpFormatter,
                         epilog="and the flags of d4ir.py (see python d4ir.py --help)")
    parser.add_argument("--results", type=Path, default=Path("results"), metavar="DIR")
    return parser


def provenance(name, argv):
    """{"command", "date"} of an experiment. argv: the arguments of its main; None: sys.argv's."""
    command = ["python", "-m", f"experiments.{name}", *(sys.argv[1:] if argv is None else argv)]
    return {"command": shlex.join(command), "date": time.strftime("%Y-%m-%d")}


def machine_name(device):
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{os.cpu_count()} CPU cores"
