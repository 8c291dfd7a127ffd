#!/bin/sh
# A fixed number of machines. Start this on each of them, with the same flags and its own NODE, 0 on the first:
#     HOST=10.0.0.1 NODE=0 sh configs/two_nodes.sh --output_dir /shared/run --global_batch_size 32 …
# HOST is the first machine's address, NODES the number of machines (2), PORT a free port on the first (29500), GPUS as
# in one_node.sh. The output folder has to be shared by all machines. If one fails, all stop; resume by hand.
cd "$(dirname "$0")/.." || exit
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=600
exec torchrun --nnodes="${NODES:-2}" --node_rank="$NODE" --master_addr="$HOST" --master_port="${PORT:-29500}" \
    --nproc_per_node="${GPUS:-gpu}" train.py --resume_from_checkpoint auto "$@"
