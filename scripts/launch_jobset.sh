#!/usr/bin/env bash
# Train on a TPU slice or on GPU nodes of a Kubernetes cluster (GKE) with the JobSet controller.
#
#   IMAGE=REGISTRY/udm-grpo:1 scripts/launch_jobset.sh tpu --name udm --hosts 4 --chips 4 --accelerator tpu-v5p-slice \
#       --topology 2x2x4 --claim shared -- --config configs/geneval.py --config.output_dir=/mnt/shared/run
#   IMAGE=REGISTRY/udm-grpo:1 scripts/launch_jobset.sh gpu --name udm --hosts 4 --chips 8 --claim shared -- --config configs/geneval.py
#   ... --dry-run before the --: print the manifest instead of applying it
#
# --hosts N        pods, one per host                  --accelerator, --topology   of the TPU node pool
# --chips N        TPU chips or GPUs per host          --claim NAME                volume claim that all pods mount at /mnt/shared
#
# IMAGE has this folder as its working directory, with pip install -e ".[tpu]" or ".[cuda13]" done there. Each pod reads its
# rank from the JobSet's own labels and connects to the first one at ports 8476 and 8477. The base model, the prompt files and
# output_dir must be in /mnt/shared or in the image. An evicted pod receives SIGTERM; the run saves and exits with status 75,
# the JobSet restarts all pods, up to 20 times, and the run resumes from its checkpoint. The pods authenticate each other with
# the secret of the JobSet's name, if there is one:
#   openssl rand -hex 16 | kubectl create secret generic udm --from-file=secret=/dev/stdin
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

fail() {
    echo "launch_jobset.sh: $1" >&2
    exit 2
}

dry_run=false kind="" name="" hosts="" chips="" accelerator="" topology="" claim=""
while (($#)); do
    case $1 in
        tpu | gpu) kind=$1 && shift ;;
        --dry-run | --dry_run) dry_run=true && shift ;;
        --name | --hosts | --chips | --accelerator | --topology | --claim)
            printf -v "${1#--}" '%s' "${2:?$1 needs a value}" && shift 2 ;;
        -h | --help) sed -n '2,18s/^# \{0,1\}//p' scripts/launch_jobset.sh && exit 0 ;;
        --) shift && break ;;
        *) fail "unknown argument $1; the trainer's own arguments come after --" ;;
    esac
done
[[ -n $kind ]] || fail "expected tpu or gpu, as in launch_jobset.sh tpu --name udm --hosts 4 --chips 4 ..."
for option in name hosts chips claim; do
    [[ -n ${!option} ]] || fail "--$option is missing"
done
[[ $hosts =~ ^[1-9][0-9]*$ && $chips =~ ^[1-9][0-9]*$ ]] || fail "--hosts is $hosts and --chips is $chips; choose whole numbers"
[[ -n ${IMAGE:-} ]] || fail "IMAGE is not set; set it to the container image, as in IMAGE=REGISTRY/udm-grpo:1"
[[ " $* " == *" --config"* ]] || fail "the trainer needs --config FILE after --, as in -- --config configs/geneval.py"

selector="" resource="nvidia.com/gpu"
if [[ $kind == tpu ]]; then
    [[ -n $accelerator && -n $topology ]] || fail "tpu needs --accelerator and --topology, as in --accelerator tpu-v5p-slice --topology 2x2x4"
    resource="google.com/tpu"
    selector="
              nodeSelector:
                cloud.google.com/gke-tpu-accelerator: $accelerator
                cloud.google.com/gke-tpu-topology: $topology"
fi

manifest() {
    cat <<EOF
apiVersion: jobset.x-k8s.io/v1alpha2
kind: JobSet
metadata:
  name: $name
spec:
  failurePolicy:
    maxRestarts: 20
  network:
    enableDNSHostnames: true
  replicatedJobs:
    - name: trainer
      replicas: 1
      template:
        spec:
          parallelism: $hosts
          completions: $hosts
          completionMode: Indexed
          backoffLimit: 0
          template:
            spec:
              restartPolicy: Never
              terminationGracePeriodSeconds: 300$selector
              containers:
                - name: trainer
                  image: $IMAGE
                  ports:
                    - containerPort: 8476
                    - containerPort: 8477
                  env:
                    - name: JAX_COORDINATOR_ADDRESS
                      value: $name-trainer-0-0.$name:8476
                    - name: JAX_NUM_PROCESSES
                      value: "$hosts"
                    - name: JAX_PROCESS_ID
                      valueFrom:
                        fieldRef:
                          fieldPath: metadata.annotations['batch.kubernetes.io/job-completion-index']
                    - name: UDM_GRPO_LOCK_WAIT_S
                      value: "300"
                    - name: UDM_GRPO_SECRET
                      valueFrom:
                        secretKeyRef:
                          name: $name
                          key: secret
                          optional: true
                  command:
                    - python
                    - -m
                    - udm_grpo.train
                    - --config.checkpoint.resume=latest
                    - --config.checkpoint.stopped_status=75
EOF
    for word in "$@"; do
        # Every JSON string is a valid YAML string.
        printf '                    - %s\n' "$(python3 -c 'import json, sys; print(json.dumps(sys.argv[1]))' "$word")"
    done
    cat <<EOF
                  resources:
                    limits:
                      $resource: $chips
                  volumeMounts:
                    - name: shared
                      mountPath: /mnt/shared
                    - name: memory
                      mountPath: /dev/shm
              volumes:
                - name: shared
                  persistentVolumeClaim:
                    claimName: $claim
                - name: memory
                  emptyDir:
                    medium: Memory
EOF
}

if $dry_run; then
    manifest "$@"
else
    manifest "$@" | kubectl apply -f -
fi
