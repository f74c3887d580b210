#!/usr/bin/env bash
# A memory for a pretrained model, by one command: converts it, teaches the conversion by attention transfer, and then
# by distillation from its own base.
#
#     bash examples/launch/retrofit.sh path/to/llama books/ llama-memory [options of examples/distill.py]
#
# The texts are a folder, a file, or several of them with spaces between; --train_files among the options gives the
# distillation others. The results, a few MB each, are llama-memory/transferred and llama-memory/distilled/memory; with
# --lora_rank also distilled/adapter, which belongs to this memory, and distilled/merged, the whole model.
#
# It may be ended anywhere, as by `timeout 9m bash ...`: called again, it leaves out what is done, and goes on.
# Give it time for a layer of the transfer, or for --save_steps steps of distillation (20): less is not kept.
# The Python that PYTHON names (python3) needs the dependencies: pip install -e ".[train]", and gguf for a .gguf file.
set -euo pipefail

if (($# < 3)); then
    echo "Usage: bash examples/launch/retrofit.sh BASE TEXTS OUTPUT [options of examples/distill.py]" >&2
    exit 2
fi
base=$1 output=$3
if [[ -e $2 ]]; then texts=("$2"); else read -ra texts <<<"$2"; fi
shift 3

python=${PYTHON:-python3}
repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
export PYTHONPATH=$repository${PYTHONPATH:+:$PYTHONPATH}

# Whether a step's result is there. Each appears when it is whole.
done_before() {
    [[ -e $1 ]] && echo "$1 is there already."
}

mkdir -p "$output"
if ! done_before "$output/converted"; then
    "$python" -m infini_transformers convert "$base" "$output/converted" --segment-length 256 --num-memory-slots 256
fi
distill=("$repository/examples/distill.py" --model "$output/converted" --train_files "${texts[@]}"
    --output_dir "$output/distilled" "$@")
if [[ ! -e $output/.taught && ! -e $output/transferred ]]; then
    # What it would refuse in the end, it refuses before the minutes or hours of the transfer.
    "$python" "${distill[@]}" --check
    "$python" -m infini_transformers transfer "$output/converted" "${texts[@]/#/--texts=}"
    touch "$output/.taught"
fi
has() { grep -qs "\"$1\": $2" "$output/converted/config.json"; }
if has memory_layers '\[\]' && has num_memory_slots 0; then
    echo "These texts teach nothing: in no layer does a memory help by what it holds of them. Try longer ones." >&2
    exit 1
fi
if ! done_before "$output/transferred"; then
    "$python" -m infini_transformers save-memory "$output/converted" "$output/transferred"
fi
if has memory_layers '\[\]' && [[ " $* " != *" --lora_rank "* ]]; then
    echo "Slots alone help, and there is nothing to distil: infini convert $base with-memory --memory $output/transferred"
    exit
fi
if ! done_before "$output/distilled/memory"; then
    "$python" "${distill[@]}"
fi
if [[ -e $output/distilled/merged ]]; then
    echo "The whole model, with its LoRA merged: $output/distilled/merged"
else
    echo "With the memory on its base: infini convert $base with-memory --memory $output/distilled/memory"
fi
