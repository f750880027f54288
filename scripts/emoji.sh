#!/usr/bin/env bash
# One setting of the emoji experiment, whole: embedder, stored tokens, pretraining, match logits, evaluation on the test
# split.
#   bash scripts/emoji.sh DATA_ROOT frozen     real towers from pip packages, heads trained contrastively
#   bash scripts/emoji.sh DATA_ROOT scratch    ViT and text transformer from scratch on the same images
#   bash scripts/emoji.sh DATA_ROOT frozen seed=1 output=runs/emoji_frozen/edje_1    another seed of the match logits
# DATA_ROOT is what python scripts/prepare_data.py emoji --root DATA_ROOT
# makes. What is done is skipped; results go to the run's directory.
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
root=${1:?usage: bash scripts/emoji.sh DATA_ROOT frozen|scratch [key=value ...]} setting=${2:-frozen}
shift $(($# < 2 ? $# : 2))
base=runs/emoji_$setting out=runs/emoji_$setting/edje
for override in "$@"; do
    if [[ $override == output=* ]]; then out=${override#output=}; fi
done
case $setting in
    frozen) stages="2, 3, 4" grid=10 ;;
    scratch) stages="" grid=0 ;;
    *) echo "error: setting is $setting; expected frozen or scratch" >&2; exit 2 ;;
esac
install requirements.txt requirements-emoji.txt
"$python" scripts/train_embedder.py --config "configs/embedders/emoji_$setting.yaml" \
    --annotations "$root/dataset_emoji.json" --root "$root" --out "$base/embedder"
"$python" scripts/precompute_tokens.py --backbone-pretrained "$base/embedder" ${stages:+--token-stages ${stages//,/}} \
    --token-grid $grid --batch-size 64 --images "$root/dataset_emoji.json" --out "$base/patch_tokens" \
    --captions "$base/caption_embeddings"
features=(data.root="$root" data.store="$base/patch_tokens" data.caption_store="$base/caption_embeddings"
    backbone.pretrained="$base/embedder" backbone.token_stages="[$stages]" backbone.token_grid=$grid)
pretrain "$base" "configs/emoji_pretraining/*.yaml" "${features[@]}"
"$python" train.py --config configs/emoji.yaml output="$out" model.init_from="$pretrained" "${features[@]}" "$@"
"$python" evaluation/evaluate_retrieval.py --checkpoint "$out" --out "$out"
