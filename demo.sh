#!/bin/sh
# The whole pipeline on public data, on any computer, with no GPU and no model hub:
#     sh demo.sh
#     sh demo.sh --web     then talk to the model it trained, on a page in the browser; Ctrl-C ends it
#     sh demo.sh --real    another one: published models and real pictures; see docs/real-demo.md
# Sets up, makes two small base models, prepares easy-vqa, trains, measures, answers. Stages that an earlier call has
# finished are skipped; to restart from scratch, remove demo_output/. OUTPUT=folder writes elsewhere.
set -eu
cd "$(dirname "$0")"
case "$*" in
    "" | --web) ;;
    --real | "--real "*) shift && exec sh benchmarks/real_parts/demo.sh "$@" ;;
    *) echo "demo.sh: takes --web, --real or nothing, got $*" >&2 && exit 2 ;;
esac
. tests/setup.sh
set_up requirements.txt benchmarks/easy_vqa/requirements.txt ${1:+web-requirements.txt}
install_data dashscope==2.0.2 easy-vqa==1.0
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false

OUTPUT=${OUTPUT:-demo_output}
mkdir -p "$OUTPUT"
. benchmarks/stages.sh

prepare() {
    "$PYTHON" -m benchmarks.easy_vqa.prepare_data --output "$OUTPUT/annotations"
    "$PYTHON" dataprocess/process_image.py --config "$OUTPUT/annotations/config.yaml"
}

pretrain() { # pretrain clip|qwen; training can't resume from checkpoints of another base
    rm -rf "$OUTPUT/vlm"
    "$PYTHON" -m "benchmarks.easy_vqa.pretrain_$1" --output "$OUTPUT/base_$1"
}

train() { # the published command; its learning rates are meant for 7B parameters, these fit a model 4,000 times smaller
    _machine=$("$PYTHON" -m benchmarks.easy_vqa.training_flags)
    # shellcheck disable=SC2086  # several flags in one variable
    sh train.sh --base_language_model "$OUTPUT/base_qwen" --base_value_model "$OUTPUT/base_clip" \
        --image_map "$OUTPUT/image_map.json" --captions_file "$OUTPUT/captions.json" --output_dir "$OUTPUT/vlm" \
        --num_train_epochs 1 --per_device_train_batch_size 32 --learning_rate 1e-3 --feature_proj_lr 2e-3 \
        --lora_dropout 0 --warmup_steps 30 --lr_scheduler_type cosine --logging_steps 20 --save_steps 200 \
        --save_total_limit 1 --resume_from_checkpoint auto $_machine
    rm -rf "$OUTPUT/results" # answers of an earlier model
}

measure() { # the official test split, through evaluate.py: the model, seeing and blind, and the most frequent answers
    "$PYTHON" -m benchmarks.easy_vqa.measure questions "$OUTPUT/test_split"
    "$PYTHON" evaluate.py --model_weights "$OUTPUT/vlm" --questions "$OUTPUT/test_split/questions.jsonl" --blind \
        --metrics exact_match --max_new_tokens 8 --batch_size 128 --output "$OUTPUT/results" > /dev/null
    "$PYTHON" evaluate.py --answers "$OUTPUT/test_split/majority.jsonl" \
        --questions "$OUTPUT/test_split/questions.jsonl" --metrics exact_match --output "$OUTPUT/majority" > /dev/null
    "$PYTHON" -m benchmarks.easy_vqa.measure table "$OUTPUT/results" "$OUTPUT/majority" > "$OUTPUT/table.txt"
}

ask() { # ask IMAGE PROMPT
    echo "Image:    $1"
    echo "Question: $2"
    printf 'Answer:   '
    "$PYTHON" test.py --model_weights "$OUTPUT/vlm" --image_path "$1" --prompt "$2" 2>> "$OUTPUT/test.log" || return
    echo
}

ask_three() {
    _images=$("$PYTHON" -c "from benchmarks.easy_vqa.questions import image_folder; print(image_folder('test'))")
    : > "$OUTPUT/test.log"
    { # one after another; a failure ends the stage
        ask "$_images/0.png" "<|extra_0|>what is the color of the shape?" &&
            ask "$_images/1.png" "这幅图像描述了什么？<|extra_0|>" &&
            ask test_img/1.jpg "<|extra_0|>what color is the shape?"
    } > "$OUTPUT/three_answers.txt" || { cat "$OUTPUT/test.log" >&2; return 1; }
}

stage data "Annotations of easy-vqa, through process_image.py" prepare
stage clip "A small CLIP, pretrained on captioned pictures" pretrain clip
stage qwen "A small QWen, pretrained on text without images" pretrain qwen
stage train "LoRA and projector, through train.sh" train
stage evaluate "All 9,673 test questions, seeing and blind, through evaluate.py" measure
stage ask "Three questions, through test.py" ask_three
stage figure "A picture of nine answers" \
    "$PYTHON" -m benchmarks.easy_vqa.figure --results "$OUTPUT/results" --output "$OUTPUT/answers.png"

cat << END

Exactly right answers on the official test split of easy-vqa
$(cat "$OUTPUT/table.txt")

Three questions through test.py. The last picture, with its many shapes, is unlike anything the demo trains on.
$(cat "$OUTPUT/three_answers.txt")

Times
$TIMES
Files
  $OUTPUT/annotations/    annotations in LLaVA's and AI Challenger's formats, config.yaml
  $OUTPUT/image_map.json, captions.json    made of them by process_image.py
  $OUTPUT/base_clip/, base_qwen/           both base models, in the published formats
  $OUTPUT/vlm/            the trained checkpoint: LoRA and projector
  $OUTPUT/results/        results.json, answers.jsonl (every test question), report.html (open it in a browser)
  $OUTPUT/answers.png     nine test pictures, questions and answers
END

if [ "${1-}" = --web ]; then # the page prints its address
    exec "$PYTHON" web_demo.py --model_weights "$OUTPUT/vlm"
fi
