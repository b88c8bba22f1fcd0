#!/usr/bin/env bash
# bash tools/try_lowest.sh [FOLDER]: tests of the library, the methods, the tools and run.py with the lowest version of each
# package that the requirements files allow, in an environment in FOLDER (default: a scratch one). It needs a package index and
# about 6 GB. docs/tests.md says what the other tests expect of newer versions.
set -euo pipefail
cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."
folder=${1:-$(mktemp -d)}
files=(requirements.txt requirements-eval.txt requirements-docs.txt requirements-dev.txt)

"${PYTHON:-python3}" -m venv --clear "$folder/lowest"
# Of torch>=2.11, the versions 2.11.*: the first of all may have been withdrawn.
sed -nE 's/^([a-z][a-z0-9-]*)(\[[a-z]+\])?>=([0-9.]+).*/\1==\3.*/p' "${files[@]}" > "$folder/lowest.txt"
"$folder/lowest/bin/pip" install --quiet -r requirements-dev.txt -c "$folder/lowest.txt"
tests=(tests/h2cache tests/baselines tests/tools tests/integrations tests/test_run.py)
"$folder/lowest/bin/python" -m pytest -n 2 -m "not thorough" "${tests[@]}" \
    --deselect tests/h2cache/plans/test_polish.py::test_it_brings_images_nearer_that_it_did_not_learn_from \
    --deselect tests/baselines/test_plans.py::test_bespoke_weights_are_nearer_than_euler_s
