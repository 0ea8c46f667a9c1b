#!/usr/bin/env bash
# Train on a machine that is lent for minutes: commands of at most ten minutes, 64 MiB carried to it in a call, files of
# at most 16 MiB brought back. Run from the repository's root on that machine. docs/training.md has the sequence of calls.
#
#   benchmarks/gpu-train.sh stage                 keep the carried files in .gpu/: data, or parts of a checkpoint
#   benchmarks/gpu-train.sh start ARGS...         start or resume training in a separate session
#   benchmarks/gpu-train.sh poll SECONDS [PHASE]  wait until training or a phase ends, at most SECONDS; copy log and model
#                                                 to $OUT
#   benchmarks/gpu-train.sh fetch FIRST LAST      copy files FIRST to LAST of the checkpoint to $OUT
#   benchmarks/gpu-train.sh averages              write the averaged networks as a run's folder to $OUT/run
#   benchmarks/gpu-train.sh stop                  stop training with a checkpoint, as Ctrl-C does
set -euo pipefail
work=${WORK:-/tmp/deepsic-train}
run=$work/run
mkdir -p "$work/data" "$run"

running() { [ -f "$work/pid" ] && kill -0 "$(cat "$work/pid")" 2>/dev/null; }

case ${1:?stage, start, poll, fetch, averages or stop} in
stage)
  # parts of a checkpoint are named checkpoint-<file>, because a call carries and returns flat folders
  for file in .gpu/*; do
    name=$(basename "$file")
    case $name in
      checkpoint-*) mkdir -p "$run/checkpoint"; cp "$file" "$run/checkpoint/${name#checkpoint-}" ;;
      settings.json | log.csv | held_out.csv) cp "$file" "$run/$name" ;;
      *) cp -r "$file" "$work/data/$name" ;;
    esac
  done
  du -sh "$work/data" "$run" ;;
start)
  shift
  running && { echo "already running"; exit 1; }
  # % stands for the path of the data folder
  arguments=("${@//%/$work/data}")
  resume=()
  [ -d "$run/checkpoint" ] && resume=(--resume)
  tar cf - deepsic_codec | tar xf - -C "$work"  # the next call may replace the checkout
  cd "$work"
  PYTHONUNBUFFERED=1 setsid nohup python3 -m deepsic_codec.cli.main train --run "$run" --out "$work/model/trained.safetensors" \
    "${resume[@]}" "${arguments[@]}" >>"$work/train.log" 2>&1 &
  echo $! >"$work/pid"
  sleep 20
  tail -5 "$work/train.log"
  running || echo "ended already" ;;
poll)
  end=$((SECONDS + ${2:-500}))
  is_done() { [ -n "$1" ] && grep -q "\"phase\": \"$1\".*\"done\": true" "$run/checkpoint/state.json" 2>/dev/null; }
  while running && [ $SECONDS -lt $end ] && ! is_done "${3:-}"; do sleep 1; done
  running && echo "running" || echo "ended"
  tail -25 "$work/train.log"
  nvidia-smi --query-gpu=utilization.gpu,memory.used --format=csv,noheader 2>/dev/null || true
  for file in "$work/train.log" "$run"/{log.csv,held_out.csv,settings.json,skipped.txt} "$work"/model/*.safetensors; do
    [ -f "$file" ] && cp "$file" "$OUT/"
  done
  true ;;
fetch)
  cp "$run/checkpoint/state.json" "$OUT/checkpoint-state.json"
  cp "$run/settings.json" "$OUT/"
  for i in $(seq "$2" "$3"); do
    [ -f "$run/checkpoint/$i.safetensors" ] && cp "$run/checkpoint/$i.safetensors" "$OUT/checkpoint-$i.safetensors"
  done
  ls -la "$OUT" ;;
averages)
  cd "$work"
  python3 - "$run" "$OUT/run" <<'PYTHON'
import pathlib, shutil, sys
from deepsic_codec.training import checkpoint
run, out = map(pathlib.Path, sys.argv[1:])
state = checkpoint.load(run)
state.tensors = {k: v for k, v in state.tensors.items() if k.startswith("ema.")}
checkpoint.save(out, state)
for name in ("settings.json", "log.csv", "held_out.csv"):
    if (run / name).exists():
        shutil.copy(run / name, out / name)
print(f"{state.phase}, step {state.step}, {'done' if state.done else 'not done'}")
PYTHON
  ;;
stop)
  running && kill -INT "$(cat "$work/pid")"
  for _ in $(seq 60); do running || break; sleep 1; done
  tail -3 "$work/train.log" ;;
esac
