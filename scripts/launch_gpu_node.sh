#!/usr/bin/env bash
# Train on one node of GPUs; resumes from the last checkpoint of its output_dir.
#
#   scripts/launch_gpu_node.sh -- --config configs/pickscore.py                                             # the recipe's own split
#   scripts/launch_gpu_node.sh --scorers pickscore --scorer-gpus 1 -- --config configs/pickscore.py         # 7 + 1 of 8
#   scripts/launch_gpu_node.sh --scorers geneval,pickscore --scorer-gpus 2 -- --config configs/mine.py      # one each
#   scripts/launch_gpu_node.sh --scorers pickscore --share 0.8 -- --config configs/pickscore.py             # 8 + 8, shared
#   ... --dry-run before the --: print what would run
#
# --scorers NAME,NAME   scorers of the config that run on GPUs; without it, what the config says of its scorers' devices holds
# --scorer-gpus N       the node's last N GPUs are the scorers' alone, in turn (default: one for each of them)
# --share FRACTION      instead: the trainer takes this part of every GPU's memory, and scorers use the rest of the last one
#
# These become rewards.scorers.NAME.devices and rewards.trainer_memory_fraction; the trainer itself keeps off the scorers' GPUs.
# GPUs are those of CUDA_VISIBLE_DEVICES, or what nvidia-smi lists. Also read: PYTHON (default: python).
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
        --scorers) IFS=, read -ra names <<<"${2:?--scorers wants names}" && shift 2 ;;
        --scorer-gpus | --scorer_gpus) scorer_gpus=${2:?--scorer-gpus wants a number} && shift 2 ;;
        --share) share=${2:?--share wants a fraction} && shift 2 ;;
        -h | --help) sed -n '2,15s/^# \{0,1\}//p' scripts/launch_gpu_node.sh && exit 0 ;;
        --) shift && break ;;
        *) fail "$1 is not known; the trainer's own arguments come after --" ;;
    esac
done
[[ " $* " == *" --config"* ]] || fail "after -- the trainer wants --config FILE, as in -- --config configs/pickscore.py"
count=${scorer_gpus:-${#names[@]}}
[[ $count =~ ^[0-9]+$ ]] || fail "--scorer-gpus is $scorer_gpus; give a whole number"
[[ -z $share || $share =~ ^0\.[0-9]+$ ]] || fail "--share is $share; give a fraction below 1, such as 0.8"
[[ -z $scorer_gpus$share || ${#names[@]} -gt 0 ]] || fail "--scorer-gpus and --share are for scorers; name them: --scorers pickscore"
[[ -z $scorer_gpus || -z $share ]] || fail "--scorer-gpus and --share exclude each other; give one of them"

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
    ((count < ${#gpus[@]})) || fail "--scorer-gpus is $count of ${#gpus[@]} GPUs; leave at least one to the trainer"
    ((count >= ${#names[@]})) || fail "--scorer-gpus is $count for ${#names[@]} scorers; give each of them a GPU, or use --share"
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
