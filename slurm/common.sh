# shellcheck shell=bash disable=SC2034,SC2154
# (Variables that the sourcing script sets, and some that it uses.)
# What the scripts of this folder share. Sourced with `root`, the project's folder, set.
#
# CONTAINER_IMAGE   *.sif: run by apptainer. Anything else: an image or .sqsh file for pyxis
#                   (srun --container-image). Not set: the virtual environment.
# CONTAINER_MOUNTS  further folders, A:B,C:D; the project and the working directory are there.
# PYTHON            the interpreter. Default: ROOT/.venv/bin/python, in a container python3.

# shellcheck source=slurm/env.sh
source "$root/slurm/env.sh"

container_options=()  # for srun
python=()             # behind srun: everything up to the arguments of Python
mounts="$root:$root,$PWD:$PWD${CONTAINER_MOUNTS:+,$CONTAINER_MOUNTS}"
if [[ -z ${CONTAINER_IMAGE:-} ]]; then
  python=("${PYTHON:-$root/.venv/bin/python}")
elif [[ $CONTAINER_IMAGE == *.sif ]]; then
  python=(apptainer exec --nv --bind "$mounts" --pwd "$PWD" "$CONTAINER_IMAGE" "${PYTHON:-python3}")
else
  container_options=("--container-image=$CONTAINER_IMAGE" "--container-mounts=$mounts"
    "--container-workdir=$PWD")
  python=("${PYTHON:-python3}")
fi
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
cli=("${python[@]}" -m megatron_cpgd.cli)

fail() {
  printf '%s: %s\n' "${0##*/}" "$*" >&2
  exit 2
}

[[ -n ${CONTAINER_IMAGE:-} ]] || command -v "${python[0]}" >/dev/null ||
  fail "no interpreter ${python[0]}: export PYTHON with one that has the project's dependencies"

# A command as it could be typed.
show() {
  local word line=' '
  for word; do
    [[ $word =~ ^[[:alnum:]_./:=,@%+-]+$ ]] || word=${word@Q}
    line+=" $word"
  done
  printf '%s\n' "$line"
}

# A command of one process: on the first node of a job, where a container may be needed, else here.
once() {
  if [[ -n ${SLURM_JOB_ID:-} ]]; then
    srun --nodes=1 --ntasks=1 --cpu-bind=none "${container_options[@]}" "$@"
  else
    "$@"
  fi
}
