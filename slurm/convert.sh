#!/bin/bash
#SBATCH --job-name=cpgd-convert
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --output=cpgd-convert-%j.log
#
# Convert a checkpoint between the Hugging Face and the Megatron format.
#
#   sbatch slurm/convert.sh hf-to-megatron HF_DIR CHECKPOINT_DIR [--dtype bf16]
#   sbatch slurm/convert.sh megatron-to-hf CHECKPOINT_DIR HF_DIR [--max-shard-gb 5]
#   slurm/convert.sh --dry-run hf-to-megatron HF_DIR CHECKPOINT_DIR
#
# One process; it takes the memory of one copy of the weights, hence a whole node.
set -euo pipefail

usage() { sed -n '/^# Convert/,/^set/{/^set/d;s/^# \{0,1\}//;p}' "$0"; }

dry_run=0
[[ ${1:-} != --dry-run ]] || { dry_run=1; shift; }
[[ ${1:-} != -h && ${1:-} != --help ]] || { usage; exit 0; }
[[ $# -gt 0 ]] || { usage >&2; exit 2; }

# In a job this file is a copy in Slurm's spool folder.
root=${MEGATRON_CPGD_ROOT:-$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)}
[[ -f $root/slurm/common.sh ]] || root=${SLURM_SUBMIT_DIR:-}
[[ -f $root/slurm/common.sh ]] || {
  echo "cannot find slurm/common.sh: run sbatch in the project's folder, or export" \
    "MEGATRON_CPGD_ROOT with its path" >&2
  exit 2
}
# shellcheck source=slurm/common.sh
source "$root/slurm/common.sh"

if [[ $dry_run == 1 ]]; then
  echo "submit:"
  show sbatch "$root/slurm/convert.sh" "$@"
  echo "in the job:"
  show srun --nodes=1 --ntasks=1 --cpu-bind=none "${container_options[@]}" "${cli[@]}" convert "$@"
  exit 0
fi
[[ -n ${SLURM_JOB_ID:-} ]] || fail "submit it with sbatch, or give --dry-run"
once "${cli[@]}" convert "$@"
