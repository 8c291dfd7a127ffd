#!/bin/sh
# Slurm: machines that the scheduler chooses, one torchrun on each.
#     sbatch configs/slurm.sh --output_dir /shared/run --global_batch_size 256 …
# Five minutes before the time is up, Slurm sends SIGTERM, and the run saves and ends. Submit the same line to resume;
# after the failure of a machine Slurm itself does.
#SBATCH --job-name=vlm
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@300
#SBATCH --requeue
#SBATCH --output=%x-%j.log
cd "${SLURM_SUBMIT_DIR:-.}" || exit # sbatch runs a copy of this file; submit it from the repository's folder
HOST=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export HOST NODES="$SLURM_NNODES" PORT=$((20000 + SLURM_JOB_ID % 10000))
# shellcheck disable=SC2016 # SLURM_NODEID is each machine's own
exec srun --kill-on-bad-exit=1 sh -c 'NODE=$SLURM_NODEID exec sh configs/two_nodes.sh "$@"' two_nodes "$@"
