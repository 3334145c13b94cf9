#!/bin/sh
# install-pillow.sh DIR: on x86-64, Pillow-SIMD twice. Its portable build (SSE4) goes into the virtual environment; its
# AVX2 build goes into DIR, where entrypoint.sh finds it. Both resize to the same bytes. Elsewhere DIR stays empty, and
# stock Pillow comes with the other requirements.
# pip's cache does not know with which flags a wheel was compiled, so it is not asked.
set -eu
mkdir -p "$1"
[ "$(uname -m)" = x86_64 ] || exit 0
install() {
    pip install --no-cache-dir --no-deps --constraint constraints.txt --build-constraint constraints.txt \
        "$@" pillow-simd
}
install
CC="cc -mavx2" install --target "$1"
