#!/bin/bash
#SBATCH --job-name=cpgd-scaling
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=USR1@600
#
# Scaling studies: a Slurm job for each cell, see docs/scaling_study.md.
#
#   slurm/scaling_study.sh SPEC.yaml --out DIR [--dry-run] [--sbatch=OPTION ...]
#
# is `tools/scaling_study.py submit`, which submits this file with `cell` and `report`.
set -euo pipefail

usage() { sed -n '/^# Scaling/,/^set/{/^set/d;s/^# \{0,1\}//;p}' "$0"; }

[[ ${1:-} != -h && ${1:-} != --help ]] || { usage; exit 0; }
[[ $# -gt 1 ]] || { usage >&2; exit 2; }

# In a job this file is a copy in Slurm's spool folder.
root=${MEGATRON_CPGD_ROOT:-$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)}
[[ -f $root/slurm/common.sh ]] || root=${SLURM_SUBMIT_DIR:-}
[[ -f $root/slurm/common.sh ]] || {
  echo "cannot find slurm/common.sh: run sbatch in the project's folder, or export" \
    "MEGATRON_CPGD_ROOT with its path" >&2
  exit 2
}
export MEGATRON_CPGD_ROOT=$root
# shellcheck source=slurm/common.sh
source "$root/slurm/common.sh"

if [[ $1 == report ]]; then
  once "${python[@]}" "$root/tools/scaling_study.py" "$@"
elif [[ $1 == cell ]]; then
  [[ -n ${SLURM_ARRAY_TASK_ID:-} ]] || fail "\`cell\` is for a task of a Slurm array; give SPEC.yaml"
  cell=$(sed -n "${SLURM_ARRAY_TASK_ID}p" "$2")
  rm -f "$cell/exit_code"
  code=0
  # The script that real runs take. It puts itself back into the queue if it has to stop.
  "$root/slurm/train_cpgd.sh" "$cell/config.yaml" >>"$cell/log" 2>&1 || code=$?
  rm -rf "$cell/run/checkpoints" "$cell/run/hf"
  echo "$code" >"$cell/exit_code"
else
  "${python[@]}" "$root/tools/scaling_study.py" submit "$@"
fi
