#!/usr/bin/env bash
# What only a card can show, in one command and one bounded time: the card's tests and the engine's
# benchmarks, their JSON and a log in $OUT (default: gpu-check/). docs/measuring.md says how.
#
#   benchmarks/on_gpu.sh wheels [3.12]   where packages can be had: what a machine that has torch
#                                        lacks, for its Python, into .wheels/ (about 45 MB)
#   benchmarks/on_gpu.sh [ARGUMENTS]     on the machine with the card, with .wheels/ or with the
#                                        package installed; PYTHON names another python3, and
#                                        ARGUMENTS go to benchmarks.engine_overhead
set -uo pipefail
cd "$(dirname "$0")/.."
WHEELS=.wheels
LIMIT=${LIMIT:-560} # seconds for everything
PYTHON=${PYTHON:-python3}
# Beside torch, numpy, pytest, hypothesis and what these bring, in the versions of our lock; first
# what the engine needs, then what the configuration does, which an actor's process reads.
LACKING=(accelerate annotated-types compel diffusers httpcore2 httpx2 huggingface-hub
  importlib-metadata nvidia-ml-py peft pydantic pydantic-core pyparsing structlog transformers truststore
  typing-extensions typing-inspection
  bitarray boto3 botocore ckzg eth-abi eth-account eth-hash eth-keyfile eth-keys eth-rlp eth-typing eth-utils
  hexbytes jmespath parsimonious py-ecc pycryptodome rlp s3transfer)

wheels() {
  local platforms=() pinned=() each
  for each in 2_28 2_27 2_17 2_12; do platforms+=(--platform "manylinux_${each}_x86_64"); done
  platforms+=(--platform manylinux2014_x86_64 --platform manylinux1_x86_64)
  for each in "${LACKING[@]}"; do
    pinned+=("$(grep -oE "^$each==[^ ]+" requirements/worker.txt)") || {
      echo "error: $each isn't in requirements/worker.txt" >&2
      return 1
    }
  done
  rm -rf "$WHEELS"
  "$PYTHON" -m pip download --quiet --disable-pip-version-check --no-deps --only-binary=:all: \
    --python-version "$1" --implementation cp "${platforms[@]}" --dest "$WHEELS" "${pinned[@]}" &&
    du -sh "$WHEELS"
}

if [ "${1:-}" = wheels ]; then
  wheels "${2:-3.12}"
  exit
fi

OUT=${OUT:-gpu-check}
mkdir -p "$OUT"
LOG=$OUT/log
: >"$LOG"
export PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
export PYTHONPATH=$PWD
if [ -d "$WHEELS" ]; then
  site=$(mktemp -d)
  trap 'rm -rf "$site"' EXIT
  "$PYTHON" -m pip install --quiet --no-index --no-deps --no-compile --no-cache-dir \
    --disable-pip-version-check --target "$site" "$WHEELS"/*.whl || exit
  export PYTHONPATH=$site:$PWD
fi

failed=()
step() { # NAME SECONDS FILE COMMAND...: in so many seconds at most, and in what is left of all
  local name=$1 most=$2 file=$OUT/$3 left=$((LIMIT - SECONDS)) began=$SECONDS result=done
  shift 3
  [ "$left" -lt "$most" ] && most=$left
  echo "== $name, at most $most s" | tee -a "$LOG"
  if [ "$most" -le 0 ] || ! timeout --kill-after=5 "$most" "$@" >"$file" 2>>"$LOG"; then
    failed+=("$name")
    result=FAILED
  fi
  echo "== $name: $result, $((SECONDS - began)) s" | tee -a "$LOG"
  [ -s "$file" ] && tail -n 25 "$file" || rm -f "$file"
}
benchmark() { # NAME SECONDS FILE ARGUMENTS...
  local name=$1 most=$2 file=$3
  shift 3
  step "$name" "$most" "$file" "$PYTHON" -m "benchmarks.$name" --device "${DEVICE:-cuda}" --json "$@"
}
tests() { # NAME SECONDS: the card's alone, and without what the tests beside them need
  step "test_$1" "$2" "test_$1.txt" "$PYTHON" -m pytest -c /dev/null --rootdir . --noconftest \
    -p no:cacheprovider -p tests.integration.card_world -v -rs -k "${TESTS:-not cpu}" \
    "tests/integration/test_$1.py"
}

{ nvidia-smi; "$PYTHON" -m pip list --disable-pip-version-check; } >"$OUT/machine.txt" 2>&1
benchmark engine_overhead 120 engine_overhead_sd15.json --family sd15 "$@"
tests cards 150
benchmark engine_overhead 270 engine_overhead_sdxl.json --family sdxl --rounds 3 "$@"
tests engine_sequences 150
benchmark warm_pool 120 warm_pool.json --tasks 150

[ ${#failed[@]} -eq 0 ] || { echo "failed: ${failed[*]}" | tee -a "$LOG"; exit 1; }
