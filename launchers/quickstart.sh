#!/usr/bin/env bash
# The main job from end to end, in minutes on two cores: a book becomes token shards, a small GPT is
# pretrained on it and frozen, two processes compute its chunk features, EGPT and DeepGPT are trained
# over it, their validation losses are compared, and EGPT writes a text.
#
#   bash launchers/quickstart.sh
#
# It sets up .venv by itself and may be run again at any time: finished stages are skipped, an
# interrupted one goes on from its last checkpoint. To begin afresh: rm -rf data/quickstart runs/quickstart
set -euo pipefail
set -m # each launched job is a process group of its own, so that a signal reaches all its ranks
unset CDPATH PYTHONHOME # an exported one leads cd, or Python, to another place
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launchers/setup_env.sh
set_up_environment quickstart
SECONDS=0 # the clock starts after the downloads

data=data/quickstart
runs=runs/quickstart
gpus=$(python -c 'import torch; print(torch.cuda.device_count())')
[ "${MEGAEGPT_DEVICE:-}" != cpu ] || gpus=0
case $gpus in
    0) ranks=(--num_accelerators 2) && export DS_ACCELERATOR=cpu ;;
    1) ranks=(--num_gpus 1) ;;
    *) ranks=(--num_gpus 2) ;;
esac
cores=$(getconf _NPROCESSORS_ONLN)
export OMP_NUM_THREADS=$((cores > 2 ? cores / 2 : 1)) # two processes share the cores

job=
stop() { # the launcher ends at once; its ranks save first, and the next run must not meet them
    trap - INT TERM
    if [ -n "$job" ] && kill -TERM -- "-$job" 2>/dev/null; then
        printf '\nstopping: saving what is done\n'
        for _ in {1..60}; do
            kill -0 -- "-$job" 2>/dev/null || break
            sleep 1
        done
        kill -KILL -- "-$job" 2>/dev/null || true
    fi
    echo "stopped: the same command goes on from here"
    exit 130
}
trap stop INT TERM

stage() {
    printf '\n=== %s (%d:%02d)\n' "$1" $((SECONDS / 60)) $((SECONDS % 60))
}

launch() { # a program on all ranks
    local port
    port=$(python -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
    deepspeed --quiet "${ranks[@]}" --master_port "$port" "$@" &
    job=$!
    wait "$job"
    job=
}

train() { # configuration, run: until its last validation is recorded
    local config=configs/$1.yaml run=$runs/$2 steps
    steps=$(python -c 'import sys
from megaegpt.config.loading import load_config
print(load_config(sys.argv[1]).training.steps)' "$config")
    if grep -qs "\"step\": $steps, \"validation_loss\"" "$run/metrics.jsonl"; then
        echo "done before: $run"
    else
        launch launchers/pretrain.py --config "$config" --resume
    fi
}

stage "1/7 text"
python tools/prepare_data.py book --output "$data"

stage "2/7 token shards: the first 80 % of the tokens to train on, the rest to validate"
python tools/preprocess.py "$data/book.jsonl" --output "$data" --split-tokens 0.8

stage "3/7 a small GPT, to be the frozen encoder"
train gpt_encoder_cpu encoder

stage "4/7 features of every chunk, computed by the frozen encoder"
launch tools/precompute_features.py --config configs/egpt_war_and_peace_cpu.yaml

stage "5/7 EGPT: sees earlier chunks through their features"
train egpt_war_and_peace_cpu egpt

stage "6/7 DeepGPT, its baseline: sees the current chunk only"
train deepgpt_war_and_peace_cpu deepgpt

stage "7/7 results"
text=$(python -c 'import json, sys; print(json.loads(open(sys.argv[1], encoding="utf-8").readline())["meta"]["title"])' "$data/book.jsonl")
echo "validation losses on the last fifth of: $text"
python tools/compare_runs.py "$runs/encoder" "$runs/deepgpt" "$runs/egpt"
case $text in
    *Peace*) prompt="Prince Andrew looked at" ;;
    *) prompt="And the LORD said unto" ;;
esac
echo "a text by EGPT, beyond the end of its first chunks:"
echo
python tools/generate.py --checkpoint "$runs/egpt" --prompt "$prompt" --max-new-tokens 200 --top-k 50

stage "done"
cat <<END
  curves, samples and configurations:   .venv/bin/tensorboard --logdir $runs
  another text:                         .venv/bin/python tools/generate.py --checkpoint $runs/egpt --prompt "..."
END
