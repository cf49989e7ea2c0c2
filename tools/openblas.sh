#!/bin/sh
# Runs a command with OpenBLAS preloaded where the system has it (Debian: libopenblas0-pthread): the BLAS that
# the Linux mlx wheel brings is the scalar reference one, 20 to 200 times slower. Elsewhere it just runs the command.
if [ "$(uname -s)" = Linux ] && PATH="$PATH:/usr/sbin:/sbin" ldconfig -p | grep -q 'libopenblas\.so\.0'; then
    LD_PRELOAD="libopenblas.so.0${LD_PRELOAD:+:$LD_PRELOAD}" OPENBLAS_NUM_THREADS="${OPENBLAS_NUM_THREADS:-1}"
    export LD_PRELOAD OPENBLAS_NUM_THREADS
fi
exec "$@"
