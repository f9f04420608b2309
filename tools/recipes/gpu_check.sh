#!/usr/bin/env bash
# Purpose: what an update does on a card: right numbers first, then how fast, how idle and how large.
# Usage: gpu_check.sh [WORK [more]]. more: two precisions over 1,000 updates too. Without a card it runs at toy size on the
# CPU and says what was not measured.
# Hardware: one CUDA GPU. Time: its parts took 6 minutes on an H200, one after the other not tried; 4 on 2 CPU cores.
# Result: WORK/table.txt, WORK/*.json, and exit code 1 where a number is wrong (a slow one is only reported).
set -uo pipefail
cd "$(dirname "$0")/../.."
work=${1:-runs/gpu_check}
more=${2:-}
[ -z "$more" ] || [ "$more" = more ] || { echo "unknown word $more; the second one is: more" >&2; exit 2; }
[ $# -gt 0 ] || rm -rf "$work"  # ours; a folder that somebody named must be new
[ ! -e "$work" ] || { echo "$work exists; name a new folder" >&2; exit 2; }
mkdir -p "$work"
wrong=0
card=$(python -c 'import torch; print(torch.cuda.get_device_name() if torch.cuda.is_available() else "")')
say() { echo "[${SECONDS} s] $*"; }
[ -n "$card" ] && say "card: $card" || say "no CUDA device: what follows is a rehearsal on the CPU, and says nothing about a GPU"

say "1. golden step, views and targets on the device"
python -m pytest -q -rs tests/test_gpu.py || wrong=1

say "2. --deterministic: killed without warning and resumed, the last bit must be that of a run left alone"
python tools/make_phantom.py --out "$work/raw" --patients 6 --size 128 --slices 24 --workers 2 > "$work/data.log" 2>&1
python tools/preprocess_dicom.py --raw "$work/raw" --out "$work/data" --dataset phantom --format hu16 --workers 2 \
  >> "$work/data.log" 2>&1  # exit code 1: scout views are rejected
train() {
  python train_ssl.py --data "$work/data" --out "$work/$1" --no-split --deterministic --arch vit_test --workers 2 \
    --batch-size 8 --global-size 64 --local-size 32 --local-crops 4 --prototypes 256 --head-hidden 256 --head-bottleneck 64 \
    --drop-path 0.3 --steps 24 \
    --save-every 4 --keep-last 9 --gram-start 0.3 --log-every 4 "${@:2}" > "$work/$1.log" 2>&1
}
for how in plain compiled; do  # compiled: recorded too, so that after a kill plain updates follow upon replayed ones
flags=(); [ "$how" = plain ] || flags=(--compile --precision bf16-stream)
train "$how" "${flags[@]}" || wrong=1
train "$how-broken" "${flags[@]}" & victim=$!
until [ -e "$work/$how-broken/step_00000008.pth" ] || ! kill -0 "$victim" 2> /dev/null; do sleep 0.05; done
pkill -KILL -P "$victim"; kill -KILL "$victim" 2> /dev/null; wait "$victim" 2> /dev/null
train "$how-broken" "${flags[@]}" || wrong=1
python - "$work" "$how" << 'END' || wrong=1
import sys, torch
folder, how = sys.argv[1:]
whole, broken = (torch.load(f"{folder}/{run}/last.pth", weights_only=True) for run in (how, f"{how}-broken"))
def differ(a, b, name=""):
    if isinstance(a, dict):
        return [d for k in a if k != "out" for d in differ(a[k], b[k], f"{name}.{k}")]
    return [] if (torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b) else [name]
found = differ(whole, broken)
resumed = open(f"{folder}/{how}-broken.log").read().count("resumed from")
print(f"kill and resume, {how}: {resumed} resumption, step {broken['step']}, {len(found)} fields differ {found[:3]}")
sys.exit(bool(found) or resumed != 1 or broken["step"] != 24)
END
done

say "3. the table: images/s, share of a matrix product, idle share, host, memory, phases"
bench() { python tools/bench.py step --seconds 5 --json "$work/$1.json" "${@:2}" || wrong=1; }
python tools/bench.py render --seconds 2 $([ -n "$card" ] || echo --quick) || wrong=1
if [ -n "$card" ]; then
  bench small_base --arch vit_small vit_base --batch-size 128 --precision bf16 bf16-stream --way compile
  bench large --arch vit_large --batch-size 64 --precision bf16 bf16-stream --way compile
  bench giant --arch vit_giant --batch-size 16 --precision bf16 --way checkpointing --seconds 1
else
  bench toy --quick --arch vit_test --batch-size 4 --precision fp32 bf16-stream --way "" --seconds 1
fi
python - "$work" << 'END' | tee "$work/table.txt"
import json, pathlib, sys
asked = {("vit_small", 128): (1400, None), ("vit_base", 128): (800, None), ("vit_large", 64): (250, 45),
         ("vit_giant", 16): (None, 48)}
for file in sorted(pathlib.Path(sys.argv[1]).glob("*.json")):
    for row in json.loads(file.read_text())["rows"]:
        if "error" in row:
            print(f"{row['setting']}: {row['error']}")
            continue
        rate, most = asked.get((row["flags"]["arch"], row["flags"]["batch-size"]), (None, None))
        idle = f"{100 * row['idle']:.1f}% idle (asked: below 5%)" if "idle" in row else "idle share: not measured without a card"
        print(f"{row['setting']}: {row['value']:.4g} images/s" + f" (asked on an H200: {rate})" * (rate is not None)
              + f", {idle}, host {row['host_ms']:.0f} ms, peak {row['peak_gb']:.3g} GB"
              + f" (asked: {most})" * (most is not None) + (f", compiled in {row['compile_s']:.0f} s; " if "compile_s" in row else "; ")
              + ", ".join(f"{k} {100 * v:.1f}%" for k, v in row["phases"].items()))
END
if [ -n "$more" ]; then
updates=$([ -n "$card" ] && echo 1000 || echo 20)
say "4. bf16 against bf16-stream: the mean loss of the last tenth of $updates updates, two seeds of each"
for precision in bf16 bf16-stream; do for seed in 0 1; do
  python train_ssl.py --data "$work/data" --out "$work/$precision-$seed" --no-split --arch vit_tiny --workers 2 --batch-size 32 \
    --global-size 64 --local-size 32 --local-crops 4 --prototypes 1024 --head-hidden 512 --head-bottleneck 128 --lr 5e-4 \
    --steps "$updates" --precision "$precision" --seed "$seed" --log-every 2 $([ -n "$card" ] && echo --compile) \
    > "$work/$precision-$seed.log" 2>&1 || wrong=1
done; done
python - "$work" "$updates" << 'END' | tee -a "$work/table.txt" || wrong=1
import json, sys
work, updates, ends = sys.argv[1], int(sys.argv[2]), {}
for run in ("bf16-0", "bf16-1", "bf16-stream-0", "bf16-stream-1"):
    lines = [json.loads(line) for line in open(f"{work}/{run}/metrics.jsonl")]
    found = [line["loss"] for line in lines if line["step"] > 0.9 * updates and "loss" in line]
    ends[run] = sum(found) / len(found)
print(", ".join(f"{run} {loss:.4f}" for run, loss in ends.items()))
of = [sum(ends[f"{p}-{seed}"] for seed in (0, 1)) / 2 for p in ("bf16", "bf16-stream")]
print(f"bf16-stream minus bf16 {of[1] - of[0]:+.4f}; seed 1 minus seed 0 of bf16 {ends['bf16-1'] - ends['bf16-0']:+.4f}")
END
fi
say "done; exit code $wrong"
exit "$wrong"
