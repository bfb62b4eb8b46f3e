#!/usr/bin/env bash
# The main job from end to end, in minutes on two cores: a book becomes token shards, a small GPT is
# pretrained on it and frozen, two processes compute its chunk features, EGPT with a token memory and
# DeepGPT are trained over it, their validation losses are compared, also with another history than
# the text's own, and EGPT writes on.
#
#   bash launchers/quickstart.sh
#   bash launchers/quickstart.sh --minute     # every stage in few steps: that it works, not how well
#
# It sets up .venv by itself and may be run again at any time: finished stages are skipped, an
# interrupted one goes on from its last checkpoint. To begin afresh: rm -rf data/quickstart
# runs/quickstart (with --minute data/quickstart_minute runs/quickstart_minute).
set -euo pipefail
case "$#:${1:-}" in
    0:) name=quickstart ;;
    1:--minute) name=quickstart_minute ;;
    *)
        echo "usage: bash launchers/quickstart.sh [--minute]" >&2
        exit 2
        ;;
esac
set -m # each launched job is a process group of its own, so that a signal reaches all its ranks
unset CDPATH PYTHONHOME # an exported one leads cd, or Python, to another place
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launchers/setup_env.sh
set_up_environment quickstart
SECONDS=0 # the clock starts after the downloads

data=data/$name
runs=runs/$name
gpus=$(python -c 'import torch; print(torch.cuda.device_count())')
[ "${MEGAEGPT_DEVICE:-}" != cpu ] || gpus=0
case $gpus in
    0) ranks=(--num_accelerators 2) && export DS_ACCELERATOR=cpu ;;
    1) ranks=(--num_gpus 1) ;;
    *) ranks=(--num_gpus 2) ;;
esac

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

settings() { # of a run whose configuration is for the full length and its folders
    [ "$name" = quickstart_minute ] || return 0
    printf '%s\n' "data.train=[$data/train]" "data.validation=[$data/validation]" \
        "checkpoint.directory=$runs/$1/checkpoints" "logging.directory=$runs/$1" \
        training.steps=3 training.eval_interval=3 optimizer.warmup_steps=1
    [ "$1" = encoder ] || echo "model.encoder.source=$runs/encoder"
}

train() { # configuration, run: until its last validation is recorded
    local config=configs/$1.yaml run=$runs/$2 steps overrides
    mapfile -t overrides < <(settings "$2")
    steps=$(python -c 'import sys
from megaegpt.config.loading import load_config
print(load_config(sys.argv[1], sys.argv[2:]).training.steps)' "$config" "${overrides[@]}")
    if grep -qs "\"step\": $steps, \"validation_loss\"" "$run/metrics.jsonl"; then
        echo "done before: $run"
    else
        launch launchers/pretrain.py --config "$config" --resume "${overrides[@]}"
    fi
}

part() { # of a JSON Lines file's first text, behind a table of contents: so many characters
    python -c 'import json, sys
text = json.loads(open(sys.argv[1], encoding="utf-8").readline())["text"]
print(text[100_000 : 100_000 + int(sys.argv[2])])' "$@"
}

stage "1/7 text"
python tools/prepare_data.py book --output "$data"
title=$(python -c 'import json, sys; print(json.loads(open(sys.argv[1], encoding="utf-8").readline())["meta"]["title"])' "$data/book.jsonl")
text=$data/book.jsonl
if [ "$name" = quickstart_minute ]; then
    text=$data/part.txt
    if [ ! -e "$text" ]; then # a file of another time would be another input
        part "$data/book.jsonl" 200000 >"$text.new"
        mv "$text.new" "$text"
    fi
fi

stage "2/7 token shards: the first 95 % of the tokens to train on, the rest to validate"
python tools/preprocess.py "$text" --output "$data" --split-tokens 0.95

stage "3/7 a small GPT, to be the frozen encoder"
train gpt_encoder_cpu encoder

stage "4/7 features of every chunk, computed by the frozen encoder"
mapfile -t overrides < <(settings egpt_memory)
launch tools/precompute_features.py --config configs/egpt_memory_cpu.yaml "${overrides[@]}"

stage "5/7 EGPT: looks up in earlier chunks what followed where the text was like here"
train egpt_memory_cpu egpt_memory

stage "6/7 DeepGPT, its baseline: sees the current chunk only"
train deepgpt_memory_cpu deepgpt_memory

stage "7/7 results"
echo "validation losses on the last twentieth of: $title"
python tools/compare_runs.py "$runs/encoder" "$runs/deepgpt_memory" "$runs/egpt_memory"
echo
echo "EGPT's with its own history, with that of another part of the text, and with none"
python tools/evaluate.py --checkpoint "$runs/egpt_memory" --data "$data/validation" --histories
part "$data/book.jsonl" 8000 >"$runs/prompt.txt"
echo
echo "EGPT goes on behind 8,000 characters of the book:"
echo
python tools/generate.py --checkpoint "$runs/egpt_memory" --prompt-file "$runs/prompt.txt" \
    --only-new --max-new-tokens 200 --top-k 50 --memory-tokens 8192

stage "done"
cat <<END
  curves, samples and configurations:   .venv/bin/tensorboard --logdir $runs
  another text:                         .venv/bin/python tools/generate.py --checkpoint $runs/egpt_memory --prompt "..."
END
