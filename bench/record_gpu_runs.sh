#!/usr/bin/env bash
# Records the runs that the simulator is fitted on (fit-*) and those it has to predict (check-*):
#   bench/record_gpu_runs.sh full OUT [ARGUMENTS OF bench.record_runs]     whole pool, six runs
#   bench/record_gpu_runs.sh capped OUT [...]     pool as on a GPU of 24 GB, two more to predict
# Each takes about two minutes on an H200, less than half of it with a warm --cache-dir. Then:
#   python -m bench.simulator.fit --runs OUT/fit-*.jsonl --out MODEL.json
#   python -m bench.simulator.validate --model MODEL.json --runs OUT/check-*.jsonl --out RESULT.json
set -euo pipefail
what=$1 out=$2
shift 2
case $what in
  full)
    runs=(
      --run fit-base-24 S1 0 24 7 --run fit-s2-26 S2 100 26 8 --run fit-s1-10 S1 100 10 6
      --run check-s2-40 S2 100 40 6 --run check-s1-26 S1 60 26 6 --run check-base-9 S1 0 9 5
    )
    ;;
  capped)
    runs=(--run check-s2-capped-14 S2 100 14 9 --run check-s1-capped-8 S1 100 8 7 --pool-bytes 10500000000)
    ;;
  *)
    echo "got $what, allowed: full, capped" >&2
    exit 2
    ;;
esac
exec "${PYTHON:-python3}" -m bench.record_runs --geometry llama-7b --max-num-seqs 256 "${runs[@]}" --out "$out" "$@"
