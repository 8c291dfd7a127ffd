#!/bin/sh
# The published training command. Further flags are passed on, and the last value of a flag wins:
#     sh train.sh --num_train_epochs 1 --base_language_model Qwen/Qwen-1_8B-Chat
# CUDA_VISIBLE_DEVICES (default 0), NPROC_PER_NODE (1) and MASTER_PORT (25642) may be set. For two GPUs:
#     CUDA_VISIBLE_DEVICES=0,1 NPROC_PER_NODE=2 sh train.sh --per_device_train_batch_size 2
# torchrun passes SIGTERM and Ctrl-C on and waits for the checkpoint, up to TORCH_ELASTIC_SHUTDOWN_TIMEOUT seconds (600).
# If no environment is active, the one that `sh demo.sh` and `sh tests/run.sh` set up is used.
command -v torchrun > /dev/null || PATH="$(cd "$(dirname "$0")" && pwd)/.venv/bin:$PATH"
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-600}"
CUDA_VISIBLE_DEVICES="${CUDA_VISIBLE_DEVICES-0}" exec torchrun \
    --nproc_per_node="${NPROC_PER_NODE:-1}" --master_port="${MASTER_PORT:-25642}" "$(dirname "$0")/train.py" \
    --lora_rank 128 --lora_dropout 0.10 --per_device_train_batch_size 4 --gradient_accumulation_steps 1 \
    --num_train_epochs 2 --save_steps 1000 --save_total_limit 5 --learning_rate 3e-5 --seed 42 \
    --ddp_find_unused_parameters False --feature_proj_lr 1e-4 --remove_unused_columns false --logging_steps 100 \
    --output_dir ./weights/train_V1_5 --target_modules "c_attn|w1|w2" \
    --image_map data/image_map_b.json --captions_file data/captions_b.json "$@"
