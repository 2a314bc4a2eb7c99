#!/usr/bin/env bash
# Trains on a Cloud TPU VM slice, one process on each of its hosts, controlled from this machine.
#
#   launch/tpu_vm.sh create NAME v5litepod-256 v2-alpha-tpuv5-lite --spot     (further gcloud options)
#   launch/tpu_vm.sh install NAME                      this checkout and its packages, on every host
#   launch/tpu_vm.sh train NAME configs/pods.py:llama3_8b_v5e_256 --run gs://BUCKET/run \
#       --data.store gs://BUCKET/store --data.sources 'gs://BUCKET/text/*.jsonl.zst' \
#       --checkpoint.local /dev/shm/gptjax
#   launch/tpu_vm.sh stop NAME                         save and end, from another terminal
#   launch/tpu_vm.sh delete NAME
#
# Set CLOUDSDK_COMPUTE_ZONE and CLOUDSDK_CORE_PROJECT for gcloud, and `ssh-add` its key. JAX finds
# the other hosts in the VM's metadata. `train` restarts the command on all hosts after a dead or
# hung process, a maintenance event or a lost connection, and ends at a permanent error. Run it in
# tmux on a small VM near the slice. A preempted spot slice must be created again; the same `train`
# command then continues. MAX_RESTARTS is the largest number of restarts (1000), RESTART_SECONDS the
# pause before each (15). For several slices see launch/gke_jobset.yaml.
set -uo pipefail

fail() { echo "tpu_vm.sh: $*" >&2; exit 2; }
on() { gcloud compute tpus tpu-vm ssh "$name" --worker="$1" --command="$2"; } # on WORKERS COMMAND

[ $# -ge 2 ] || fail "usage: $0 create|install|all|train|stop|delete NAME ..."
action=$1 name=$2
shift 2

# Commands for the hosts, expanded there and not here. A host that is stopped manually prints so. A
# process that outlived its connection still holds the lock: it gets SIGTERM, at which all hosts save
# and end with 75, and the next attempt starts on all of them.
# shellcheck disable=SC2016
STOP='cd ~/gptjax && flock -n .lock echo no training is running here && exit
touch .stopped; kill -TERM $(cat .pid)'
# shellcheck disable=SC2016
RUN='cd ~/gptjax || exit 78
exec 9>>.lock
if flock -n 9; then
    rm -f .stopped
    (echo "$BASHPID" >.pid; exec .venv/bin/gptjax train %s); code=$?
    [ ! -e .stopped ] || echo "tpu_vm.sh: stopped manually" >&2
else kill -TERM "$(cat .pid)"; flock -w 600 9; code=75
fi
echo "tpu_vm.sh: $(hostname) ended with $code" >&2
exit "$code"'

train() {
    local command tee pid told code one restarts=0
    [ $# -gt 0 ] || fail "usage: $0 train NAME CONFIG [OVERRIDES]"
    # shellcheck disable=SC2059 # RUN is the format
    printf -v command "$RUN" "$(printf '%q ' "$@")"
    report=$(mktemp)
    trap 'rm -f "$report"' EXIT
    trap 'told=1; on 0 "$STOP"' INT TERM
    while :; do
        exec 3> >(trap '' INT TERM; exec tee "$report" >&2)
        tee=$!
        # Ignores Ctrl-C, which would close the connection before the hosts have saved.
        (trap '' INT; on all "$command") 2>&3 3>&- &
        pid=$!
        exec 3>&-
        while told=; wait "$pid"; code=$?; [ "$told" ]; do :; done # a signal ends a wait
        wait "$tee"
        # gcloud ends with the exit code of the first worker that failed; each worker prints its own.
        for one in "$code" $(sed -n 's/^tpu_vm.sh: .* ended with \([0-9]*\)$/\1/p' "$report"); do
            case $one in
                0 | 69 | 75 | 134 | 137 | 143 | 255) ;; # 255: the connection or the host failed
                *)
                    echo "tpu_vm.sh: a host ended with $one, which a restart does not fix" >&2
                    return "$one"
                    ;;
            esac
        done
        [ "$code" != 0 ] || return 0
        if grep -qx 'tpu_vm.sh: stopped manually' "$report" ||
            [ $((restarts++)) -ge "${MAX_RESTARTS:-1000}" ]; then
            echo "tpu_vm.sh: ended with $code; the same command continues from there" >&2
            return "$code"
        fi
        echo "tpu_vm.sh: ended with $code; restarting" >&2
        sleep "${RESTART_SECONDS:-15}"
    done
}

case $action in
    create)
        [ $# -ge 2 ] || fail "usage: $0 create NAME TYPE VERSION [GCLOUD OPTIONS]"
        gcloud compute tpus tpu-vm create "$name" --accelerator-type="$1" --version="$2" "${@:3}"
        ;;
    install)
        # Only the last commit is copied, no runs, data or environments. The images' Python 3.10 is
        # too old, so uv installs a newer one. Every package is compared with its hash.
        cd "$(dirname "$0")/.." || exit 2
        archive=$(mktemp)
        trap 'rm -f "$archive"' EXIT
        git archive --format=tar.gz --output="$archive" HEAD &&
            gcloud compute tpus tpu-vm scp "$archive" "$name:gptjax.tar.gz" --worker=all &&
            on all 'set -e
                mkdir -p ~/gptjax && tar -xzf ~/gptjax.tar.gz -C ~/gptjax && cd ~/gptjax
                python3 -m pip install --quiet --user uv
                [ -x .venv/bin/python ] || python3 -m uv venv --quiet --python 3.12 .venv
                cat launch/requirements/cpu.txt launch/requirements/tpu.txt >.requirements.txt
                python3 -m uv pip install --quiet --python .venv/bin/python --require-hashes \
                    -r .requirements.txt
                python3 -m uv pip install --quiet --python .venv/bin/python --no-deps \
                    --no-build-isolation -e .
                .venv/bin/gptjax --help >/dev/null'
        ;;
    all) on all "$*" ;;
    train) train "$@" ;;
    stop) on 0 "$STOP" ;;
    delete) gcloud compute tpus tpu-vm delete "$name" --quiet ;;
    *) fail "unknown action $action" ;;
esac
