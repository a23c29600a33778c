#!/usr/bin/env bash
# Train on one node: some GPUs for the trainer and the rest for the scorers, or all of them shared.
#
#   scripts/launch_gpu_node.sh --scorers pickscore --scorer-gpus 1 -- --config configs/pickscore.py        # 7 + 1 of 8
#   scripts/launch_gpu_node.sh --scorers geneval,pickscore --scorer-gpus 2 -- --config configs/mine.py     # one each
#   scripts/launch_gpu_node.sh --scorers pickscore --share 0.8 -- --config configs/pickscore.py            # 8 + 8, shared
#   ... --dry-run before the --: print what would run
#
# --scorers NAME,NAME   scorers of the config that run on a GPU; each gets the next of the scorers' GPUs in turn
# --scorer-gpus N       the node's last N GPUs are the scorers' alone (default: 1, or 0 without --scorers)
# --share FRACTION      instead: the trainer takes this part of every GPU's memory, and scorers use the rest of the last ones
#
# The number of GPUs is that of CUDA_VISIBLE_DEVICES, or what nvidia-smi lists. Also read: PYTHON (default: python).
# The batch has to divide by the trainer's GPUs: with 7, say --config.rollout.prompts=14 --config.rollout.micro_batch=56.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

fail() {
    echo "launch_gpu_node.sh: $1" >&2
    exit 2
}

dry_run=false scorers="" scorer_gpus="" share=""
while (($#)); do
    case $1 in
        --dry-run) dry_run=true && shift ;;
        --scorers) scorers=${2:?--scorers wants names} && shift 2 ;;
        --scorer-gpus) scorer_gpus=${2:?--scorer-gpus wants a number} && shift 2 ;;
        --share) share=${2:?--share wants a fraction} && shift 2 ;;
        -h | --help) sed -n '2,15s/^# \{0,1\}//p' scripts/launch_gpu_node.sh && exit 0 ;;
        --) shift && break ;;
        *) fail "$1 is not known; the trainer's own arguments come after --" ;;
    esac
done
[[ " $* " == *" --config"* ]] || fail "after -- the trainer wants --config FILE, as in -- --config configs/pickscore.py"
if [[ -z $scorer_gpus ]]; then
    scorer_gpus=$([[ -n $scorers ]] && echo 1 || echo 0)
fi
[[ $scorer_gpus =~ ^[0-9]+$ ]] || fail "--scorer-gpus is $scorer_gpus; give a whole number"

if [[ -n ${CUDA_VISIBLE_DEVICES:-} ]]; then
    IFS=, read -ra gpus <<<"$CUDA_VISIBLE_DEVICES"
elif command -v nvidia-smi >/dev/null; then
    mapfile -t gpus < <(nvidia-smi --query-gpu=index --format=csv,noheader)
else
    fail "no GPU: CUDA_VISIBLE_DEVICES is not set and there is no nvidia-smi; on CPU run python -m udm_grpo.train itself"
fi

environment=()
if [[ -n $share ]]; then
    [[ $share =~ ^0\.[0-9]+$ ]] || fail "--share is $share; give a fraction below 1, such as 0.8"
    trainers=("${gpus[@]}")
    environment+=("XLA_PYTHON_CLIENT_MEM_FRACTION=$share")
else
    ((scorer_gpus < ${#gpus[@]})) || fail "--scorer-gpus is $scorer_gpus of ${#gpus[@]} GPUs; leave at least one to the trainer"
    trainers=("${gpus[@]:0:${#gpus[@]}-scorer_gpus}")
fi
judges=("${gpus[@]: -$((scorer_gpus > 0 ? scorer_gpus : 1))}")
environment+=("CUDA_VISIBLE_DEVICES=$(IFS=, && echo "${trainers[*]}")")

command=("${PYTHON:-python}" -m udm_grpo.train --config.checkpoint.resume=latest)
IFS=, read -ra names <<<"$scorers"
for index in "${!names[@]}"; do
    name=${names[index]}
    # A scorer sees one GPU, which is cuda:0 to it.
    command+=("--config.rewards.scorers.$name.environment.CUDA_VISIBLE_DEVICES=${judges[index % ${#judges[@]}]}")
    command+=("--config.rewards.scorers.$name.options.device=cuda:0")
done
command+=("$@")

if $dry_run; then
    printf '%q ' env "${environment[@]}" "${command[@]}"
    printf '\n'
    exit 0
fi
exec env "${environment[@]}" "${command[@]}"
