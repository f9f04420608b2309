#!/usr/bin/env bash
# Purpose: stage 2 of 3, Gram anchoring: continues the weights of stage 1 and anchors patch similarities to their own
# start, refreshed three times. Usage: gram.sh DATA STAGE1/last.pth [OUT] [flags of train_ssl.py]
# Hardware: as stage 1; a Gram update costs about 1.7 of a plain one at --gram-scale 2. Not measured yet.
set -euo pipefail
cd "$(dirname "$0")/../.."
torchrun --nproc-per-node="${GPUS:-1}" train_ssl.py --data "${1:?processed folder}" --init "${2:?weights}" \
  --out "${3:-runs/gram}" --arch vit_large --steps 60000 --batch-size 256 --schedule constant --warmup 2000 --lr 1e-4 \
  --weight-decay 0.04 0.04 --ema 0.999 0.999 --drop-path 0.3 --gram-start 0 --gram-refresh 10000 --gram-scale 2 \
  --compile --save-every 1000 --keep-every 10000 "${@:4}"
