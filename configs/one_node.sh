#!/bin/sh
# One machine, all its GPUs; flags are passed on to train.py:
#     sh configs/one_node.sh --output_dir weights/run --global_batch_size 32 --image_map … --captions_file …
# GPUS is the number of GPUs (default: all). --global_batch_size keeps the steps the same on any number of GPUs.
cd "$(dirname "$0")/.." || exit
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=600 # seconds for the checkpoint after SIGTERM or Ctrl-C
exec torchrun --standalone --nproc_per_node="${GPUS:-gpu}" train.py "$@"
