"""The launch commands of configs/, with a torchrun that only says how it was called."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_run import ROOT, start

from model.arguments import parse_arguments

SETTINGS = {"HOST": "10.0.0.1", "NODE": "1", "FIRST": "1", "LOCAL_ADDR": "10.0.0.2", "GPUS": "4"}
OF_TORCHRUN = {
    "one_node": {"--standalone", "--nproc_per_node=4"},
    "two_nodes": {"--nnodes=2", "--node_rank=1", "--master_addr=10.0.0.1", "--master_port=29500", "--nproc_per_node=4"},
    "elastic": {
        *("--nnodes=1:2", "--nproc_per_node=4", "--max_restarts=100", "--rdzv_backend=c10d", "--rdzv_id=run"),
        *("--rdzv_endpoint=10.0.0.1:29500", "--rdzv_conf=is_host=1,last_call_timeout=10", "--local_addr=10.0.0.2"),
    },
    "slurm": {"--nnodes=3", "--node_rank=2", "--master_addr=node-a", "--master_port=21234", "--nproc_per_node=gpu"},
}


def program(folder: Path, name: str, *lines: str) -> None:
    (folder / name).write_text("\n".join(["#!/bin/sh", *lines, ""]))
    (folder / name).chmod(0o755)


@pytest.mark.parametrize("name", OF_TORCHRUN)
def test_a_launch_command_gives_torchrun_and_train_py_their_flags(name, mixed_data, base_flags, tmp_path):
    program(tmp_path, "torchrun", 'printf "%s\\n" "$@"')
    program(tmp_path, "scontrol", "echo node-a; echo node-b; echo node-c")
    program(tmp_path, "srun", "shift", 'SLURM_NODEID=2 exec "$@"')  # its own flag, then the command
    flags = [*base_flags, *mixed_data, "--global_batch_size", "8", "--output_dir", str(tmp_path / "a run")]
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", **SETTINGS}
    if name == "slurm":
        of_slurm = {"SUBMIT_DIR": str(ROOT), "JOB_NODELIST": "node-[a-c]", "NNODES": "3", "JOB_ID": "71234"}
        environment = {"PATH": environment["PATH"], **{f"SLURM_{key}": value for key, value in of_slurm.items()}}
    done = start("sh", ROOT / f"configs/{name}.sh", *flags, cwd=tmp_path, **environment)
    assert done.returncode == 0, done.stderr
    words = done.stdout.splitlines()
    at = words.index("train.py")
    assert set(words[:at]) == OF_TORCHRUN[name]
    assert words[-len(flags) :] == [str(flag) for flag in flags]
    args = parse_arguments([*words[at + 1 :], "--per_device_train_batch_size", "2"])[2]
    assert args.resume_from_checkpoint == (None if name == "one_node" else "auto")
    assert args.gradient_accumulation_steps == 4
