# shellcheck shell=bash
# Environment of every process of a job, on every node. What is set already stays: export a variable
# before sbatch, or add your site's lines at the end. `slurm/train_cpgd.sh --dry-run` prints it all.

# A rank is one process per GPU or core; more threads in each would fight for the same cores.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"

# The last lines before a crash are the ones that matter, and a buffer would lose them.
export PYTHONUNBUFFERED="${PYTHONUNBUFFERED:-1}"

# NCCL then says why a connection failed; INFO says which interfaces and topology it has chosen.
export NCCL_DEBUG="${NCCL_DEBUG:-WARN}"

# Compute nodes often have no way to the internet: without this a missing file is a long wait for
# the hub instead of an error.
export HF_HUB_OFFLINE="${HF_HUB_OFFLINE:-1}"

# Compiled kernels on a local disk: on a shared home all ranks lock and wait for the same files.
export TRITON_CACHE_DIR="${TRITON_CACHE_DIR:-${TMPDIR:-/tmp}/triton-${USER:-$UID}}"

# Which network interface gloo and NCCL meet on. By default the one that leads to the first node.
# Where that is the wrong one, name it; NCCL takes prefixes and lists too. InfiniBand is found by
# NCCL itself, this is only about the first handshake.
# export GLOO_SOCKET_IFNAME=ib0
# export NCCL_SOCKET_IFNAME=ib0

# Sockets and mapped files of many ranks exceed the usual soft limit of 1024 open files.
ulimit -Sn "$(ulimit -Hn)"
# InfiniBand pins its buffers. Slurm hands the limits of the submitting shell on; where an
# administrator has set a lower one, `megatron-cpgd doctor` says so.
ulimit -Sl "$(ulimit -Hl)"

# Your site:
# module load cuda/13.0
