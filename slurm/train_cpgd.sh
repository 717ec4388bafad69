#!/bin/bash
#SBATCH --job-name=cpgd
#SBATCH --nodes=1
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --output=cpgd-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=USR1@600
#
# Train, and go on after a preemption or the time limit until the run is complete.
#
#   sbatch [--nodes=N --gpus-per-node=G ...] slurm/train_cpgd.sh CONFIG.yaml [key=value ...]
#   slurm/train_cpgd.sh --dry-run [--nodes=N] CONFIG.yaml [key=value ...]
#
# Of the N nodes the last `rollout.nodes` have engines only, the others share the ranks.
#
# One task of srun is one rank: no torchrun, no Ray. See docs/slurm.md. Exit code: that of srun, 1 if
# a node fails the preflight, 200 if the run was stopped and could not be put back into the queue.
# Why these options: whole nodes with all their memory, since the first one's holds the engine and
# all weights; a log that a requeued job appends to; USR1 to the ranks 600 s before the time limit,
# which is more than checkpoint.stop_within_s.
set -euo pipefail

usage() { sed -n '/^# Train/,/^set/{/^set/d;s/^# \{0,1\}//;p}' "$0"; }

dry_run=0
nodes=${SLURM_JOB_NUM_NODES:-1}
while [[ ${1:-} == -* ]]; do
  case $1 in
    --dry-run) dry_run=1 ;;
    --nodes=*) nodes=${1#*=} ;;
    -h | --help) usage; exit 0 ;;
    *) usage >&2; echo "unknown option $1; options of sbatch stand before the script" >&2; exit 2 ;;
  esac
  shift
done
[[ $# -gt 0 ]] || { usage >&2; exit 2; }

# In a job this file is a copy in Slurm's spool folder.
root=${MEGATRON_CPGD_ROOT:-$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)}
[[ -f $root/slurm/common.sh ]] || root=${SLURM_SUBMIT_DIR:-}
[[ -f $root/slurm/common.sh ]] || {
  echo "cannot find slurm/common.sh: run sbatch in the project's folder, or export" \
    "MEGATRON_CPGD_ROOT with its path" >&2
  exit 2
}
before=$(export -p)
# shellcheck source=slurm/common.sh
source "$root/slurm/common.sh"

[[ $nodes =~ ^[1-9][0-9]*$ ]] || fail "--nodes=$nodes: expected a number of nodes"
[[ $dry_run == 1 || -n ${SLURM_JOB_ID:-} ]] || fail "submit it with sbatch, or give --dry-run"
counts=$(once "${cli[@]}" config --counts "$@")
read -r ranks engine_nodes <<<"$counts"
trainer_nodes=$((nodes - engine_nodes))
[[ $trainer_nodes -gt 0 ]] || fail "rollout.nodes=$engine_nodes of $nodes node(s) leave none for the" \
  "ranks: use more nodes"
[[ $((ranks % trainer_nodes)) == 0 ]] || fail "parallel.* need $ranks ranks, which $trainer_nodes" \
  "nodes cannot share evenly: use a number of nodes that divides $ranks, and rollout.nodes besides"
ranks_per_node=$((ranks / trainer_nodes))

step=(--label --cpu-bind=none "${container_options[@]}")
preflight=(srun "--nodes=$nodes" "${step[@]}" "--ntasks=$nodes" --ntasks-per-node=1
  "${cli[@]}" doctor "$@")
# No --cpus-per-task: without binding, every process may use all CPUs of its node, as the engine
# has to. Without --overcommit srun would refuse more ranks than CPUs, so a wrong size is noticed.
train=(srun "--nodes=$trainer_nodes" "${step[@]}" "--ntasks=$ranks"
  "--ntasks-per-node=$ranks_per_node" --kill-on-bad-exit=1 "${cli[@]}" train "$@")
serve=()
if [[ $engine_nodes -gt 0 ]]; then
  train=("${train[0]}" --relative=0 "${train[@]:1}")
  serve=(srun "--relative=$trainer_nodes" "--nodes=$engine_nodes" "${step[@]}"
    "--ntasks=$engine_nodes" --ntasks-per-node=1 "${cli[@]}" serve "$@")
fi

if [[ $dry_run == 1 ]]; then
  echo "configuration, where it differs from the defaults:"
  "${cli[@]}" config --changed "$@" | sed 's/^/  /'
  echo "ranks: $ranks on $trainer_nodes node(s), $ranks_per_node on each"
  [[ ${#serve[@]} == 0 ]] || echo "engines: on $engine_nodes further node(s)"
  echo "environment (slurm/env.sh):"
  comm -13 <(sort <<<"$before") <(export -p | sort) | sed 's/^declare -x /  /'
  # Of all that a plan says, only whether it fits. It fails if it does not, or without torch.
  plan=$("${cli[@]}" plan "--nodes=$nodes" "$@" 2>&1) || true
  verdict=$(sed -nE 's/^(warning|tight|FITS|DOES NOT FIT):/  &/p' <<<"$plan")
  printf 'plan:\n%s\n' "${verdict:-  none: ${plan##*$'\n'}}"
  echo "submit:"
  submit=("--nodes=$nodes" "$root/slurm/train_cpgd.sh" "$@")
  show sbatch "${submit[@]}"
  echo "preflight, on every node:"
  show "${preflight[@]}"
  echo "train:"
  show "${train[@]}"
  if [[ ${#serve[@]} -gt 0 ]]; then
    echo "engine nodes, at the same time:"
    show "${serve[@]}"
  fi
  echo "checks:"
  if command -v sbatch >/dev/null; then
    sbatch --test-only "${submit[@]}" 2>&1 | sed 's/^/  /'
  else
    echo "  the configuration is valid; there is no sbatch here to ask about the job"
  fi
  exit 0
fi

time_limit=$(scontrol show job "$SLURM_JOB_ID" | sed -n 's/.* EndTime=\([^ ]*\).*/\1/p')
time_limit=$(date -d "$time_limit" +%s 2>/dev/null || echo 9999999999) # Unknown: there is none

# Run a step. Slurm signals its tasks itself. A USR1 for this script (--signal=B:USR1@..., scancel
# --batch) is passed on; ranks take a second one for the same.
run() {
  local child code=0
  "$@" &
  child=$!
  [[ -z ${beside:-} ]] || "$beside" "$child" &
  # shellcheck disable=SC2064 # the child of now
  trap "kill -USR1 $child 2>/dev/null || true" USR1
  while :; do
    wait "$child" && code=0 || code=$?
    kill -0 "$child" 2>/dev/null || return "$code" # else `wait` was interrupted by the trap
  done
}

# The engine nodes, beside the ranks, which are the process $1. They end when rank 0 does. If they fail
# first, rank 0 notices, unless they never reached it.
serve_beside() {
  trap - USR1
  "${serve[@]}" && return
  sleep 60
  echo "${0##*/}: the engine nodes have failed" >&2
  kill -KILL "$1" 2>/dev/null
}

# Whether the step that ended with code $1 was stopped before there was anything to save: by SIGUSR1, or
# by SIGTERM ahead of a preemption. Any other SIGTERM is srun's own, because another rank has failed.
stopped_early() {
  [[ $1 == 138 ||
    ($1 == 143 && $(scontrol show job "$SLURM_JOB_ID") == *" PreemptTime="[0-9]*) ]]
}

code=0
run "${preflight[@]}" || code=$?
if [[ $code == 0 ]]; then
  if [[ $engine_nodes -gt 0 ]]; then
    beside=serve_beside
    # The ranks of a single node would meet on its loopback, where other nodes find nobody.
    MASTER_ADDR=${MASTER_ADDR:-$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)}
    export MASTER_ADDR
  fi
  run "${train[@]}" || code=$?
elif ! stopped_early "$code"; then
  echo "${0##*/}: a node fails the preflight above; nothing was started" >&2
  exit 1
fi
trap - USR1

# A rank 0 that was killed has left the engine's weights in the memory of this node, the first.
for file in /dev/shm/megatron_cpgd_*.safetensors; do
  pid=${file##*_}
  [[ -e $file && ! -e /proc/${pid%.safetensors} ]] && rm -f "$file"
done

# After a preemption it is no reason not to try again that nothing was saved. At the end of the time
# limit it is, since the next start would get no further either.
early=$(stopped_early "$code" && echo 1 || echo 0)
if [[ $code == 200 || ($early == 1 && $(date +%s) -lt $((time_limit - 900))) ]]; then
  echo "${0##*/}: stopped as asked; job $SLURM_JOB_ID goes back into the queue"
  scontrol requeue "$SLURM_JOB_ID" || {
    echo "${0##*/}: Slurm does not requeue this job: submit the same command again" >&2
    exit "$code"
  }
  sleep 60 # Slurm ends this script meanwhile
elif [[ $early == 1 ]]; then
  echo "${0##*/}: the time limit ends, and no checkpoint was written since the start: not requeued;" \
    "raise --time or checkpoint.stop_within_s" >&2
fi
exit "$code"
