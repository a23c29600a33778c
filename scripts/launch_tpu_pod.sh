#!/usr/bin/env bash
# Set up, or train on, every worker of a Cloud TPU pod slice, with gcloud from any machine.
#
#   export TPU_NAME=udm ZONE=us-east5-a
#   PYTHON=python3.12 scripts/launch_tpu_pod.sh setup
#   scripts/launch_tpu_pod.sh copy models/URSA-1.7B-IBQ512 data/geneval
#   scripts/launch_tpu_pod.sh train --config configs/geneval.py --config.output_dir=/mnt/shared/run
#   scripts/launch_tpu_pod.sh stop
#   ... --dry-run anywhere: print the commands instead of running them
#
# setup  copies the sources in this folder to every worker and installs the trainer's packages there (no PyTorch, no tests).
# copy   copies files and folders of this folder to the same place on every worker; all of them need the base model and the
#        prompt files. With BUCKET=gs://NAME/PATH the workers fetch them from there instead, which is faster for large models.
# check  checks on every worker that the files which the run reads exist and that no other training is running.
# train  runs the check, then starts the same command on all workers; each gets its rank from the TPU's metadata. The run
#        resumes from the last checkpoint if there is one. All workers must share output_dir, for instance on a
#        Filestore mount. The command stays in the foreground: run it inside tmux, or on a machine that stays on.
# stop   sends SIGTERM: the run ends after its iteration, with a checkpoint and status 0. Run train again to continue.
#
# PYTHON is the workers' Python, 3.11 or later (default: python3, which is 3.10 on TPU VMs of Ubuntu 22.04; setup says how to
# install another). Environment: PROJECT, REMOTE_DIR (default: udm-grpo, in the home folder), TOKEN_FILE and TLS_CA (files
# for remote scorers, which setup copies into REMOTE_DIR). Ports 8476 and 8477 must be open between the workers.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

usage() {
    sed -n '2,26s/^# \{0,1\}//p' scripts/launch_tpu_pod.sh
}

fail() {
    echo "launch_tpu_pod.sh: $1" >&2
    exit 2
}

dry_run=false
words=()
for word in "$@"; do
    case $word in
        --dry-run | --dry_run) dry_run=true ;;
        -h | --help) usage && exit 0 ;;
        *) words+=("$word") ;;
    esac
done
action=${words[0]:-}
arguments=("${words[@]:1}")
for name in TPU_NAME ZONE; do
    [[ -n ${!name:-} ]] || fail "$name is not set; set it for the slice, as in $name=... scripts/launch_tpu_pod.sh"
done
python=${PYTHON:-python3}
remote=$(printf '%q' "${REMOTE_DIR:-udm-grpo}")
where=(--zone "$ZONE" --worker=all)
[[ -n ${PROJECT:-} ]] && where+=(--project "$PROJECT")

run() {
    if $dry_run; then
        printf '%q ' "$@"
        printf '\n'
    else
        "$@"
    fi
}

on_all_workers() {
    run gcloud compute tpus tpu-vm ssh "$TPU_NAME" "${where[@]}" --command "$1"
}

to_all_workers() { # to_all_workers FROM TO: TO is relative to the workers' home folders
    run gcloud compute tpus tpu-vm scp "$1" "$TPU_NAME:$2" --recurse "${where[@]}"
}

check_python() {
    local code='import sys; print("Python %d.%d" % sys.version_info[:2]); sys.exit(sys.version_info < (3, 11))'
    on_all_workers "version=\$($python -c '$code') \
|| { echo \"worker \$(hostname): $python is \${version:-not installed}; Python 3.11 or later is required\" >&2; exit 1; }" && return
    local ppa="sudo add-apt-repository --yes ppa:deadsnakes/ppa && sudo apt-get install --yes python3.12 python3.12-venv"
    local uv="curl -LsSf https://astral.sh/uv/install.sh | sh && ~/.local/bin/uv python install 3.12"
    echo "Install Python 3.12 on all workers with one of these, then run setup again with PYTHON=python3.12 or PYTHON=.local/bin/python3.12:" >&2
    for command in "$ppa" "$uv"; do
        printf '  gcloud compute tpus tpu-vm ssh %s --command "%s"\n' "$TPU_NAME ${where[*]}" "$command" >&2
    done
    exit 1
}

setup() {
    check_python
    archive=$(mktemp --suffix=.tar.gz) # not local, since the trap needs it
    trap 'rm -f "$archive"' EXIT
    run tar --exclude=__pycache__ -czf "$archive" udm_grpo rewards_bridge configs scripts pyproject.toml README.md LICENSE
    to_all_workers "$archive" udm-grpo.tar.gz
    on_all_workers "mkdir -p $remote && tar -xzf udm-grpo.tar.gz -C $remote"
    for file in "${TOKEN_FILE:-}" "${TLS_CA:-}"; do
        [[ -z $file ]] || to_all_workers "$file" "$remote/"
    done
    on_all_workers "$python -m venv $remote/.venv && cd $remote && .venv/bin/python -m pip install -e '.[tpu]'"
}

copy() {
    ((${#arguments[@]})) || fail "copy needs files or folders, as in copy models/URSA-1.7B-IBQ512 data/geneval"
    local path
    for path in "${arguments[@]}"; do
        path=${path%/}
        [[ $path != /* && $path != *..* ]] || fail "$path: use paths inside this folder, since workers get them at the same place"
        $dry_run || [[ -n ${BUCKET:-} || -e $path ]] || fail "$path: no such file or folder on this machine"
    done
    for path in "${arguments[@]}"; do
        path=${path%/}
        local folder quoted
        folder=$(printf '%q' "$(dirname "$path")") quoted=$(printf '%q' "$path")
        on_all_workers "mkdir -p $remote/$folder"
        if [[ -n ${BUCKET:-} ]]; then
            on_all_workers "cd $remote && gcloud storage cp --recursive $(printf '%q' "${BUCKET%/}/$path") $folder/"
        else
            to_all_workers "$path" "$remote/$folder/"
        fi
    done
}

check() {
    local running='[ -f train.pid ] && ps -o args= -p "$(cat train.pid)" | grep -q udm_grpo.train'
    local look="JAX_PLATFORMS=cpu .venv/bin/python -m udm_grpo.check_inputs$1"
    on_all_workers "cd $remote || exit; { if $running; then \
echo \"error: a training is already running, with process id \$(cat train.pid); stop it first\"; false; else $look; fi; } 2>&1 \
| sed \"s/^/worker \$(hostname): /\"; exit \${PIPESTATUS[0]}"
}

case $action in
    setup) setup ;;
    copy) copy ;;
    check | train)
        if [[ " ${arguments[*]} " != *" --config"* ]]; then
            fail "$action needs --config FILE, as in $action --config configs/geneval.py"
        fi
        quoted=$(printf ' %q' "${arguments[@]}")
        check "$quoted"
        if [[ $action == train ]]; then
            # exec keeps the shell's process id for the trainer; stop reads it.
            on_all_workers "cd $remote && echo \$\$ >train.pid \
&& exec .venv/bin/python -m udm_grpo.train --config.checkpoint.resume=latest$quoted"
        fi
        ;;
    stop)
        on_all_workers "cd $remote && ps -o args= -p \"\$(cat train.pid)\" | grep -q udm_grpo.train && kill -TERM \"\$(cat train.pid)\" \
|| { echo \"worker \$(hostname): no training is running\" >&2; exit 1; }"
        ;;
    *)
        echo "launch_tpu_pod.sh: unknown action '$action'; expected setup, copy, check, train or stop" >&2
        usage >&2
        exit 2
        ;;
esac
