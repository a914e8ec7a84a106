# What all three jobs need on their nodes: the one file to edit. They source it in the folder of the run.
# A variable that is set in the environment when the jobs are submitted wins over what stands here.

# 1. Python with synthbroker in it. Uncomment one; none is needed where `synthbroker` runs in the shell that submits.
#module load python redis
#source "$HOME/venvs/synthbroker/bin/activate"
#source "$HOME/miniforge3/etc/profile.d/conda.sh" && conda activate synthbroker
#RUN=(apptainer exec --nv "$PWD/synthbroker.sif")

# 2. The broker's server program, where neither PATH nor synthbroker[server] has one.
#export SYNTHBROKER_REDIS_SERVER=$HOME/redis/src/redis-server

# 3. The ring that generators fill and trainers read.
RING=${RING:-brains}

# 4. The network that nodes reach one another by, as `ip -brief address` names it on a node: ib0, bond0, ...
#    Empty: the broker listens on all of them, and the others look its host name up.
INTERFACE=${INTERFACE:-}

# Nothing to edit from here on.
RUN=("${RUN[@]:-env}")
# This job; in an array, this task: the last one's own number is that of the whole array.
JOB=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
JOB=${JOB:-$SLURM_JOB_ID}
export SLURM_EXPORT_ENV=ALL   # what srun starts gets all this, also where jobs begin with an empty environment
export SYNTHBROKER_URL="file://$PWD/broker.json"
[ -z "$INTERFACE" ] || export GLOO_SOCKET_IFNAME=$INTERFACE NCCL_SOCKET_IFNAME=$INTERFACE
"${RUN[@]}" sh -c 'command -v synthbroker' > /dev/null || {
    echo "$PWD/env.sh: there is no synthbroker on $(hostname): uncomment what brings it, in part 1 of that file" >&2
    exit 1
}
