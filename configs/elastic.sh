#!/bin/sh
# From one machine to many: if one fails, the others go on without it, and once it is back it joins them. Start this on
# each machine with the same flags, and with FIRST=1 on the one whose address is HOST:
#     HOST=10.0.0.1 FIRST=1 sh configs/elastic.sh --output_dir /shared/run --global_batch_size 32 --save_steps 200 …
# NODES is the least and the most machines (1:2), LOCAL_ADDR this machine's own address (needed where its name is not
# known to the others), PORT and GPUS as in two_nodes.sh. The output folder has to be shared by all machines.
# The first machine holds the list of the others. If it fails, all stop; start all of them again.
cd "$(dirname "$0")/.." || exit
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=600
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 # without it, a machine that comes back ends the run (pytorch #135712)
exec torchrun --nnodes="${NODES:-1:2}" --nproc_per_node="${GPUS:-gpu}" --max_restarts=100 \
    --rdzv_backend=c10d --rdzv_id=run --rdzv_endpoint="$HOST:${PORT:-29500}" \
    --rdzv_conf="is_host=${FIRST:-0},last_call_timeout=10" ${LOCAL_ADDR:+--local_addr="$LOCAL_ADDR"} \
    train.py --resume_from_checkpoint auto "$@"
