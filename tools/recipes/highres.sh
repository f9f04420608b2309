#!/usr/bin/env bash
# Purpose: stage 3 of 3, a short adaptation to mixed, higher resolutions, anchored to stage 2.
# Usage: highres.sh DATA STAGE2/last.pth [OUT] [flags of train_ssl.py]   (slices have 512 pixels; 768 is for photographs)
# Hardware: as stage 1, --micro-batch chosen for 512 pixels. Not measured yet.
set -euo pipefail
cd "$(dirname "$0")/../.."
torchrun --nproc-per-node="${GPUS:-1}" train_ssl.py --data "${1:?processed folder}" --init "${2:?weights}" \
  --gram-teacher "$2" --out "${3:-runs/highres}" --arch vit_large --sizes 448/112,512/112 --steps 10000 \
  --batch-size 128 --micro-batch 16 --schedule constant --warmup 1000 --lr 3e-5 --teacher-temp 0.07 0.07 \
  --freeze-last 0 --weight-decay 0.04 0.04 --ema 0.999 0.999 --gram-start 0 --gram-scale 1 --gram-weight 1.5 \
  --checkpointing --compile --save-every 500 "${@:4}"
