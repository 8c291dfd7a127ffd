#!/bin/sh
# Ask the published question about the published picture. Further flags are passed on, and override these:
#     sh test.sh --model_weights weights/train_V1_5 --image_path photo.jpg --prompt "What is this?<|extra_0|>"
# Both base models are those that the checkpoint was trained on, unless --base_language_model and --base_value_model
# name others. If no environment is active, the one that demo.sh and tests/run.sh set up is used.
command -v torchrun > /dev/null || PATH="$(cd "$(dirname "$0")" && pwd)/.venv/bin:$PATH"
exec python "$(dirname "$0")/test.py" \
    --model_weights ./weights/train_V1_5/checkpoint-10000/ \
    --image_path ./test_img/1.jpg \
    --prompt "使用语言描述一下图中出现了那些颜色<|extra_0|>" "$@"
