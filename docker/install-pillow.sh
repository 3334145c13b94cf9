#!/bin/sh
# install-pillow.sh DIR: installs Pillow-SIMD twice on x86-64. The portable build (SSE4) goes into the virtual environment,
# the AVX2 build into DIR, where entrypoint.sh finds it. Both resize to the same bytes. On other machines DIR stays empty, and
# stock Pillow is installed with the other requirements.
# pip's cache is not used: it does not record the flags that a wheel was compiled with.
set -eu
mkdir -p "$1"
[ "$(uname -m)" = x86_64 ] || exit 0
install() {
    pip install --no-cache-dir --no-deps --constraint constraints.txt --build-constraint constraints.txt \
        "$@" pillow-simd
}
install & # both at once: each compiles on one core
portable=$!
CC="cc -mavx2" install --target "$1"
wait "$portable"
