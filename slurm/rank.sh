#!/usr/bin/env bash
# One rank, as srun or torchrun starts it: rank.sh LOG_PREFIX COMMAND... writes LOG_PREFIX_RANK.log; the first rank
# also to the job's own output.
set -euo pipefail

rank="${RANK:-$SLURM_PROCID}"
log="$1_$(printf %03d "$rank").log"
shift
if [ "$rank" = 0 ]; then
    # tee must outlive a signal to the whole step: the rank saves and goes on talking.
    exec > >(trap '' INT TERM USR1 && exec tee -a "$log") 2>&1
else
    exec >>"$log" 2>&1
fi
exec "$@"
