#!/usr/bin/env bash
# Set up or train on every worker of a Cloud TPU pod slice, by gcloud from any machine.
#
#   TPU_NAME=udm ZONE=us-east5-a scripts/launch_tpu_pod.sh setup
#   TPU_NAME=udm ZONE=us-east5-a scripts/launch_tpu_pod.sh train --config configs/geneval.py --config.output_dir=/mnt/shared/run
#   TPU_NAME=udm ZONE=us-east5-a scripts/launch_tpu_pod.sh stop
#   ... --dry-run anywhere: print the commands instead
#
# setup copies this folder to every worker and installs it there; train starts the same command on all of them (the TPU's
# own metadata say which worker is which) and goes on from the last checkpoint if there is one; stop sends SIGTERM, upon
# which the run saves and ends. Workers need one output_dir that all of them see, such as a Filestore mount.
# Also read: PROJECT, REMOTE_DIR (default: udm-grpo), TOKEN_FILE and TLS_CA are files to copy for remote scorers.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

usage() {
    sed -n '2,14s/^# \{0,1\}//p' scripts/launch_tpu_pod.sh
}

dry_run=false
words=()
for word in "$@"; do
    case $word in
        --dry-run) dry_run=true ;;
        -h | --help) usage && exit 0 ;;
        *) words+=("$word") ;;
    esac
done
action=${words[0]:-}
arguments=("${words[@]:1}")
for name in TPU_NAME ZONE; do
    if [[ -z ${!name:-} ]]; then
        echo "launch_tpu_pod.sh: $name is not set; set it to the slice's $name, as in $name=... scripts/launch_tpu_pod.sh" >&2
        exit 2
    fi
done
remote=${REMOTE_DIR:-udm-grpo}
where=("$TPU_NAME" --zone "$ZONE" --worker=all)
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
    run gcloud compute tpus tpu-vm ssh "${where[@]}" --command "$1"
}

case $action in
    setup)
        # Only what git tracks: no outputs, no environments.
        archive=$(mktemp --suffix=.tar.gz)
        trap 'rm -f "$archive"' EXIT
        run git archive --format=tar.gz --output "$archive" HEAD
        run gcloud compute tpus tpu-vm scp "$archive" "$TPU_NAME:udm-grpo.tar.gz" "${where[@]:1}"
        for file in ${TOKEN_FILE:-} ${TLS_CA:-}; do
            run gcloud compute tpus tpu-vm scp "$file" "$TPU_NAME:$(basename "$file")" "${where[@]:1}"
        done
        jax=$(grep -o '^jax==[0-9.]*' requirements.txt)
        on_all_workers "mkdir -p $remote && tar -xzf udm-grpo.tar.gz -C $remote && cd $remote \
&& python3 -m venv .venv && .venv/bin/pip install -r requirements.txt && .venv/bin/pip install '${jax/jax/jax[tpu]}'"
        ;;
    train)
        if [[ " ${arguments[*]} " != *" --config"* ]]; then
            echo "launch_tpu_pod.sh: train wants --config FILE, as in train --config configs/geneval.py" >&2
            exit 2
        fi
        command="cd $remote && .venv/bin/python -m udm_grpo.train --config.checkpoint.resume=latest"
        for argument in "${arguments[@]}"; do
            command+=" $(printf '%q' "$argument")"
        done
        on_all_workers "$command"
        ;;
    stop)
        # The bracket keeps pkill from finding the shell that runs it.
        on_all_workers "pkill -TERM -f '[u]dm_grpo.train'"
        ;;
    *)
        echo "launch_tpu_pod.sh: '$action' is not known; wanted setup, train or stop" >&2
        usage >&2
        exit 2
        ;;
esac
