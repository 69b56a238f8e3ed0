#!/usr/bin/env bash
# Bundle the packages that an offline GPU machine lacks (x86-64, Python 3.12, torch and transformers
# already there) into one folder of about 40 MB that travels with the checkout.
#   here, in the checkout:    bash benchmarks/pack_wheels.sh [FOLDER]     (default .whl)
#   there, in the checkout:   source FOLDER/activate
set -euo pipefail
here=$(cd "$(dirname "$0")/.." && pwd)
folder=$(realpath -m "${1:-.whl}")
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
mkdir -p "$folder"
platforms=()
for platform in manylinux_2_28 manylinux_2_27 manylinux_2_24 manylinux_2_17 manylinux2014; do
    platforms+=(--platform "${platform}_x86_64")
done
# In the versions that the tests run with.
python3 -m pip download --quiet --disable-pip-version-check --no-deps --only-binary=:all: \
    --python-version 3.12 --implementation cp "${platforms[@]}" --platform any \
    -c "$here/constraints.txt" -d "$scratch/wheels" \
    ray highspy msgpack psutil jsonschema jsonschema-specifications referencing rpds-py
site=$scratch/site
mkdir "$site"
for wheel in "$scratch"/wheels/*.whl; do
    python3 -m zipfile -e "$wheel" "$site"
done
# Ray is the largest by far. Parts that stages never import go, and debug symbols with them.
(cd "$site/ray" && rm -rf jars rllib serve tune train air llm cpp tests dashboard/client)
find "$site" -name '*.map' -delete
binaries=("$site/ray/_raylet.so" "$site/ray/core/src/ray/gcs/gcs_server" \
    "$site/ray/core/src/ray/raylet/raylet")
strip --strip-unneeded "${binaries[@]}"
chmod +x "${binaries[@]}"
tar -C "$site" -cf - . | xz -T0 -6 > "$folder/site.txz"
cat > "$folder/activate" << 'SH'
# Source this in the checkout: unpacks the bundle once, and puts both on PYTHONPATH.
bundle=$(dirname "${BASH_SOURCE[0]}")/site.txz
site=${TMPDIR:-/tmp}/flexgen-ray-$(cksum < "$bundle" | cut -d' ' -f1)
[ -d "$site" ] || { mkdir -p "$site.part" && tar -C "$site.part" -xJf "$bundle" && mv "$site.part" "$site"; }
export PYTHONPATH="$PWD:$site${PYTHONPATH:+:$PYTHONPATH}" RAY_USAGE_STATS_ENABLED=0
SH
du -sh "$folder"
