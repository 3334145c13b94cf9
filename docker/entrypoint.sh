#!/bin/sh
# Replaces itself by a command (so that the command gets the signals), with the build of Pillow-SIMD for this processor.
set -eu
if grep -qsw avx2 "${CPUINFO:-/proc/cpuinfo}"; then
    export PYTHONPATH="/opt/pillow-avx2:$PYTHONPATH"
fi
exec "$@"
