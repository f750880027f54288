#!/usr/bin/env bash
# From a bare checkout to a trained reranker and its report, on two CPU cores: data, embedder, stored tokens, training,
# evaluation. A second start skips what is done, and a killed one continues. Results: runs/demo/results.json, report.html.
#   bash scripts/demo.sh                            starts from the committed pretrained EDJE, on the committed embedder
#   bash scripts/demo.sh --pretrain                 pretrains EDJE itself, from random weights (configs/demo_pretraining);
#                                                   done once for all runs that share data
#   bash scripts/demo.sh --train-embedder           trains the embedder itself too (configs/embedders/scenes.yaml)
#   OUT=runs/demo_seed1 bash scripts/demo.sh seed=1    another seed on the same data; key=value overrides go to train.py
# SHARED is the folder of data, embedder and stored tokens; SCENES, options of data.scenes (a smaller set); STAGES, the
# configs of the pretraining.
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
install requirements.txt
shared=${SHARED:-runs/demo} out=${OUT:-runs/demo}
scenes=$shared/scenes embedder=configs/embedders/scenes-vit pretrained=configs/pretrained/scenes overrides=()
for argument in "$@"; do
    case $argument in
        --pretrain) pretrained=$shared/pretrained ;;
        --train-embedder) embedder=$shared/embedder ;;
        *) overrides+=("$argument") ;;
    esac
done
# Pretrained weights fit one embedder: with a new one they are trained again, whatever else was asked for.
if [ "$embedder" = "$shared/embedder" ]; then pretrained=$shared/pretrained-own-embedder; fi
tokens=$shared/tokens-$(basename "$embedder") captions=captions more_captions=()
if [ "$pretrained" != configs/pretrained/scenes ]; then  # a stage of the pretraining reads captions of single objects too
    captions=captions-regions more_captions=(--more-captions "$scenes/dataset_scenes_regions.json")
fi
features=(backbone.pretrained="$embedder" data.root="$scenes" data.store="$tokens/images" \
    data.caption_store="$tokens/$captions")

echo "== 1/5 data: rendered scenes with five captions each"
"$python" -m data.scenes --out "$scenes" ${SCENES:-}
if [ "$embedder" = "$shared/embedder" ]; then
    echo "== 2/5 embedder: contrastive training until validation recall stops rising, or for 2,000 steps"
    "$python" scripts/train_embedder.py --config configs/embedders/scenes.yaml \
        --annotations "$scenes/dataset_scenes.json" --root "$scenes" --out "$embedder"
else
    echo "== 2/5 embedder: $embedder (trained by scripts/train_embedder.py, see its TRAINING.json)"
fi
echo "== 3/5 patch tokens and caption embeddings, computed once"
"$python" scripts/precompute_tokens.py --backbone-pretrained "$embedder" --batch-size 128 \
    --images "$scenes/dataset_scenes.json" --out "$tokens/images" --captions "$tokens/$captions" "${more_captions[@]}"
if [ "$pretrained" = configs/pretrained/scenes ]; then
    echo "== 4/5 ITM from $pretrained (pretrained on the same training scenes by configs/demo_pretraining)"
else
    echo "== 4/5 pretraining, then ITM"
    pretrain "$pretrained" "${STAGES:-configs/demo_pretraining/*.yaml}" "${features[@]}" "${overrides[@]}"
fi
"$python" train.py --config configs/demo.yaml output="$out" model.init_from="$pretrained" "${features[@]}" \
    "${overrides[@]}"
echo "== 5/5 evaluation on the test scenes, both directions"
"$python" evaluation/evaluate_retrieval.py --checkpoint "$out" --out "$out"
