#!/usr/bin/env bash
# Training on a machine that is lent for minutes: commands of at most ten minutes, 64 MiB carried a call, files of at
# most 16 MiB back.  Run from the repository's root on that machine; docs/training.md has the sequence of calls.
#
#   benchmarks/gpu-train.sh stage            keep what was carried in .gpu/ (data, or parts of a checkpoint)
#   benchmarks/gpu-train.sh start ARGS...    start or resume training in a session of its own
#   benchmarks/gpu-train.sh poll SECONDS     wait for its end or so long; log, plots and model to $OUT
#   benchmarks/gpu-train.sh fetch FIRST LAST files FIRST to LAST of the checkpoint to $OUT
#   benchmarks/gpu-train.sh stop             ask for a checkpoint and an end, as Ctrl-C does
set -euo pipefail
work=${WORK:-/tmp/deepsic-train}
run=$work/run
mkdir -p "$work/data" "$run"

running() { [ -f "$work/pid" ] && kill -0 "$(cat "$work/pid")" 2>/dev/null; }

case ${1:?stage, start, poll, fetch or stop} in
stage)
  # parts of a checkpoint are named checkpoint-<file>, since a call carries and returns flat folders
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
  # the data folder's place goes in through %, so that a command line can be written down without it
  arguments=("${@//%/$work/data}")
  resume=()
  [ -d "$run/checkpoint" ] && resume=(--resume)
  tar cf - deepsic_codec | tar xf - -C "$work"  # the checkout may be replaced by the next call
  cd "$work"
  PYTHONUNBUFFERED=1 setsid nohup python3 -m deepsic_codec.training --run "$run" --out "$work/model/base.safetensors" \
    --plot "${resume[@]}" "${arguments[@]}" >>"$work/train.log" 2>&1 &
  echo $! >"$work/pid"
  sleep 20
  tail -5 "$work/train.log"
  running || echo "ended already" ;;
poll)
  end=$((SECONDS + ${2:-500}))
  while running && [ $SECONDS -lt $end ]; do sleep 2; done
  running && echo "running" || echo "ended"
  tail -25 "$work/train.log"
  nvidia-smi --query-gpu=utilization.gpu,memory.used --format=csv,noheader 2>/dev/null || true
  for file in "$work/train.log" "$run"/{log.csv,held_out.csv,log.png,settings.json,skipped.txt} "$work"/model/*.safetensors; do
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
stop)
  running && kill -INT "$(cat "$work/pid")"
  for _ in $(seq 60); do running || break; sleep 1; done
  tail -3 "$work/train.log" ;;
esac
