#!/usr/bin/env bash
# One setting of the emoji experiment, whole: embedder, stored tokens, training, evaluation on the test split.
#   bash scripts/emoji.sh DATA_ROOT frozen     real towers from pip packages, heads trained contrastively
#   bash scripts/emoji.sh DATA_ROOT scratch    ViT from scratch on the same images, the control of equal compute
#   bash scripts/emoji.sh DATA_ROOT frozen seed=1 output=runs/emoji_frozen_1    another seed on the same embedder
# DATA_ROOT holds dataset_emoji.json and the images. What is done is skipped; results go to the run's directory.
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
root=${1:?usage: bash scripts/emoji.sh DATA_ROOT frozen|scratch [key=value ...]} setting=${2:-frozen}
shift 2
install requirements.txt requirements-emoji.txt
base=runs/emoji_$setting out=runs/emoji_$setting
for override in "$@"; do
    if [[ $override == output=* ]]; then out=${override#output=}; fi
done
case $setting in
    frozen) config=configs/emoji.yaml tokens="--token-stages 2 3 4 --token-grid 10" ;;
    scratch) config=configs/emoji_scratch.yaml tokens="" ;;
    *) echo "error: setting is $setting; expected frozen or scratch" >&2; exit 2 ;;
esac
"$python" scripts/train_embedder.py --config "configs/embedders/emoji_$setting.yaml" \
    --annotations "$root/dataset_emoji.json" --root "$root" --out "$base/embedder"
"$python" scripts/precompute_tokens.py --backbone-pretrained "$base/embedder" $tokens --batch-size 64 \
    --images "$root/dataset_emoji.json" --out "$base/patch_tokens" --captions "$base/caption_embeddings"
"$python" train.py --config $config data.root="$root" "$@"
"$python" evaluation/evaluate_retrieval.py --checkpoint "$out" --out "$out"
