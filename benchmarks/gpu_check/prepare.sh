#!/bin/sh
# Collects in benchmarks/gpu_check/carried, which git ignores, what a machine with a GPU and without a network needs: the
# wheels of requirements.txt, and the name of the commit. The tiny models are in the package.
#   PYTHON_VERSION: of that machine; default: 3.12.
set -eu
cd "$(dirname "$0")"
limit_kb=60000
rm -rf carried
mkdir carried
"${PYTHON:-python3}" -m pip download --quiet --no-deps --only-binary=:all: \
  --python-version "${PYTHON_VERSION:-3.12}" --implementation cp \
  --platform manylinux_2_28_x86_64 --platform manylinux_2_24_x86_64 --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 --platform any \
  --dest carried/wheels --requirement requirements.txt
git rev-parse HEAD > carried/commit
git diff --quiet HEAD -- . ../.. || echo "with changes that are not committed" >> carried/commit
size_kb=$(du -sk carried | cut -f1)
if [ "$size_kb" -gt "$limit_kb" ]; then
  echo "prepare.sh: carried is $size_kb kB, more than $limit_kb" >&2
  exit 1
fi
echo "carried: $(ls carried/wheels | wc -l) wheels, $size_kb kB"
