#!/bin/bash
# A Slurm job that trains, and requeues itself when it is preempted or out of time.
# `tokenformer submit` fills it in. By hand: copy it, replace every word that begins with @, and `sbatch` the copy.
#
# One task for each device: @tasks is trainer.devices, @nodes is trainer.num_nodes.
#SBATCH --job-name=@name
#SBATCH --nodes=@nodes
#SBATCH --ntasks-per-node=@tasks
#SBATCH --time=@time
# SIGUSR1 to the tasks this many seconds before the time is up, to leave them a step, a validation and a checkpoint.
#SBATCH --signal=USR1@120
#SBATCH --requeue
# Else a requeued job would begin its log anew.
#SBATCH --open-mode=append
# @run/logs must exist when the job is submitted.
#SBATCH --output=@run/logs/@log
# More of your cluster's options, one a line: --gpus-per-node, --partition, --account, ...
@options

# The folder of this run, and of no other. (An array: one for each of its tasks.)
run=@run@task
mkdir -p "$run/logs"
rm -f "$run/requeue"

# The first time `auto` starts the run, later it resumes from the newest valid checkpoint in its folder.
# One task that fails ends all of them; the others would wait for it. The tasks' logs are in logs/.
srun --kill-on-bad-exit=1 --open-mode=append --output="$run/logs/task-%t.log" \
    @command fit --config @config --run_dir "$run" --ckpt_path auto @overrides
code=$?

# A run that was told to stop has saved a checkpoint and left this file. (Of an array only this task: ARRAY_TASK.)
if [ -e "$run/requeue" ]; then
    scontrol requeue "${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}${SLURM_ARRAY_TASK_ID:+_$SLURM_ARRAY_TASK_ID}"
fi
exit $code
