#!/usr/bin/env bash
# Train on one node of GPUs; the run resumes from the last checkpoint in its output_dir.
#
#   scripts/launch_gpu_node.sh -- --config configs/pickscore.py                                             # the recipe's own split
#   scripts/launch_gpu_node.sh --scorers pickscore --scorer-gpus 1 -- --config configs/pickscore.py         # 7 + 1 of 8
#   scripts/launch_gpu_node.sh --scorers geneval,pickscore --scorer-gpus 2 -- --config configs/mine.py      # one each
#   scripts/launch_gpu_node.sh --scorers pickscore --share 0.8 -- --config configs/pickscore.py             # 8 + 8, shared
#   ... --dry-run before the --: print the command instead of running it
#
# --scorers NAME,NAME   scorers of the config that run on GPUs; without this option the config decides their devices
# --scorer-gpus N       reserve the node's last N GPUs for the scorers, assigned in turn (default: one for each scorer)
# --share FRACTION      instead: the trainer takes this fraction of every GPU's memory, and the scorers use the rest of the last GPU
#
# These become rewards.scorers.NAME.devices and rewards.trainer_memory_fraction; the trainer does not use the scorers' GPUs.
# The GPUs are those of CUDA_VISIBLE_DEVICES, or all that nvidia-smi lists. Environment: PYTHON (default: python).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

fail() {
    echo "launch_gpu_node.sh: $1" >&2
    exit 2
}

dry_run=false names=() scorer_gpus="" share=""
while (($#)); do
    case $1 in
        --dry-run | --dry_run) dry_run=true && shift ;;
        --scorers) IFS=, read -ra names <<<"${2:?--scorers needs names}" && shift 2 ;;
        --scorer-gpus | --scorer_gpus) scorer_gpus=${2:?--scorer-gpus needs a number} && shift 2 ;;
        --share) share=${2:?--share needs a fraction} && shift 2 ;;
        -h | --help) sed -n '2,15s/^# \{0,1\}//p' scripts/launch_gpu_node.sh && exit 0 ;;
        --) shift && break ;;
        *) fail "unknown argument $1; the trainer's own arguments come after --" ;;
    esac
done
[[ " $* " == *" --config"* ]] || fail "the trainer needs --config FILE after --, as in -- --config configs/pickscore.py"
count=${scorer_gpus:-${#names[@]}}
[[ $count =~ ^[0-9]+$ ]] || fail "--scorer-gpus is $scorer_gpus; choose a whole number"
[[ -z $share || $share =~ ^0\.[0-9]+$ ]] || fail "--share is $share; choose a fraction below 1, such as 0.8"
[[ -z $scorer_gpus$share || ${#names[@]} -gt 0 ]] || fail "--scorer-gpus and --share need --scorers, as in --scorers pickscore"
[[ -z $scorer_gpus || -z $share ]] || fail "--scorer-gpus and --share exclude each other; use one of them"

command=("${PYTHON:-python}" -m udm_grpo.train --config.checkpoint.resume=latest)
gpus=()
if [[ -n $share ]]; then
    command+=("--config.rewards.trainer_memory_fraction=$share")
elif ((${#names[@]})); then
    if [[ -n ${CUDA_VISIBLE_DEVICES+set} ]]; then
        [[ $CUDA_VISIBLE_DEVICES =~ ^(([0-9]|GPU-|MIG-).*)$ ]] ||
            fail "CUDA_VISIBLE_DEVICES is '$CUDA_VISIBLE_DEVICES', which hides every GPU; unset it, or leave --scorers out"
        IFS=, read -ra gpus <<<"$CUDA_VISIBLE_DEVICES"
    else
        mapfile -t gpus < <(nvidia-smi --query-gpu=index --format=csv,noheader)
        gpus=("${gpus[@]%%,*}")
    fi
    ((count < ${#gpus[@]})) || fail "--scorer-gpus is $count of ${#gpus[@]} GPUs; leave at least one for the trainer"
    ((count >= ${#names[@]})) || fail "--scorer-gpus is $count for ${#names[@]} scorers; reserve one for each of them, or use --share"
    gpus=("${gpus[@]: -count}")
fi
for index in "${!names[@]}"; do
    devices=shared
    if [[ -z $share ]]; then
        devices=${gpus[index]}
        for ((other = index + ${#names[@]}; other < count; other += ${#names[@]})); do
            devices+=",${gpus[other]}"
        done
    fi
    command+=("--config.rewards.scorers.${names[index]}.devices=$devices")
done
command+=("$@")

if $dry_run; then
    printf '%q ' "${command[@]}"
    printf '\n'
    exit 0
fi
exec "${command[@]}"
