#!/usr/bin/env bash
# Purpose: stage 1 of 3, pretraining from scratch (or --init) without Gram anchoring. Usage: pretrain.sh DATA [OUT] [flags of train_ssl.py]
# Hardware: one data-centre GPU. Time: days; choose --steps from the images/s that the log shows. Not measured yet.
set -euo pipefail
cd "$(dirname "$0")/../.."
torchrun --nproc-per-node="${GPUS:-1}" train_ssl.py --data "${1:?processed folder}" --out "${2:-runs/pretrain}" \
  --arch vit_large --steps 200000 --batch-size 256 --schedule constant --weight-decay 0.04 0.04 --ema 0.994 0.994 \
  --drop-path 0.3 --gram-weight 0 --compile --save-every 1000 --keep-every 20000 "${@:3}"
