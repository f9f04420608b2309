#!/usr/bin/env bash
# Purpose: see that everything works before a real machine is booked. No GPU, no data needed.
# Usage: smoke_cpu.sh [WORK] [flags of train_ssl.py]; PATIENTS and SIZE (pixels): of the phantom it trains on.
# Hardware: 2 CPU cores. Time: about 3 minutes. Result: a run folder with checkpoints and falling losses.
set -euo pipefail
cd "$(dirname "$0")/../.."
work=${1:-runs/smoke}
[ -f "$work/raw/truth.csv" ] || python tools/make_phantom.py --out "$work/raw" --patients "${PATIENTS:-24}" \
  --size "${SIZE:-256}" --workers 2 --force
python tools/preprocess_dicom.py --raw "$work/raw" --out "$work/processed" --dataset phantom --format hu16 --workers 2 ||
  [ $? -eq 1 ]  # 1: some series rejected (here scout views), the others are usable
python tools/make_splits.py --data "$work/processed"
torchrun --nproc-per-node=1 train_ssl.py --data "$work/processed" --out "$work/run" --arch vit_test \
  --steps 300 --batch-size 64 --global-size 64 --local-size 32 --local-crops 4 --prototypes 256 --head-hidden 256 \
  --head-bottleneck 64 --layerscale 1 --lr 1e-3 --layer-decay 1 --patch-lr 1 --ema 0.99 1 --teacher-temp 0.02 0.02 \
  --field 0.02 0.1 --freeze-last 0 --rope-rescale 1 --gram-weight 0 --log-every 20 --save-every 100 --eval-every 100 \
  "${@:2}"
