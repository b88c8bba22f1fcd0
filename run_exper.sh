#!/usr/bin/env bash
# The paper's experiments: images, measurements, tables, figures and a page. See --help.
set -euo pipefail

root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)

usage() {
    cat <<'HELP'
bash run_exper.sh [FIELD=VALUE ...]

Runs the experiments of the H2-Cache paper and writes their tables, figures, page and raw records. The same command goes
on where it was interrupted and draws nothing twice. It makes .venv from requirements-eval.txt if need be.

Environment:
  EXPERIMENTS   which, such as "table1 frontier": names of configs/experiment (default: all)
  MODEL         of configs/model: flux-mini (default; minutes, on a laptop), flux1-dev, nunchaku-flux1-dev, ...
  LIMIT         at most so many prompts of each experiment (default: as many as each says)
  OUT           the folder of the results (default: results/MODEL, where you are)
  LAUNCHER      local (default) or ray: on every GPU of a Ray cluster
  PYTHON        what makes .venv (default: python3)

Any FIELD=VALUE goes to `python -m eval`: launcher.workers=8 (processes that draw on a CPU), prompts=cute80, model.path=FOLDER, experiments.frontier.limit=8, ...

Exit code: 0; 1 if some images could not be drawn (the same command tries them again); 2 if something has to be put right
first; 130 after Ctrl-C.
HELP
}

for argument in "$@"; do
    case $argument in
        -h | --help) usage; exit 0 ;;
        *=* | "~"*) ;;
        *)
            printf 'run_exper.sh: error: %s is not FIELD=VALUE; see bash run_exper.sh --help\n' "$argument" >&2
            exit 2
            ;;
    esac
done

model=${MODEL:-flux-mini}
out=${OUT:-results/$model}
for argument in "$@"; do
    case $argument in
        out=*) out=${argument#out=} ;;
    esac
done
arguments=("model=$model" "launcher=${LAUNCHER:-local}" "out=$out")
if [[ -n ${EXPERIMENTS:-} ]]; then
    read -ra names <<<"${EXPERIMENTS//,/ }"
    arguments+=("experiment=[$(IFS=,; printf '%s' "${names[*]}")]")
fi
if [[ -n ${LIMIT:-} ]]; then
    arguments+=("limit=$LIMIT")
fi

make --silent --directory "$root" .venv/eval.stamp >&2

# -P: modules come from this repository, not from where you are.
status=0
PYTHONPATH=$root "$root/.venv/bin/python" -P -m eval "${arguments[@]}" "$@" || status=$?
if ((status < 2)); then
    printf 'tables and figures: %s/*/, all on one page: %s/report.html\n' "$out" "$out"
fi
exit "$status"
