#!/usr/bin/env bash
# Purpose: ExPLoRA, pretraining that goes on by adapters: weights of elsewhere learn these images, and never read labels.
# Usage: explora.sh DATA WEIGHTS [OUT] [flags of train_ssl.py]; --arch is that of WEIGHTS. Then: probe or release.
# Hardware: one GPU; frozen weights take no gradient and no state of AdamW. Not measured yet on a GPU.
set -euo pipefail
cd "$(dirname "$0")/../.."
torchrun --nproc-per-node="${GPUS:-1}" train_ssl.py --data "${1:?processed folder}" --init "${2:?weights}" \
  --out "${3:-runs/explora}" --arch vit_small --adapter-norm lora --adapter-rank 32 --adapter-targets qv --unfreeze 1 \
  --steps 10000 --batch-size 128 --warmup 1000 --lr 2e-4 --layer-decay 1 --weight-decay 0.04 0.04 --ema 0.996 1 \
  --gram-start 0 --gram-scale 1 --gram-weight 1 --compile --save-every 500 --eval-every 1000 "${@:4}"
