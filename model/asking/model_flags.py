"""The flags that say which model is asked, and how it is loaded. Loads no torch: evaluate.py scores answers without."""

from __future__ import annotations

import argparse


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    """Add them to a command line."""
    add = parser.add_argument
    add("--model_weights", help="checkpoint folder, or a run folder (its newest complete checkpoint)")
    add("--base_language_model", help="hub name or folder; default: what the checkpoint was trained on")
    add("--base_value_model", help="hub name or folder of the vision tower; default: likewise")
    add("--device", help="cpu, cuda, cuda:0, …; default: a GPU if there is one")
    add("--dtype", help="float32, bfloat16 or float16; default: bfloat16 on CUDA, float32 on CPU")
    add("--device_map", choices=["auto"], help="auto: spread the language model over GPUs, CPU and disk, as it fits")
    add(
        "--max_memory", nargs="+", default=[], metavar="DEVICE=SIZE", help="most bytes of weights, as 0=20GiB cpu=60GiB"
    )
    add(
        "--offload_folder",
        metavar="DIR",
        help="for weights that --device_map puts on the disk; default: a temporary one",
    )
    quantised = parser.add_mutually_exclusive_group()
    for kind, method in {"4bit": "NF4", "8bit": "LLM.int8"}.items():
        text = f"keep the language model in {kind.replace('bit', ' bits')} ({method}), and LoRA beside it, not merged"
        quantised.add_argument(f"--load_in_{kind}", dest="quantisation", action="store_const", const=kind, help=text)
