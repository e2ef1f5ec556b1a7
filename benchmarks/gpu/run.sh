#!/usr/bin/env bash
# Runs every part of the GPU study; a second call resumes it.
#
#   benchmarks/gpu/run.sh [options of python -m benchmarks.gpu.suite]
#
# WHEELS   a folder of wheels to install first, without the network and beside what is there
# PARTS    a folder of files that make up one GGUF model, in the order of their names
set -euo pipefail
cd "$(dirname "$0")/../.."
python=${PYTHON:-python3}
cache=${XDG_CACHE_HOME:-${HOME:-/tmp}/.cache}/gpu-study
export PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false

if [ -n "${WHEELS:-}" ]; then
  site=$cache/site
  if [ ! -d "$site" ]; then  # complete or not there, even if this is interrupted
    rm -rf "$site.part"
    "$python" -m pip install --quiet --no-index --no-deps --no-compile --no-cache-dir \
      --target "$site.part" "$WHEELS"/*.whl
    mv "$site.part" "$site"
  fi
  export PYTHONPATH="$site${PYTHONPATH:+:$PYTHONPATH}"
fi

model=()
if [ -n "${PARTS:-}" ]; then
  folder=$cache/model
  mkdir -p "$folder"
  cat "$PARTS"/* > "$folder/model.gguf"
  model=(--model "$folder/model.gguf")
fi

exec "$python" -m benchmarks.gpu.suite "${model[@]}" "$@"
