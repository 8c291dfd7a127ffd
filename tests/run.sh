#!/bin/sh
# Set up a virtual environment on the first call, then run the linters and the test suite:
#     sh tests/run.sh [pytest arguments]
set -eu
cd "$(dirname "$0")/.."
. tests/setup.sh
set_up requirements.txt tests/requirements.txt
# Packages that carry real data (the Qwen vocabulary, a public VQA set); their own dependencies are not needed.
install_data dashscope==2.0.2 easy-vqa==1.0
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
# One test file per process and one thread each: tiny models gain nothing from more.
export OMP_NUM_THREADS=1
"$PYTHON" -m ruff check .
"$PYTHON" -m ruff format --check .
"$PYTHON" -m mypy
exec "$PYTHON" -m pytest -n 2 --dist loadfile --cov --cov-report=term:skip-covered "$@"
