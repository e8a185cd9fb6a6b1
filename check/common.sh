# Sourced first by the other scripts; no script itself. Goes to the project's folder, sets up .venv, and defines
#   python, data           the interpreter; the data folder (DATA=... names another)
#   suite PROGRAM FLAGS    runs main.py or main_dropout.py
#   last PROGRAM FLAGS     the same as a script's last command: it takes the place of the shell, and gets the signals sent to the script
# With SMOKE=1 in the environment a script only shows that all its commands run: in a minute, on a CPU, with few and random data
# (`common.sh cifar`) or the digits of scikit-learn (`common.sh mnist`), in a temporary folder that is removed again.
#   smoke_run FLAGS        trains something for a script that examines a run, and sets `run` to its folder
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash check/setup.sh
root=$PWD
python=$root/.venv/bin/python
data=${DATA:-./data}
launcher=("$python")
if [ "${SMOKE:-}" != 1 ]; then
    suite() { "${launcher[@]}" "$root/$1" "${@:2}"; }
    last() { exec "${launcher[@]}" "$root/$1" "${@:2}"; }
else
    # behind a script's own flags, so that these are the ones that count
    smoke=(--device -1 --seed 0 --data-dir data --epochs 1 --train-size 100 --test-size 8 --T1 8 --T2 3
        --attack-step 4 --attack-iters 2 --eps-list 0.1)
    case "$1" in
        mnist) smoke+=(--task digits) ;;
        cifar) smoke+=(--channels 4 4 4 4) ;;
    esac
    temporary=$(mktemp -d)
    trap 'rm -rf "$temporary"' EXIT
    cd "$temporary"
    export TMPDIR=$temporary PYTHONDONTWRITEBYTECODE=1
    mkfifo commands codes
    "$python" "$root/tests/smoke.py" <commands 4>codes &
    exec 5>commands 6<codes
    read -r ready <&6 # the data are there
    suite() {
        local code
        if [ ${#launcher[@]} -gt 1 ]; then
            "${launcher[@]}" "$root/$1" "${@:2}" "${smoke[@]}"
        else
            echo "$(printf '%q ' "$@" "${smoke[@]}")" >&5
            read -r code <&6
            return "$code"
        fi
    }
    last() { suite "$@"; }
    smoke_run() {
        suite main.py "$@" --save
        run=$(echo results/*/*/*/*)
    }
fi
