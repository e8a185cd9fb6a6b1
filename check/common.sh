# Sourced first by the other scripts; no script itself. Goes to the project's folder, sets up .venv, and defines
#   python, data           the interpreter; the data folder (DATA=... names another, from the project's folder)
#   suite PROGRAM FLAGS    runs main.py or main_dropout.py, which gets the signals sent to the script
#   last PROGRAM FLAGS     the same as a script's last command: it takes the place of the shell, and gets the signals sent to the script
#   side_by_side           runs main.py with each line of standard input as its flags, $processes at a time, on the GPUs 0, 1, ... or, with
#                          GPUS=0, on the CPU with one thread each; the lines of each begin with its number
#   absolute PATH          a path that is relative to the project's folder, from anywhere
#   enter FOLDER FLAGS     makes a folder, goes there, and keeps other copies of the script, and other FLAGS, out of it. Further arguments:
#                          paths that will be part of the lines of side_by_side
#   runs [MODEL]           the folders of all trainings below results/ that have ended, or of those of a model
#   complain TEXT          ends the script with an error
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
absolute() { [[ $1 = /* ]] && echo "$1" || echo "$root/$1"; }
complain() { echo "$(basename "$0"): $*" >&2; exit 2; }
enter() {
    case "$(printf '%s|' "$@")" in
        *[\'\"\\]* | *"  "*) complain "quotes, backslashes and double spaces cannot be part of a folder or a flag: $*" ;;
    esac
    mkdir -p "$1" && cd "$1"
    if command -v flock >/dev/null; then
        exec 9>>.lock # empties nothing; inherited: it holds until the last command of a script that was killed has ended
        flock -n 9 || complain "another copy, or a command that one has left behind, is at work in $1"
    fi
    [ ! -e .flags ] || [ "$(cat .flags)" = "$2" ] ||
        complain "$1 was begun with the further flags '$(cat .flags)', now '$2': go on with the former, or in another folder"
    echo "$2" >.flags
}
runs() {
    local file
    for file in $(grep -ls "\"model\": \"${1:-.*}\"" results/*/*/*/*/config.json); do
        [ ! -e "${file%/*}/final_model.pt" ] || echo "${file%/*}"
    done
}
numbered() { # a command's number, its flags
    local device=-1
    [ "$GPUS" -eq 0 ] || device=$slot
    echo "[$1] main.py ${*:2}"
    "$python" "$root/main.py" "${@:2}" --device "$device" 2>&1 | (trap '' INT && while IFS= read -r line; do echo "[$1] $line"; done)
}
if [ "${SMOKE:-}" != 1 ]; then
    side_by_side() {
        export -f numbered
        export python root GPUS
        [ "$GPUS" -gt 0 ] || export OMP_NUM_THREADS=1
        awk '{ sub(/ +$/, ""); print NR, $0 }' |
            xargs -r -L 1 -P "$processes" --process-slot-var=slot bash -o pipefail -c 'numbered "$@"' numbered
    }
    # in the background and waited for: a shell answers no signal while a command is in its foreground
    suite() {
        local name code
        (trap - INT && exec "${launcher[@]}" "$root/$1" "${@:2}") &
        child=$!
        for name in TERM HUP USR1 XCPU; do trap "kill -s $name $child" $name; done
        trap : INT # which a terminal sends to the command as well
        while # a signal ends `wait` before the command
            code=0
            wait $child || code=$?
            kill -0 $child 2>/dev/null
        do :; done
        trap - TERM HUP USR1 XCPU INT
        return $code
    }
    last() { exec "${launcher[@]}" "$root/$1" "${@:2}"; }
else
    # behind a script's own flags, so that these are the ones that count
    smoke=(--device -1 --seed 0 --data-dir data --epochs 1 --train-size 100 --test-size 4 --T1 8 --T2 3)
    case "$1" in
        mnist) smoke+=(--task digits) ;;
        cifar) smoke+=(--channels 4 4 4 4) ;;
    esac
    attacks=(--attack-step 4 --attack-iters 2 --attack-queries 10 --eps-list 0.1)
    temporary=$(mktemp -d)
    trap 'rm -rf "$temporary"' EXIT
    cd "$temporary"
    export TMPDIR=$temporary PYTHONDONTWRITEBYTECODE=1
    if [ -z "${SMOKE_SERVER:-}" ]; then # a folder in which the tests have such a process already, see tests/test_check.py
        SMOKE_SERVER=$temporary
        mkfifo commands codes
        "$python" "$root/tests/smoke.py" <commands 4>codes &
    fi
    exec 5>"$SMOKE_SERVER/commands" 6<"$SMOKE_SERVER/codes"
    echo "$temporary" >&5
    read -r ready <&6 # the data are there
    suite() {
        local code
        case " $* " in *" --seeds "*) local smoke=("${smoke[@]/--seed/--seeds}") ;; esac
        case " $* " in *" --todo "*) local smoke=("${smoke[@]}" "${attacks[@]}") ;; esac
        if [ ${#launcher[@]} -gt 1 ]; then
            "${launcher[@]}" "$root/$1" "${@:2}" "${smoke[@]}"
        else
            echo "$(printf '%q ' "$@" "${smoke[@]}")" >&5
            read -r code <&6
            return "$code"
        fi
    }
    last() { suite "$@"; }
    side_by_side() {
        local line
        while read -r line <&7; do
            eval "suite main.py $line"
        done 7<&0
    }
    smoke_run() {
        suite main.py "$@" --save
        run=$(echo results/*/*/*/*)
    }
fi
