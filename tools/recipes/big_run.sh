#!/usr/bin/env bash
# Purpose: the long run on one AMD Strix Halo (gfx1151, unified memory): 15 days unattended. Usage: see below
# Hardware: Strix Halo under ROCm; at the rates seen on such machines ViT-B or ViT-L fit 15 days, ViT-giant does not.
# Before: python tools/check_platform.py, python tools/bench.py sweep --arch vit_base vit_large --batch-size 128 (flags and
# days), and big_run.sh DATA runs/trial --time-limit 10: with its images_s, STEPS * 128 / images_s must stay below 15 days.
# Then ARCH=... STEPS=... big_run.sh DATA [OUT] [flags of train_ssl.py]. Not measured yet.
# WAIT: seconds before a run that died is started again (default: 60).
set -euo pipefail
cd "$(dirname "$0")/../.."
export TORCH_BLAS_PREFER_HIPBLASLT=1                    # bf16 products several times faster than rocBLAS there
export TORCH_ROCM_AOTRITON_ENABLE_EXPERIMENTAL=1        # memory-efficient attention; flash is unstable on gfx1151
data=${1:?processed folder} out=${2:-runs/big} begun=$(date +%s)
for attempt in $(seq 20); do  # a driver fault kills the process; the same command resumes
  code=0
  python train_ssl.py --data "$data" --out "$out" --arch "${ARCH:-vit_base}" \
    --steps "${STEPS:-200000}" --batch-size 128 --micro-batch 32 --drop-path 0.1 --save-every 200 --keep-every 10000 \
    --eval-every 2000 "${@:3}" || code=$?
  case $code in 0 | 3 | 130) exit $code ;; esac  # done, diverged, Ctrl+C: again would not help
  if [ $code = 2 ]; then  # a user's mistake, or a disk or memory that failed: a run that saved since the start had none
    [ -d "$out" ] || sleep "${WAIT:-60}"  # a network folder comes back
    [ -n "$(find "$out" -name 'step_*.pth' -newermt "@$begun" 2>/dev/null)" ] || exit 2
  fi
  echo "attempt $attempt stopped with code $code; resuming in ${WAIT:-60} s" >&2
  sleep "${WAIT:-60}"
done
exit "$code"
