# Functions of the other scripts, which source this file first. It changes to the project's folder,
# builds .venv, and defines
#   python, data           the interpreter; the data folder (DATA=... sets another, relative to the
#                          project's folder)
#   suite PROGRAM FLAGS    runs main.py or main_dropout.py and passes signals of the script on to it
#   last PROGRAM FLAGS     the same for the last command of a script: it replaces the shell and so
#                          receives the signals
#   side_by_side           runs main.py with each line of standard input as its flags, $processes at
#                          a time, on the GPUs 0, 1, ... or, with GPUS=0, on the CPU with one thread
#                          each; each line of output begins with the number of its command
#   share FLAGS            runs main.py with the same flags in $processes processes, which share the
#                          work of a study
#   absolute PATH          prints the absolute path of a path relative to the project's folder
#   enter FOLDER [WORD...] creates a folder and changes to it; refuses words that cannot be part of
#                          the lines of side_by_side
#   complain TEXT          ends the script with an error
# With SMOKE=1 in the environment a script only runs its commands once: in a minute, on a CPU, with
# few and random data (`common.sh cifar`) or the digits of scikit-learn (`common.sh mnist`), in a
# temporary folder that is removed at the end.
#   smoke_run FLAGS        trains a run for a script that needs one, and sets `run` to its folder
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
    share() {
        local line n
        line=$(printf "'%s' " "$@")
        for ((n = 0; n < processes; n++)); do echo "$line"; done | side_by_side
    }
    # in the background with `wait`: a shell handles no signal during a command in the foreground
    suite() {
        local name code
        (trap - INT && exec "${launcher[@]}" "$root/$1" "${@:2}") &
        child=$!
        for name in TERM HUP USR1 XCPU; do trap "kill -s $name $child" $name; done
        trap : INT # the terminal sends SIGINT to the command as well
        while # a signal ends `wait` before the command ends
            code=0
            wait $child || code=$?
            kill -0 $child 2>/dev/null
        do :; done
        trap - TERM HUP USR1 XCPU INT
        return $code
    }
    last() { exec "${launcher[@]}" "$root/$1" "${@:2}"; }
else
    # appended to a script's own flags: the last value of a flag counts
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
    # set by tests that share one server, see tests/check/test_scripts.py
    if [ -z "${SMOKE_SERVER:-}" ]; then
        SMOKE_SERVER=$temporary
        mkfifo commands codes
        "$python" "$root/tests/smoke.py" <commands 4>codes &
    fi
    exec 5>"$SMOKE_SERVER/commands" 6<"$SMOKE_SERVER/codes"
    echo "$temporary" >&5
    read -r ready <&6 # the data exist now
    suite() {
        local code
        case " $* " in *" --seeds "*) local smoke=("${smoke[@]/--seed/--seeds}") ;; esac
        case " $* " in
            *" --todo study "*) local smoke=("${smoke[@]}" "${attacks[@]/--eps-list/--eps}") ;;
            *" --todo "*) local smoke=("${smoke[@]}" "${attacks[@]}") ;;
        esac
        if [ ${#launcher[@]} -gt 1 ]; then
            "${launcher[@]}" "$root/$1" "${@:2}" "${smoke[@]}"
        else
            echo "$(printf '%q ' "$@" "${smoke[@]}")" >&5
            read -r code <&6
            return "$code"
        fi
    }
    last() { suite "$@"; }
    share() { suite main.py "$@"; }
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
