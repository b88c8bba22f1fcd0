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
  EXPERIMENTS   which, such as "table1 frontier": names of configs/experiment (default: all that are for images);
                "video superresolution" are for two other embedded models, each with results of its own
  MODEL         of configs/model: flux-mini (default; minutes, on a laptop), flux1-dev, nunchaku-flux1-dev, ...
  LIMIT         at most so many prompts of each experiment (default: as many as each says)
  OUT           the folder of the results (default: results/MODEL, where you are; OUT/MODEL where there are several)
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

out=${OUT:-}
for argument in "$@"; do
    case $argument in
        out=*) out=${argument#out=} ;;
    esac
done

# The embedded model that an experiment is for, unless MODEL names another.
model_of() {
    case $1 in
        video) echo "${MODEL:-hunyuan-mini}" ;;
        superresolution) echo "${MODEL:-flux-mini-upscaler}" ;;
        *) echo "${MODEL:-flux-mini}" ;;
    esac
}

experiments=${EXPERIMENTS:-}
read -ra names <<<"${experiments//,/ }"
models=()
for name in "${names[@]:-all}"; do
    model=$(model_of "$name")
    [[ " ${models[*]:-} " == *" $model "* ]] || models+=("$model")
done

make --silent --directory "$root" .venv/eval.stamp >&2

status=0
for model in "${models[@]}"; do
    folder=${out:-results/$model}
    if [[ -n $out ]] && ((${#models[@]} > 1)); then
        folder=$out/$model
    fi
    own=()
    for name in "${names[@]:-}"; do
        [[ -z $name || $(model_of "$name") != "$model" ]] || own+=("$name")
    done
    arguments=("model=$model" "launcher=${LAUNCHER:-local}")
    ((${#own[@]} == 0)) || arguments+=("experiment=[$(IFS=,; printf '%s' "${own[*]}")]")
    [[ -z ${LIMIT:-} ]] || arguments+=("limit=$LIMIT")
    # -P: modules come from this repository, not from where you are.
    code=0
    PYTHONPATH=$root "$root/.venv/bin/python" -P -m eval "${arguments[@]}" "$@" "out=$folder" || code=$?
    ((code <= status)) || status=$code
    ((code < 2)) || break
    printf 'tables and figures: %s/*/, all on one page: %s/report.html\n' "$folder" "$folder"
done
exit "$status"
